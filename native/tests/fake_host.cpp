#include "fake_host.hpp"

#include "fake_llama.hpp"

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <stdexcept>

namespace fake {

host * current = nullptr;

context & of(void * ctx) {
    CHECK(ctx == &current->target || ctx == &current->draft);
    return *static_cast<context *>(ctx);
}

bool is_target(const context & c) {
    return &c == &current->target;
}

namespace {

int32_t next_token(const std::vector<int32_t> & text, size_t n, bool poisoned) {
    uint32_t h = poisoned ? 77u : 1u;
    for (size_t i = 0; i < n; ++i) {
        h = (h ^ static_cast<uint32_t>(text[i])) * 2654435761u;
        h ^= h >> 15;
    }
    return static_cast<int32_t>(h % n_vocab);
}

void synchronize(void *) {}

int32_t proposal(const context & c) {
    const int32_t pos = current->opt.shares_kv && !is_target(c) ? current->target.end() + 1 + c.n_own : c.end();
    const int32_t t   = pos < static_cast<int32_t>(current->truth.size()) ? current->truth[pos] : 0;
    const bool    bad = pos < static_cast<int32_t>(current->wrong.size()) && current->wrong[pos];
    const int32_t token = bad ? (t + 1) % n_vocab : t;
    const auto &  ids   = current->vocabulary.stand_ins;
    return ids.empty() || is_target(c) ? token : ids[token];
}

float * get_logits_ith(void * ctx, int32_t i) {
    static std::vector<float> logits;
    context &                 c = of(ctx);
    CHECK(i >= 0 && i < static_cast<int32_t>(c.outputs.size()) && c.outputs[i]);
    if (current->fails("get_logits_ith")) {
        return nullptr;
    }
    logits.assign(n_vocab, 0.0f);
    const bool certain    = !is_target(c) && c.end() % 2 == 0;
    logits[proposal(c)] = certain ? 20.0f : 0.5f;
    if (current->on_logits) {
        current->on_logits(logits);
    }
    return logits.data();
}

int32_t sampler_sample(void * sampler, void * ctx, int32_t i) {
    context & c = of(ctx);
    CHECK(sampler != nullptr && is_target(c));
    CHECK(i >= 0 && i < static_cast<int32_t>(c.outputs.size()) && c.outputs[i]);
    if (current->fails("sampler_sample")) {
        throw std::runtime_error("sampler");
    }
    ++current->n_samples;
    if (current->on_sample) {
        current->on_sample();
    }
    return next_token(c.tokens, c.batch_pos[i] + 1, c.poisoned);
}

chain_params chain_default_params() {
    return { false };
}

void * chain_init(chain_params) {
    if (current->fails("chain_init")) {
        return nullptr;
    }
    ++current->n_chains_alive;
    return new int(0);
}

void chain_add(void *, void *) {}

void * init_greedy() {
    static int greedy;
    return current->fails("init_greedy") ? nullptr : &greedy;
}

void sampler_free(void * chain) {
    CHECK(current->draft.sampler != chain);  // freed while the context still uses it
    --current->n_chains_alive;
    delete static_cast<int *>(chain);
}

bool set_sampler(void * ctx, int32_t seq, void * chain) {
    CHECK(seq == 0);
    const bool ok       = current->opt.device_picks && !current->fails("set_sampler");
    of(ctx).sampler = ok ? chain : nullptr;
    return ok;
}

int32_t get_sampled_token_ith(void * ctx, int32_t i) {
    context & c = of(ctx);
    CHECK(c.sampler != nullptr && i >= 0 && i < static_cast<int32_t>(c.outputs.size()) && c.outputs[i]);
    return current->fails("get_sampled_token_ith") ? -1 : proposal(c);
}

void set_embeddings_nextn(void * ctx, bool value, bool masked) {
    context & c = of(ctx);
    CHECK(value || is_target(c));
    CHECK(masked == (!is_target(c) && (current->opt.gathers || current->opt.all_outputs)));
    c.keeps_rows = value;
}

float * get_embeddings_nextn(void * ctx) {
    CHECK(of(ctx).keeps_rows);
    return current->fails("get_embeddings_nextn") ? nullptr : of(ctx).rows.data();
}

float * get_embeddings_nextn_ith(void * ctx, int32_t i) {
    context & c = of(ctx);
    CHECK(!is_target(c) && i >= 0 && i < static_cast<int32_t>(c.outputs.size()) && c.outputs[i]);
    if (current->fails("get_embeddings_nextn_ith")) {
        return nullptr;
    }
    int32_t row = i;
    if (current->opt.gathers || current->opt.all_outputs) {
        row = static_cast<int32_t>(std::count(c.outputs.begin(), c.outputs.begin() + i, true));
    }
    return &c.rows[static_cast<size_t>(row) * n_embd];
}

void set_nextn_layer_offset(void * ctx, int32_t offset) {
    CHECK(!is_target(of(ctx)) && current->opt.n_heads > 1);
    CHECK(offset >= 0 && offset < current->opt.n_heads);
    of(ctx).head = offset;
}

// A vocabulary is a table of words here.
using words = std::vector<std::string>;

int32_t vocab_n_tokens(const void * vocab) {
    return static_cast<int32_t>(static_cast<const words *>(vocab)->size());
}

const char * vocab_get_text(const void * vocab, int32_t token) {
    const std::string & word = (*static_cast<const words *>(vocab))[token];
    return word == "?" ? nullptr : word.c_str();
}

int vocab_get_attr(const void * vocab, int32_t token) {
    const words & all = *static_cast<const words *>(vocab);  // the real host, too, looks at what else is there
    return (all[token].size() > 5 ? 1 : 0) + (all.size() == 1 ? 2 : 0);
}

// The host's allocations are its own affair: only the engine's fail in a test.
template <auto function> struct host_call;
template <typename R, typename... A, R (*function)(A...)> struct host_call<function> {
    static R call(A... arguments) {
        const test::memory_for_all enough;
        return function(arguments...);
    }
};

template <auto function> void * address() {
    return reinterpret_cast<void *>(&host_call<function>::call);
}

}  // namespace

draft_vocabulary::draft_vocabulary(int32_t n) {
    if (n == 0) {
        return;
    }
    for (int32_t t = 0; t < n_vocab; ++t) {
        stand_ins.push_back(t % n);
    }
    for (int32_t i = 0; i < n; ++i) {
        tokens.push_back((i * 5 + 3) % n_vocab);  // 5 and the prime 97: no token twice
        stand_ins[tokens.back()] = i;
    }
}

host::host(const options & o) : opt(o), vocabulary(o.n_draft_vocab) {
    CHECK(current == nullptr);
    current = this;
}

host::~host() {
    current = nullptr;
}

bool host::fails(const char * name) {
    auto it = fail_in.find(name);
    if (it == fail_in.end() || --it->second > 0) {
        return false;
    }
    fail_in.erase(it);
    if (throws) {
        throw std::runtime_error(name);
    }
    return true;
}

std::string host::faults() const {
    std::string text;
    const auto  count = [&](int n, const char * what) {
        text += n == 0 ? "" : std::to_string(n) + what;
    };
    count(n_mispaired, " mispaired rows ");
    count(n_stale_cells, " stale cells ");
    count(n_holes, " holes ");
    return text;
}

std::vector<int32_t> host::plain_text(const std::vector<int32_t> & prompt, int32_t n) {
    std::vector<int32_t> text = prompt;
    while (static_cast<int32_t>(text.size()) < n) {
        text.push_back(next_token(text, text.size(), false));
    }
    return text;
}

std::vector<void *> host::functions() {
    const std::map<std::string, void *> known = {
        { "llama_decode", address<decode>() },
        { "llama_synchronize", address<synchronize>() },
        { "llama_get_memory", address<get_memory>() },
        { "llama_memory_clear", address<memory_clear>() },
        { "llama_memory_seq_rm", address<seq_rm>() },
        { "llama_memory_seq_pos_min", address<seq_pos_min>() },
        { "llama_memory_seq_pos_max", address<seq_pos_max>() },
        { "llama_get_logits_ith", address<get_logits_ith>() },
        { "llama_sampler_sample", address<sampler_sample>() },
        { "llama_sampler_chain_default_params", address<chain_default_params>() },
        { "llama_sampler_chain_init", address<chain_init>() },
        { "llama_sampler_chain_add", address<chain_add>() },
        { "llama_sampler_init_greedy", address<init_greedy>() },
        { "llama_sampler_free", address<sampler_free>() },
        { "llama_set_sampler", address<set_sampler>() },
        { "llama_get_sampled_token_ith", address<get_sampled_token_ith>() },
        { "llama_set_embeddings_nextn", address<set_embeddings_nextn>() },
        { "llama_get_embeddings_nextn", address<get_embeddings_nextn>() },
        { "llama_get_embeddings_nextn_ith", address<get_embeddings_nextn_ith>() },
        { "llama_set_nextn_layer_offset", address<set_nextn_layer_offset>() },
        { "llama_vocab_n_tokens", address<vocab_n_tokens>() },
        { "llama_vocab_get_text", address<vocab_get_text>() },
        { "llama_vocab_get_attr", address<vocab_get_attr>() },
        { "llama_state_seq_get_size_ext", address<state_seq_get_size>() },
        { "llama_state_seq_get_data_ext", address<state_seq_get_data>() },
        { "llama_state_seq_set_data_ext", address<state_seq_set_data>() },
    };
    std::vector<void *> all;
    while (const char * name = mtp_host_function(static_cast<int32_t>(all.size()))) {
        CHECK(known.count(name) == 1);
        all.push_back(known.at(name));
    }
    CHECK(all.size() == known.size());
    return all;
}

mtp_host_layout host::layout() {
    return { sizeof(batch),          offsetof(batch, n_tokens), offsetof(batch, token),  offsetof(batch, embd),
             offsetof(batch, pos),   offsetof(batch, n_seq_id), offsetof(batch, seq_id), offsetof(batch, logits),
             sizeof(chain_params) };
}

mtp_session_params host::params() {
    mtp_session_params p{};
    p.target      = &target;
    p.draft       = opt.draft_context ? &draft : nullptr;
    p.n_vocab     = n_vocab;
    p.n_embd      = n_embd;
    p.n_ctx       = opt.n_ctx;
    p.n_batch     = opt.n_batch;
    p.n_ubatch    = opt.n_ubatch;
    p.n_draft_max = opt.n_draft_max;
    p.n_rs_seq    = opt.checkpoint ? 0 : opt.n_rs_seq;
    p.rollback    = opt.checkpoint  ? MTP_ROLLBACK_CHECKPOINT
                    : opt.recurrent ? MTP_ROLLBACK_SNAPSHOTS
                                    : MTP_ROLLBACK_ATTENTION;
    p.gathers     = opt.gathers ? 1 : 0;
    p.gaps        = opt.gaps ? 1 : 0;
    p.confidence  = opt.confidence ? 1 : 0;
    const float bounds[] = { 0.2f, 0.35f, 0.5f, 0.65f, 0.8f, 0.9f, 0.96f };
    std::copy(std::begin(bounds), std::end(bounds), p.class_bounds);
    p.n_checkpoints = opt.n_checkpoints;
    p.drafting    = opt.shares_kv ? MTP_DRAFTING_SHARED_KV
                    : opt.n_heads > 1 ? MTP_DRAFTING_CHAINED
                                      : MTP_DRAFTING_ONE_HEAD;
    p.n_heads     = opt.n_heads;
    p.all_outputs = opt.all_outputs ? 1 : 0;
    p.prefill_window = opt.prefill_window;
    if (opt.n_draft_vocab > 0) {
        p.n_draft_vocab = opt.n_draft_vocab;
        p.draft_tokens  = vocabulary.tokens.data();
        p.stand_ins     = vocabulary.stand_ins.data();
    }
    return p;
}

mtp_session * host::open() {
    const auto    f = functions();
    const auto    l = layout();
    const auto    p = params();
    mtp_session * s = nullptr;
    char          text[256];
    CHECK(mtp_session_open(f.data(), static_cast<int32_t>(f.size()), &l, &p, &s, text, sizeof text) == MTP_OK);
    session = s;
    return s;
}

void host::decode_only(const std::vector<int32_t> & tokens, int32_t pos) {
    const int32_t          n = static_cast<int32_t>(tokens.size());
    std::vector<int32_t>   token = tokens, position(n), one(n, 1);
    int32_t                zero = 0;
    std::vector<int32_t *> seq(n, &zero);
    std::vector<int8_t>    logits(n, 0);
    for (int32_t i = 0; i < n; ++i) {
        position[i] = pos + i;
    }
    logits[n - 1] = 1;
    CHECK(decode(&target, { n, token.data(), nullptr, position.data(), one.data(), seq.data(), logits.data() }) == 0);
}

void host::eval(mtp_session * session, const std::vector<int32_t> & tokens, int32_t pos) {
    for (size_t i = 0; i < tokens.size(); i += opt.n_batch) {
        const size_t               n = std::min(tokens.size() - i, static_cast<size_t>(opt.n_batch));
        const std::vector<int32_t> part(tokens.begin() + i, tokens.begin() + i + n);
        const int32_t              at = pos + static_cast<int32_t>(i);
        decode_only(part, at);
        CHECK(mtp_capture(session, part.data(), static_cast<int32_t>(n), at) == MTP_OK);
    }
}

}  // namespace fake

