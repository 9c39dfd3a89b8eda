// The C boundary: what it refuses, what it frees, and who has to wait.
#include "session_fixture.hpp"

#include <string>
#include <thread>

using namespace fixture;

static int open(const mtp_session_params & p, mtp_session *& s) {
    const auto f = host::functions();
    const auto l = host::layout();
    char       text[64];
    return mtp_session_open(f.data(), static_cast<int32_t>(f.size()), &l, &p, &s, text, sizeof text);
}

TEST(opening_can_fail_and_leaks_nothing) {
    const char * names[] = { "get_memory", "chain_init", "init_greedy", "set_sampler", "seq_pos_max", "memory_clear" };
    for (const char * name : names) {
        for (int nth : { 1, 2 }) {
            for (bool throws : { false, true }) {
                host h(options{});
                h.throws        = throws;
                h.fail_in[name] = nth;
                const auto    p = h.params();
                mtp_session * s = nullptr;
                const int     status = open(p, s);
                CHECK((status == MTP_OK) == (s != nullptr));
                h.fail_in.clear();
                mtp_session_close(s, 1);
                CHECK(h.n_chains_alive == 0);
            }
        }
    }
    // A context that was freed before its session: its sampler is not touched.
    host          h(options{});
    mtp_session * s = h.open();
    h.draft.sampler = nullptr;
    mtp_session_close(s, 0);
    CHECK(h.n_chains_alive == 0);
}

TEST(bad_arguments_are_refused_and_change_nothing) {
    host       h(options{});
    const auto f = host::functions();
    const auto n_f = static_cast<int32_t>(f.size());
    const auto l = host::layout();
    const auto p = h.params();
    mtp_session * s = nullptr;
    char          text[128];
    CHECK(mtp_session_open(nullptr, n_f, &l, &p, &s, text, sizeof text) == MTP_INVALID);
    CHECK(mtp_session_open(f.data(), n_f, nullptr, &p, &s, text, sizeof text) == MTP_INVALID);
    CHECK(mtp_session_open(f.data(), n_f, &l, nullptr, &s, text, sizeof text) == MTP_INVALID);
    CHECK(mtp_session_open(f.data(), n_f, &l, &p, nullptr, nullptr, 0) == MTP_INVALID);
    for (int32_t n : { n_f - 1, n_f + 1, 0, -1 }) {
        CHECK(mtp_session_open(f.data(), n, &l, &p, &s, text, sizeof text) == MTP_INVALID);
        CHECK(s == nullptr);
    }
    for (auto change : { +[](mtp_session_params & q) { q.target = nullptr; },
                         +[](mtp_session_params & q) { q.n_vocab = 0; }, +[](mtp_session_params & q) { q.n_ctx = -1; },
                         +[](mtp_session_params & q) { q.n_embd = 0; },
                         +[](mtp_session_params & q) { q.n_draft_max = q.n_batch; },
                         +[](mtp_session_params & q) { q.rollback = 7; },
                         +[](mtp_session_params & q) { q.drafting = 3; },
                         +[](mtp_session_params & q) { q.prefill_window = -1; },
                         +[](mtp_session_params & q) { q.n_checkpoints = -1; },
                         +[](mtp_session_params & q) { q.rollback = MTP_ROLLBACK_SNAPSHOTS; q.n_rs_seq = 99; } }) {
        auto q = p;
        change(q);
        CHECK(mtp_session_open(f.data(), n_f, &l, &q, &s, text, sizeof text) == MTP_INVALID);
        CHECK(s == nullptr);
        CHECK(text[0] != 0);
    }
    const fake::draft_vocabulary narrow(60);
    for (auto change : { +[](mtp_session_params & q) { q.n_draft_vocab = 0; },
                         +[](mtp_session_params & q) { q.n_draft_vocab = fake::n_vocab + 1; },
                         +[](mtp_session_params & q) { q.n_draft_vocab = 59; },  // stand-ins reach further
                         +[](mtp_session_params & q) { q.draft_tokens = nullptr; },
                         +[](mtp_session_params & q) { q.stand_ins = nullptr; },
                         +[](mtp_session_params & q) { q.draft_tokens = q.stand_ins; } }) {
        auto q          = p;
        q.n_draft_vocab = 60;
        q.draft_tokens  = narrow.tokens.data();
        q.stand_ins     = narrow.stand_ins.data();
        change(q);
        CHECK(mtp_session_open(f.data(), n_f, &l, &q, &s, text, sizeof text) == MTP_INVALID);
        CHECK(s == nullptr);
        CHECK(text[0] != 0);
    }
    for (int32_t i = 0; i < n_f; ++i) {
        auto missing = f;
        missing[i]   = nullptr;
        CHECK(mtp_session_open(missing.data(), n_f, &l, &p, &s, text, sizeof text) == MTP_INVALID);
        CHECK(std::string(text).find(mtp_host_function(i)) != std::string::npos);
    }
    auto moved = l;
    moved.pos += 8;
    CHECK(mtp_session_open(f.data(), n_f, &moved, &p, &s, text, sizeof text) == MTP_ABI);
    auto grown = l;
    grown.batch_size += 8;
    CHECK(mtp_session_open(f.data(), n_f, &grown, &p, &s, text, sizeof text) == MTP_ABI);

    s = h.open();
    generation g(h, s, prompt_of(5), 3, 100);
    g.run(12);
    const int32_t end = mtp_n_past(s);
    mtp_step      step{};
    int32_t       token = 1, n = 0;
    CHECK(mtp_next(s, nullptr, 1, end, rule_of(3), nullptr, 0, &step) == MTP_INVALID);
    CHECK(mtp_next(s, sampler, 1, end, rule_of(3), nullptr, 0, nullptr) == MTP_INVALID);
    CHECK(mtp_next(s, sampler, 1, end, rule_of(3), nullptr, 1, &step) == MTP_INVALID);
    CHECK(mtp_next(s, sampler, 1, end, rule_of(3), &token, -1, &step) == MTP_INVALID);
    CHECK(next(s, 1, end, rule_of(-1, 0), step) == MTP_INVALID);
    auto narrow_rule   = constant_rule(3, 0);
    narrow_rule.window = -1;
    CHECK(next(s, g.text.back(), end, &narrow_rule, step) == MTP_INVALID);
    CHECK(next(s, 1, end + 5, rule_of(3, 0), step) == MTP_INVALID);
    CHECK(mtp_settle(s) == MTP_OK);
    CHECK(next(s, -1, end, rule_of(3, 0), step) == MTP_INVALID);
    CHECK(next(s, fake::n_vocab, end, rule_of(3, 0), step) == MTP_INVALID);
    CHECK(next(s, 1, end, rule_of(MTP_MAX_DEPTH + 1), step) == MTP_INVALID);
    CHECK(next(s, 1, end, rule_of(3), { 1, fake::n_vocab }, step) == MTP_INVALID);
    CHECK(next(s, 1, end, rule_of(3), { -1 }, step) == MTP_INVALID);
    const std::vector<int32_t> many(9, 1);
    CHECK(mtp_capture(s, nullptr, 1, 0) == MTP_INVALID);
    CHECK(mtp_capture(s, &token, 0, 0) == MTP_INVALID);
    CHECK(mtp_capture(s, many.data(), 9, -1) == MTP_INVALID);
    CHECK(mtp_capture(s, many.data(), 9, 0x7fffffff) == MTP_INVALID);
    CHECK(mtp_checkpoint_at(s, -1) == -1);
    CHECK(mtp_checkpoint_at(s, -0x7fffffff - 1) == -1);
    CHECK(mtp_can_truncate(s, -0x7fffffff - 1) == 0);
    CHECK(mtp_truncate(s, -0x7fffffff - 1) == MTP_INVALID);
    CHECK(mtp_truncate(s, -1) == MTP_INVALID);
    CHECK(mtp_truncate(s, end + 1) == MTP_INVALID);
    CHECK(mtp_forget(s, -1) == MTP_INVALID);
    CHECK(mtp_begin(s, nullptr, 3) == MTP_INVALID);
    CHECK(mtp_begin(s, &token, -1) == MTP_INVALID);
    CHECK(mtp_reuse(s, nullptr, 3, &token, 1, &n) == MTP_INVALID);
    CHECK(mtp_reuse(s, &token, -1, &token, 1, &n) == MTP_INVALID);
    CHECK(mtp_reuse(s, &token, 1, nullptr, 3, &n) == MTP_INVALID);
    CHECK(mtp_reuse(s, &token, 1, &token, -1, &n) == MTP_INVALID);
    CHECK(mtp_reuse(s, &token, 1, &token, 1, nullptr) == MTP_INVALID);
    CHECK(mtp_checkpoint(s, nullptr, end) == MTP_INVALID);
    CHECK(mtp_checkpoint(s, &token, 0) == MTP_INVALID);
    CHECK(mtp_checkpoint(s, &token, -1) == MTP_INVALID);
    CHECK(mtp_checkpoint(s, &token, 1) == MTP_INVALID);  // the target ends elsewhere
    CHECK(mtp_accept_by_coin(s, nullptr, 1, 1) == MTP_INVALID);
    CHECK(mtp_accept_by_coin(s, nullptr, -1, 1) == MTP_INVALID);
    CHECK(mtp_n_past(s) == end);
    g.run(60);
    CHECK(h.faults() == "");
    mtp_session_close(s, 1);

    CHECK(mtp_settle(nullptr) == MTP_INVALID);
    CHECK(mtp_live_row(nullptr) == -1);
    CHECK(mtp_n_past(nullptr) == -1);
    CHECK(mtp_n_past_draft(nullptr) == -1);
    CHECK(mtp_replay(nullptr) == MTP_INVALID);
    CHECK(mtp_begin(nullptr, &token, 1) == MTP_INVALID);
    CHECK(mtp_reuse(nullptr, &token, 1, &token, 1, &n) == MTP_INVALID);
    CHECK(mtp_checkpoint(nullptr, &token, 1) == MTP_INVALID);
    CHECK(mtp_checkpoint_at(nullptr, 100) == -1);
    CHECK(std::string(mtp_draft_error(nullptr)) == "");
    CHECK(mtp_host_function(-1) == nullptr);
    CHECK(mtp_host_function(n_f) == nullptr);
    CHECK(mtp_can_truncate(nullptr, 0) == 0);
    CHECK(std::string(mtp_session_error(nullptr)).size() > 4);
    mtp_session_counters(nullptr, nullptr);
    mtp_session_close(nullptr, 1);
    CHECK(std::string(mtp_version()).size() > 2);
}

TEST(a_second_thread_is_told_to_wait) {
    host          h(options{});
    mtp_session * s = h.open();
    generation    g(h, s, prompt_of(5), 3, 250);
    int           n = 0;
    h.on_sample     = [&] {  // while the first thread is inside the session
        std::thread([&] {
            mtp_step step{};
            n += mtp_settle(s) == MTP_BUSY ? 1 : 0;
            n += mtp_truncate(s, 0) == MTP_BUSY ? 1 : 0;
            n += next(s, 1, 0, rule_of(3, 0), step) == MTP_BUSY ? 1 : 0;
        }).join();
    };
    g.run(40);
    CHECK(n == 3 * h.n_samples);
    CHECK(h.n_samples == 34);
    CHECK(h.faults() == "");
    mtp_session_close(s, 1);
}
