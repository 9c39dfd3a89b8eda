#include "fake_host.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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
float digest(const std::vector<int32_t> & tokens, int32_t last) {
    uint32_t h = 5381u;
    for (int32_t i = 0; i <= last; ++i) {
        h = h * 33u ^ static_cast<uint32_t>(tokens[i]);
    }
    return static_cast<float>(h % 65521u);  // exact in a float
}

float digest(const context & c, int32_t pos) {
    return digest(c.tokens, pos - c.start);
}

// The target as the draft is to see it: its memory, which a rollback to a checkpoint leaves behind for a while.
int32_t target_end() {
    return current->opt.checkpoint ? mtp_n_past(current->session) : current->target.end();
}

const std::vector<int32_t> & target_text() {
    return current->opt.checkpoint ? current->truth : current->target.tokens;
}

void write_row(context & c, float * row, int32_t pos) {
    row[0] = static_cast<float>(pos + 1);
    row[1] = digest(c, pos);
    row[2] = is_target(c) ? 1.0f : 2.0f;
}

// The target's token that a token of the draft context means. What it lacks it was given a stand-in for.
int32_t read_as(int32_t token, int32_t pos) {
    const auto & v = current->vocabulary;
    if (v.tokens.empty()) {
        return token;
    }
    CHECK(token >= 0 && token < current->opt.n_draft_vocab);
    const bool known = pos < static_cast<int32_t>(current->truth.size());
    return known && v.stand_ins[current->truth[pos]] == token ? current->truth[pos] : v.tokens[token];
}

// A row of the draft context: the token of the text at pos with the target's row of the position before; only beyond
// the target's end may it be the head's own proposal with the head's own row. True when it is of the latter kind.
bool check_draft_row(const context & d, int32_t token, const float * embd, int32_t pos) {
    const auto &  text = target_text();
    const int32_t end  = target_end();
    const bool    own  = embd[2] == 2.0f;
    bool          right;
    if (embd[0] == 0 && embd[1] == 0 && embd[2] == 0) {
        current->n_unknown_rows += pos > 0 ? 1 : 0;
        right = pos <= end;
    } else if (own) {
        right = pos > end && embd[0] == static_cast<float>(pos) && embd[1] == digest(d, pos - 1);
    } else {
        right = pos <= end && embd[0] == static_cast<float>(pos) && embd[1] == digest(text, pos - 1);
    }
    if (pos < end) {
        right = right && token == text[pos];
    }
    current->n_mispaired += right ? 0 : 1;
    return own;
}

// The draft memory before a decode: the target's text, and nothing that the head once proposed.
void check_draft_memory(const context & d) {
    const auto & text = target_text();
    for (int32_t p = d.start; p < std::min(d.end(), target_end()); ++p) {
        const int32_t token = d.tokens[p - d.start];
        const bool    stale = d.own[p - d.start] || (token != -1 && token != text[p]);
        current->n_stale_cells += stale ? 1 : 0;
    }
}

// A head's own layer before it reads: every cell of the memory holds what this head made of that token.
void check_layer(context & d, int32_t pos) {
    auto & layer = d.written[d.head];
    bool   whole = d.tokens.empty() || static_cast<int32_t>(layer.size()) >= pos;
    for (int32_t p = d.start; whole && p < d.end(); ++p) {
        whole = layer[p] == d.tokens[p - d.start];
    }
    current->n_holes += whole ? 0 : 1;
}

// The head that attends to the target's cells: nothing is written, every row stands at the target's end.
int32_t decode_shared(context & d, batch b) {
    const context & t = current->target;
    CHECK(b.n_tokens == 1 && b.logits[0] != 0);
    CHECK(b.pos[0] == t.end());
    const float * embd = b.embd;
    const bool    own  = embd[2] == 2.0f;
    if (own) {
        current->n_mispaired += embd[0] == static_cast<float>(t.end() + 1) ? 0 : 1;
        ++d.n_own;
    } else {
        const bool known = embd[0] != 0 || embd[1] != 0;
        current->n_unknown_rows += known ? 0 : 1;
        const bool right = embd[0] == static_cast<float>(t.end()) && embd[1] == digest(t, t.end() - 1);
        current->n_mispaired += known && !right ? 1 : 0;
        d.n_own = 0;
    }
    d.outputs.assign(1, true);
    d.batch_pos.assign(1, b.pos[0]);
    d.rows.assign(n_embd, 0.0f);
    d.rows[0] = static_cast<float>(t.end() + 1);
    d.rows[2] = 2.0f;
    ++d.n_decodes;
    ++d.n_rows;
    return 0;
}

int32_t decode(void * ctx, batch b) {
    context & c = of(ctx);
    if (current->fails(is_target(c) ? "decode target" : "decode draft")) {
        return -3;
    }
    const bool late = current->fails(is_target(c) ? "compute target" : "compute draft");  // rows stay in the memory
    if (!is_target(c)) {
        current->draft_positions.insert(current->draft_positions.end(), b.pos, b.pos + b.n_tokens);
    }
    if (!is_target(c) && current->opt.shares_kv) {
        return decode_shared(c, b);
    }
    if (!is_target(c)) {
        check_draft_memory(c);
    }
    CHECK(b.n_tokens > 0 && b.n_tokens <= current->opt.n_batch);
    CHECK((b.embd != nullptr) == !is_target(c));
    if (c.end() + b.n_tokens > current->opt.n_ctx) {
        return 1;
    }
    const bool two_parts = is_target(c) && current->opt.checkpoint;
    if (two_parts) {
        // The real host goes on where the shorter part ends, and the other part is garbage from there.
        c.poisoned = c.poisoned || c.state != c.tokens;
    }
    c.outputs.assign(b.n_tokens, false);
    c.batch_pos.assign(b.pos, b.pos + b.n_tokens);
    c.rows.assign(static_cast<size_t>(b.n_tokens) * n_embd, 0.0f);
    int32_t n_outputs = 0, row = 0;
    for (int32_t i = 0; i < b.n_tokens; ++i) {
        CHECK(b.n_seq_id[i] == 1 && b.seq_id[i][0] == 0);
        const int32_t token = is_target(c) ? b.token[i] : read_as(b.token[i], b.pos[i]);
        CHECK(token >= 0 && token < n_vocab);
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
        if (!is_target(c) && current->opt.n_heads > 1) {
            c.written.resize(current->opt.n_heads);
            if (i == 0) {
                check_layer(c, b.pos[0]);
            }
            auto & layer = c.written[c.head];
            layer.resize(std::max<size_t>(layer.size(), b.pos[i] + 1), -1);
            layer[b.pos[i]] = token;
        }
        const bool own =
            !is_target(c) && check_draft_row(c, token, b.embd + static_cast<size_t>(i) * n_embd, b.pos[i]);
        c.tokens.push_back(token);
        c.own.push_back(own);
        if (two_parts) {
            c.state.push_back(token);
        }
        c.outputs[i] = b.logits[i] != 0;
        n_outputs += c.outputs[i] ? 1 : 0;
        // A gathering graph publishes hidden rows of outputs only, from row 0.
        const bool masked = !is_target(c) && (current->opt.gathers || current->opt.all_outputs);
        if (!masked || c.outputs[i]) {
            write_row(c, &c.rows[static_cast<size_t>(masked ? row++ : i) * n_embd], b.pos[i]);
        }
    }
    const int32_t draft_outputs = current->opt.all_outputs ? b.n_tokens : 1;
    CHECK(current->opt.all_outputs ? is_target(c) || n_outputs == b.n_tokens : true);
    CHECK(n_outputs <= (is_target(c) ? 1 + current->opt.n_draft_max : draft_outputs));  // n_outputs_max
    const int32_t tail = 1 + (b.n_tokens - 1) % current->opt.n_ubatch;  // the rows of the last ubatch
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
    CHECK(is_target(c) || !current->opt.shares_kv);  // would wipe the target's cells
    c.tokens.clear();
    c.own.clear();
    c.state.clear();
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
    if (is_target(c) && current->opt.checkpoint && p0 > 0 && p0 < static_cast<int32_t>(c.state.size())) {
        return false;  // the recurrent part, which is asked first
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
    const context & c = of(memory);
    const bool two_parts = is_target(c) && current->opt.checkpoint;
    return (two_parts ? std::min(c.end(), static_cast<int32_t>(c.state.size())) : c.end()) - 1;
}

// The recurrent part as bytes: its tokens behind a mark.
constexpr size_t  word = sizeof(int32_t);
constexpr int32_t mark = 0x5747;

size_t state_seq_get_size(void * ctx, int32_t seq, uint32_t flags) {
    context & c = of(ctx);
    CHECK(seq == 0 && flags == 1 && is_target(c) && current->opt.checkpoint);
    return current->fails("state size") ? 0 : (1 + c.state.size()) * word;
}

size_t state_seq_get_data(void * ctx, uint8_t * data, size_t n, int32_t seq, uint32_t flags) {
    context & c = of(ctx);
    CHECK(seq == 0 && flags == 1 && is_target(c) && n == (1 + c.state.size()) * word);
    if (current->fails("state save")) {
        return 0;
    }
    ++current->n_saves;
    std::memcpy(data, &mark, word);
    std::memcpy(data + word, c.state.data(), c.state.size() * word);
    return n;
}

size_t state_seq_set_data(void * ctx, const uint8_t * data, size_t n, int32_t seq, uint32_t flags) {
    context & c = of(ctx);
    CHECK(seq == 0 && flags == 1 && is_target(c) && std::memcmp(data, &mark, word) == 0);
    c.state.clear();
    if (current->fails("state load")) {
        return 0;
    }
    ++current->n_loads;
    c.state.resize(n / word - 1);
    std::memcpy(c.state.data(), data + word, n - word);
    return n;
}

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

template <typename F> void * address(F * function) {
    return reinterpret_cast<void *>(function);
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
             address(get_embeddings_nextn_ith),
             address(set_nextn_layer_offset),
             address(vocab_n_tokens),
             address(vocab_get_text),
             address(vocab_get_attr),
             address(state_seq_get_size),
             address(state_seq_get_data),
             address(state_seq_set_data) };
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
    p.n_draft_min = opt.n_draft_min;
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
    const auto    a = api();
    const auto    l = layout();
    const auto    p = params();
    mtp_session * s = nullptr;
    char          text[256];
    CHECK(mtp_session_open(&a, &l, &p, &s, text, sizeof text) == MTP_OK);
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
