#include "fake_host.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

namespace fake {

host * current = nullptr;

namespace {

// The host's own struct, declared once more: the layout handshake compares it with the engine's.
struct batch {
    int32_t    n_tokens;
    int32_t *  token;
    float *    embd;
    int32_t *  pos;
    int32_t *  n_seq_id;
    int32_t ** seq_id;
    int8_t *   logits;
};

struct chain_params {
    bool no_perf;
};

int32_t next_token(const std::vector<int32_t> & text, size_t n, bool poisoned) {
    uint32_t h = poisoned ? 77u : 1u;
    for (size_t i = 0; i < n; ++i) {
        h = (h ^ static_cast<uint32_t>(text[i])) * 2654435761u;
        h ^= h >> 15;
    }
    return static_cast<int32_t>(h % n_vocab);
}

context & of(void * ctx) {
    CHECK(ctx == &current->target || ctx == &current->draft);
    return *static_cast<context *>(ctx);
}

bool is_target(const context & c) {
    return &c == &current->target;
}

// What a hidden row knows: its position, everything that was read up to there, and who made it.
float digest(const context & c, int32_t pos) {
    uint32_t h = 5381u;
    for (int32_t i = 0; i <= pos - c.start; ++i) {
        h = h * 33u ^ static_cast<uint32_t>(c.tokens[i]);
    }
    return static_cast<float>(h % 65521u);  // exact in a float
}

void write_row(context & c, float * row, int32_t pos) {
    row[0] = static_cast<float>(pos + 1);
    row[1] = digest(c, pos);
    row[2] = is_target(c) ? 1.0f : 2.0f;
}

// A row of the draft context: the token of the text at pos with the target's row of the position before; only beyond
// the target's end may it be the head's own proposal with the head's own row. True when it is of the latter kind.
bool check_draft_row(const context & d, int32_t token, const float * embd, int32_t pos) {
    const context & t   = current->target;
    const bool      own = embd[2] == 2.0f;
    bool            right;
    if (embd[0] == 0 && embd[1] == 0 && embd[2] == 0) {
        current->n_unknown_rows += pos > 0 ? 1 : 0;
        right = pos <= t.end();
    } else if (own) {
        right = pos > t.end() && embd[0] == static_cast<float>(pos) && embd[1] == digest(d, pos - 1);
    } else {
        right = pos <= t.end() && embd[0] == static_cast<float>(pos) && embd[1] == digest(t, pos - 1);
    }
    if (pos < t.end()) {
        right = right && token == t.tokens[pos];
    }
    current->n_mispaired += right ? 0 : 1;
    return own;
}

// The draft memory before a decode: the target's text, and nothing that the head once proposed.
void check_draft_memory(const context & d) {
    const context & t = current->target;
    for (int32_t p = d.start; p < std::min(d.end(), t.end()); ++p) {
        const int32_t token = d.tokens[p - d.start];
        const bool    stale = d.own[p - d.start] || (token != -1 && token != t.tokens[p]);
        current->n_stale_cells += stale ? 1 : 0;
    }
}

int32_t decode(void * ctx, batch b) {
    context & c = of(ctx);
    if (current->fails(is_target(c) ? "decode target" : "decode draft")) {
        return -3;
    }
    const bool late = current->fails(is_target(c) ? "compute target" : "compute draft");  // rows stay in the memory
    if (!is_target(c)) {
        check_draft_memory(c);
    }
    CHECK(b.n_tokens > 0 && b.n_tokens <= current->opt.n_batch);
    CHECK((b.embd != nullptr) == !is_target(c));
    if (c.end() + b.n_tokens > current->opt.n_ctx) {
        return 1;
    }
    c.outputs.assign(b.n_tokens, false);
    c.batch_pos.assign(b.pos, b.pos + b.n_tokens);
    c.rows.assign(static_cast<size_t>(b.n_tokens) * n_embd, 0.0f);
    int32_t n_outputs = 0, row = 0;
    for (int32_t i = 0; i < b.n_tokens; ++i) {
        CHECK(b.n_seq_id[i] == 1 && b.seq_id[i][0] == 0);
        CHECK(b.token[i] >= 0 && b.token[i] < n_vocab);
        if (c.tokens.empty()) {
            c.start = b.pos[i];
            CHECK(!is_target(c) || c.start == 0);
        } else if (current->opt.gaps && !is_target(c)) {
            CHECK(b.pos[i] >= c.end());  // M-RoPE: may jump
            c.tokens.resize(b.pos[i] - c.start, -1);
            c.own.resize(b.pos[i] - c.start, false);
        }
        if (b.pos[i] != c.end()) {
            CHECK(i == 0 && current->lenient);  // llama-batch.cpp: consecutive, else the batch is refused
            return -1;
        }
        const bool own =
            !is_target(c) && check_draft_row(c, b.token[i], b.embd + static_cast<size_t>(i) * n_embd, b.pos[i]);
        c.tokens.push_back(b.token[i]);
        c.own.push_back(own);
        c.outputs[i] = b.logits[i] != 0;
        n_outputs += c.outputs[i] ? 1 : 0;
        // A gathering graph publishes hidden rows of outputs only, from row 0.
        const bool masked = !is_target(c) && current->opt.gathers;
        if (!masked || c.outputs[i]) {
            write_row(c, &c.rows[static_cast<size_t>(masked ? row++ : i) * n_embd], b.pos[i]);
        }
    }
    CHECK(n_outputs <= (is_target(c) ? 1 + current->opt.n_draft_max : 1));  // llama-context.cpp: n_outputs_max
    const int32_t tail = b.n_tokens <= current->opt.n_ubatch ? b.n_tokens : 1 + current->opt.n_rs_seq;
    c.undo             = std::min(current->opt.n_rs_seq, tail - 1);
    c.spent            = false;
    ++c.n_decodes;
    c.n_rows += b.n_tokens;
    return late ? -3 : 0;
}

void synchronize(void *) {}

void * get_memory(const void * ctx) {
    return current->fails("get_memory") ? nullptr : const_cast<void *>(ctx);
}

void memory_clear(void * memory, bool) {
    context & c = of(memory);
    c.tokens.clear();
    c.own.clear();
    c.start    = 0;
    c.poisoned = false;
    c.undo     = 0;
    c.spent    = false;
}

bool seq_rm(void * memory, int32_t seq, int32_t p0, int32_t p1) {
    context & c = of(memory);
    CHECK(seq == 0 && p1 == -1);
    ++c.n_seq_rm;
    if (current->fails(is_target(c) ? "seq_rm target" : "seq_rm draft")) {
        return false;
    }
    const int32_t keep = std::max(0, p0 - c.start);
    if (keep >= static_cast<int32_t>(c.tokens.size())) {
        return true;
    }
    if (is_target(c) && current->opt.recurrent && p0 > 0) {
        const int32_t back = c.end() - p0;
        if (back > current->opt.n_rs_seq || c.spent) {
            return false;
        }
        c.poisoned = c.poisoned || back > c.undo;  // true, with stale content
        c.undo     = 0;
        c.spent    = true;
    }
    c.tokens.resize(keep);
    c.own.resize(keep);
    if (keep == 0) {
        c.start = 0;
    }
    return true;
}

int32_t seq_pos_max(void * memory, int32_t) {
    return of(memory).end() - 1;
}

int32_t proposal(const context & c) {
    const int32_t pos = c.end();
    const int32_t t   = pos < static_cast<int32_t>(current->truth.size()) ? current->truth[pos] : 0;
    const bool    bad = pos < static_cast<int32_t>(current->wrong.size()) && current->wrong[pos];
    return bad ? (t + 1) % n_vocab : t;
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
    CHECK(value && masked == (!is_target(of(ctx)) && current->opt.gathers));
}

float * get_embeddings_nextn(void * ctx) {
    return current->fails("get_embeddings_nextn") ? nullptr : of(ctx).rows.data();
}

float * get_embeddings_nextn_ith(void * ctx, int32_t i) {
    context & c = of(ctx);
    CHECK(!is_target(c) && i >= 0 && i < static_cast<int32_t>(c.outputs.size()) && c.outputs[i]);
    if (current->fails("get_embeddings_nextn_ith")) {
        return nullptr;
    }
    int32_t row = i;
    if (current->opt.gathers) {
        row = static_cast<int32_t>(std::count(c.outputs.begin(), c.outputs.begin() + i, true));
    }
    return &c.rows[static_cast<size_t>(row) * n_embd];
}

template <typename F> void * address(F * function) {
    return reinterpret_cast<void *>(function);
}

}  // namespace

host::host(const options & o) : opt(o) {
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

std::vector<int32_t> host::plain_text(const std::vector<int32_t> & prompt, int32_t n) {
    std::vector<int32_t> text = prompt;
    while (static_cast<int32_t>(text.size()) < n) {
        text.push_back(next_token(text, text.size(), false));
    }
    return text;
}

mtp_host_api host::api() {
    return { address(decode),
             address(synchronize),
             address(get_memory),
             address(memory_clear),
             address(seq_rm),
             address(seq_pos_max),
             address(get_logits_ith),
             address(sampler_sample),
             address(chain_default_params),
             address(chain_init),
             address(chain_add),
             address(init_greedy),
             address(sampler_free),
             address(set_sampler),
             address(get_sampled_token_ith),
             address(set_embeddings_nextn),
             address(get_embeddings_nextn),
             address(get_embeddings_nextn_ith) };
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
    p.n_rs_seq    = opt.n_rs_seq;
    p.rollback    = opt.recurrent ? MTP_ROLLBACK_SNAPSHOTS : MTP_ROLLBACK_ATTENTION;
    p.gathers     = opt.gathers ? 1 : 0;
    p.gaps        = opt.gaps ? 1 : 0;
    p.confidence  = opt.confidence ? 1 : 0;
    p.n_draft_min = opt.n_draft_min;
    return p;
}

mtp_session * host::open() {
    const auto    a = api();
    const auto    l = layout();
    const auto    p = params();
    mtp_session * s = nullptr;
    char          text[256];
    CHECK(mtp_session_open(&a, &l, &p, &s, text, sizeof text) == MTP_OK);
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
