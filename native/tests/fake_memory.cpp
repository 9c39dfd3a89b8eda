// The contexts of the fake host: what a decode writes, and what can be taken back.

#include "fake_llama.hpp"

#include <algorithm>
#include <cstring>

namespace fake {

namespace {

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

// Has a recurrent part, with snapshots or without.
bool is_recurrent(const context & c) {
    return is_target(c) && (current->opt.recurrent || current->opt.checkpoint);
}

bool slides(const context & c) {
    return is_target(c) && current->opt.n_swa > 0;
}

// The recurrent part as bytes: its tokens behind a mark.
constexpr size_t  word = sizeof(int32_t);
constexpr int32_t mark = 0x5747;

}  // namespace

void context::clear() {
    tokens.clear();
    own.clear();
    state.clear();
    start = first = undo = 0;
    poisoned = spent = false;
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
    if (is_recurrent(c)) {
        // The real host goes on where the shorter part ends, and the other part is garbage from there.
        c.poisoned = c.poisoned || c.state != c.tokens;
    }
    if (slides(c)) {
        c.poisoned = c.poisoned || c.first > std::max(0, c.end() - current->opt.n_swa);
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
        if (is_recurrent(c)) {
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
    if (slides(c)) {  // the cache of a window has room for one more ubatch
        c.first = std::max(c.first, c.end() - current->opt.n_swa - current->opt.n_ubatch);
    }
    ++c.n_decodes;
    c.n_rows += b.n_tokens;
    return late ? -3 : 0;
}

void * get_memory(const void * ctx) {
    return current->fails("get_memory") ? nullptr : const_cast<void *>(ctx);
}

void memory_clear(void * memory, bool) {
    context & c = of(memory);
    CHECK(is_target(c) || !current->opt.shares_kv);  // would wipe the target's cells
    current->fails("memory_clear");
    c.clear();
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
    const int32_t back = static_cast<int32_t>(c.state.size()) - p0;  // of the recurrent part
    if (is_target(c) && current->opt.recurrent && p0 > 0 && back > 0) {
        if (back > current->opt.n_rs_seq || c.spent) {
            return false;
        }
        c.poisoned = c.poisoned || back > c.undo;  // true, with stale content
        c.undo     = 0;
        c.spent    = true;
        c.state.resize(keep);
    }
    c.tokens.resize(keep);
    c.own.resize(keep);
    if (keep == 0) {
        c.start = 0;
    }
    return true;
}

int32_t seq_pos_min(void * memory, int32_t) {
    const context & c = of(memory);
    return c.tokens.empty() ? -1 : std::max(c.start, c.first);
}

int32_t seq_pos_max(void * memory, int32_t) {
    if (current->fails("seq_pos_max")) {
        return -1;
    }
    const context & c = of(memory);
    return (is_recurrent(c) ? std::min(c.end(), static_cast<int32_t>(c.state.size())) : c.end()) - 1;
}

size_t state_seq_get_size(void * ctx, int32_t seq, uint32_t flags) {
    context & c = of(ctx);
    CHECK(seq == 0 && flags == 1 && is_recurrent(c));
    return current->fails("state size") ? 0 : (1 + c.state.size()) * word;
}

size_t state_seq_get_data(void * ctx, uint8_t * data, size_t n, int32_t seq, uint32_t flags) {
    context & c = of(ctx);
    CHECK(seq == 0 && flags == 1 && is_recurrent(c) && n == (1 + c.state.size()) * word);
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
    CHECK(seq == 0 && flags == 1 && is_recurrent(c) && std::memcmp(data, &mark, word) == 0);
    c.state.clear();
    if (current->fails("state load")) {
        return 0;
    }
    ++current->n_loads;
    c.undo  = 0;  // no snapshots are behind it
    c.spent = true;
    c.state.resize(n / word - 1);
    std::memcpy(c.state.data(), data + word, n - word);
    return n;
}

}  // namespace fake
