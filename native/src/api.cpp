// The C boundary: preconditions on pointers, one thread at a time, no exception out. Nothing else.
#include "session.hpp"
#include "vocabulary.hpp"

#include <cstdio>
#include <new>

using mtp::failure;
using mtp::require;

namespace {

// Without memory for the sentence there is none; the status says enough.
void say(std::string & error, const char * text) noexcept {
    try {
        error = text;
    } catch (...) {
        error.clear();
    }
}

// Runs body and turns what it throws into a status and a sentence.
template <typename F> int guarded(std::string & error, F && body) {
    try {
        error.clear();
        body();
        return MTP_OK;
    } catch (const failure & e) {
        say(error, e.what());
        return e.status;
    } catch (const std::bad_alloc &) {
        say(error, "out of memory");
        return MTP_NO_MEMORY;
    } catch (const std::exception & e) {
        say(error, e.what());
        return MTP_EXCEPTION;
    } catch (...) {
        say(error, "the host threw something that is not an exception");
        return MTP_EXCEPTION;
    }
}

// The same where there is no session yet: the sentence goes to the caller's text.
template <typename F> int told(char * text, size_t n_text, F && body) {
    std::string error;
    const int   status = guarded(error, body);
    if (status != MTP_OK && text != nullptr && n_text > 0) {
        std::snprintf(text, n_text, "%s", error.c_str());
    }
    return status;
}

template <typename F> int enter(mtp_session * session, F && body) {
    if (session == nullptr) {
        return MTP_INVALID;
    }
    if (session->inside.test_and_set(std::memory_order_acquire)) {
        return MTP_BUSY;
    }
    struct leave {
        std::atomic_flag & flag;
        ~leave() { flag.clear(std::memory_order_release); }
    } guard{ session->inside };
    mtp::stopwatch watch(session->counters.total_ns);
    return guarded(session->error, [&] { body(*session); });
}

}  // namespace

extern "C" {

const char * mtp_version(void) {
    return LLAMA_MTP_VERSION;
}

const char * mtp_host_function(int32_t i) {
    return i >= 0 && i < mtp::n_host_functions ? mtp::host_functions[i] : nullptr;
}

int mtp_session_open(void * const * functions, int32_t n_functions, const mtp_host_layout * layout,
                     const mtp_session_params * params, mtp_session ** out, char * text, size_t n_text) {
    if (out != nullptr) {
        *out = nullptr;
    }
    return told(text, n_text, [&] {
        require(out != nullptr && functions != nullptr && layout != nullptr && params != nullptr,
                "an argument of mtp_session_open is NULL");
        *out = new mtp_session(functions, n_functions, *layout, *params);
    });
}

int mtp_compare_vocabularies(void * const * functions, int32_t n_functions, const mtp_host_layout * layout, const void * a,
                             const void * b, const int32_t * tokens, int32_t n_tokens, char * text, size_t n_text) {
    return told(text, n_text, [&] {
        require(functions != nullptr && layout != nullptr && a != nullptr && b != nullptr,
                "an argument of mtp_compare_vocabularies is NULL");
        const auto        api        = mtp::resolve(functions, n_functions, *layout);
        const std::string difference = mtp::compare_vocabularies(api, a, b, tokens, n_tokens);
        require(difference.empty(), difference.c_str());
    });
}

void mtp_session_close(mtp_session * session, int detach) {
    if (session == nullptr) {
        return;
    }
    try {
        if (detach && session->source) {
            session->source->detach();
        }
    } catch (...) {
        // The context is about to be freed; nothing is left to undo.
    }
    delete session;
}

const char * mtp_session_error(const mtp_session * session) {
    return session != nullptr ? session->error.c_str() : "the session is closed";
}

int mtp_capture(mtp_session * session, const int32_t * tokens, int32_t n, int32_t pos) {
    return enter(session, [&](mtp_session & s) { s.capture(tokens, n, pos); });
}

int mtp_keep_rows(mtp_session * session, int on) {
    return enter(session, [&](mtp_session & s) { s.target.keep_rows(on != 0); });
}

int mtp_begin(mtp_session * session, const int32_t * tokens, int32_t n) {
    return enter(session, [&](mtp_session & s) { s.begin(tokens, n); });
}

int mtp_next(mtp_session * session, void * sampler, int32_t last, int32_t pos, const mtp_rule * rule,
             const int32_t * drafts, int32_t n_drafts, mtp_step * step) {
    return enter(session, [&](mtp_session & s) {
        require(step != nullptr, "step is NULL");
        s.next(sampler, last, pos, rule, drafts, n_drafts, *step);
    });
}

const char * mtp_draft_error(const mtp_session * session) {
    return session != nullptr && session->source ? session->source->error().c_str() : "";
}

int mtp_accept_by_coin(mtp_session * session, const float * chances, int32_t n, uint64_t seed) {
    return enter(session, [&](mtp_session & s) {
        require(n >= 0 && (n == 0 || chances != nullptr), "chances is NULL");
        s.target.accept_by_coin(std::vector<float>(chances, chances + n), seed);
    });
}

int mtp_reuse(mtp_session * session, const int32_t * text, int32_t n_text, const int32_t * prompt, int32_t n_prompt,
              int32_t * n_kept) {
    return enter(session, [&](mtp_session & s) {
        require(n_kept != nullptr, "n_kept is NULL");
        *n_kept = s.reuse(text, n_text, prompt, n_prompt);
    });
}

int32_t mtp_checkpoint_at(const mtp_session * session, int32_t end) {
    return session != nullptr && end >= 0 ? session->checkpoints.place(end) : -1;
}

int mtp_checkpoint(mtp_session * session, const int32_t * tokens, int32_t n) {
    return enter(session, [&](mtp_session & s) { s.save_checkpoint(tokens, n); });
}

int mtp_settle(mtp_session * session) {
    return enter(session, [](mtp_session & s) { s.settle(); });
}

int mtp_replay(mtp_session * session) {
    return enter(session, [](mtp_session & s) { s.replay(); });
}

int mtp_truncate(mtp_session * session, int32_t n_past) {
    return enter(session, [&](mtp_session & s) { s.truncate(n_past); });
}

int mtp_can_truncate(const mtp_session * session, int32_t n_past) {
    return session != nullptr && session->target.can_truncate(n_past) ? 1 : 0;
}

int mtp_forget(mtp_session * session, int32_t n_past) {
    return enter(session, [&](mtp_session & s) { s.forget(n_past); });
}

int mtp_live_row(const mtp_session * session) {
    return session != nullptr ? session->target.live_row() : -1;
}

int mtp_n_past(const mtp_session * session) {
    return session != nullptr ? session->target.n_past() : -1;
}

int mtp_n_past_draft(const mtp_session * session) {
    return session != nullptr && session->source ? session->source->end() : -1;
}

void mtp_session_counters(const mtp_session * session, mtp_counters * out) {
    if (session != nullptr && out != nullptr) {
        *out = session->count();
    }
}

int mtp_state_size(mtp_session * session, size_t * n_bytes) {
    return enter(session, [&](mtp_session & s) {
        require(n_bytes != nullptr, "n_bytes is NULL");
        *n_bytes = s.state_size();
    });
}

int mtp_state_get(mtp_session * session, void * data, size_t n_bytes) {
    return enter(session, [&](mtp_session & s) { s.state_get(static_cast<uint8_t *>(data), n_bytes); });
}

int mtp_state_check(mtp_session * session, const void * data, size_t n_bytes) {
    return enter(session,
                 [&](mtp_session & s) { s.state_check(static_cast<const uint8_t *>(data), n_bytes, s.params.n_ctx); });
}

int mtp_state_set(mtp_session * session, const void * data, size_t n_bytes) {
    return enter(session, [&](mtp_session & s) { s.state_set(static_cast<const uint8_t *>(data), n_bytes); });
}

}  // extern "C"
