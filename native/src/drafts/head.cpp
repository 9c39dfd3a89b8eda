#include "head.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace mtp {

namespace {

constexpr int     n_top   = 10;  // as llama.cpp: p is a softmax over the ten best, not over the vocabulary
constexpr int32_t n_block = 64;  // logits that are looked at together

// Whether any of the logits is above the bar; written so that a compiler makes it vector code.
bool any_above(const float * x, int32_t n, float bar) {
    int32_t found = 0;
    for (int32_t i = 0; i < n; ++i) {
        found |= x[i] > bar ? 1 : 0;
    }
    return found != 0;
}

}  // namespace

drafter::drafter(const host_api & api, const mtp_session_params & params)
    : api_(api), params_(params), memory_(api.get_memory(params.draft)), queue_(params.n_batch + window(), params.n_embd),
      batch_(params.n_batch, params.n_embd), vocabulary_(params), hidden_(params.n_embd), chain_(nullptr, api.sampler_free),
      pick_(&drafter::pick_host), add_step_(&drafter::grow), n_heads_(1) {
    if (memory_ == nullptr) {
        throw failure(MTP_HOST, "the draft context has no memory");
    }
    if (chained()) {
        add_step_ = &drafter::chain;
        n_heads_  = std::max(1, std::min(params.n_heads, params.n_draft_max));
    } else if (shares_kv()) {
        add_step_ = &drafter::stay;
    }
    api_.set_embeddings_nextn(params_.draft, true, params_.gathers != 0 || params_.all_outputs != 0);
    if (params_.confidence == 0 && params_.all_outputs == 0) {  // a device chain takes one output at a time
        chain_.reset(api_.chain_init(api_.chain_default_params()));
        void * greedy = chain_ ? api_.init_greedy() : nullptr;
        if (greedy != nullptr) {
            api_.chain_add(chain_.get(), greedy);
            if (api_.set_sampler(params_.draft, 0, chain_.get())) {
                pick_ = &drafter::pick_device;
            }
        }
    }
}

void drafter::detach() {
    if (chain_) {
        api_.set_sampler(params_.draft, 0, nullptr);
    }
}

void drafter::restart(int32_t pos) {
    if (!shares_kv()) {
        api_.memory_clear(memory_, false);
    }
    queue_.restart(pos);
    memory_end_ = pos;
}

void drafter::capture(const int32_t * tokens, const float * rows, int32_t n, int32_t pos) {
    if (!alive()) {
        return;
    }
    if (pos > queue_.end() || pos < queue_.start()) {
        if (params_.gaps != 0 && pos > queue_.end()) {
            // The positions in between belong to an image: the memory may jump, the history may not pretend.
            catch_up();
            drop_unverified();  // catch_up has nothing to do when no row waits
            queue_.restart(pos);
        } else {
            ++n_restarts;
            restart(pos);
        }
    }
    if (queue_.waiting() + n > queue_.capacity()) {
        if (window() > 0) {
            keep_waiting(std::max(0, window() - n));  // the rest is beyond the window by the time that anyone reads it
        } else {
            catch_up();
        }
    }
    if (window() > 0 && pos > 0 && pos == queue_.start() && pos == queue_.end() && !queue_.knows_first_row()) {
        // The text may begin anywhere: better one token later than with a token that has no row.
        drop_unverified();
        queue_.restart(pos + 1);
        queue_.set_row(rows);
        memory_end_ = pos + 1;
        ++tokens, rows += params_.n_embd, --n, ++pos;
    }
    queue_.append(tokens, rows, n, pos);
}

void drafter::truncate(int32_t pos) {
    queue_.cut(lacks_row(pos) && pos >= queue_.start() ? pos + 1 : pos);
}

// Drops all but the last n waiting rows, and the memory, which would have a hole.
void drafter::keep_waiting(int32_t n) {
    if (queue_.waiting() <= n) {
        return;
    }
    queue_.skip(queue_.end() - n);
    if (!shares_kv()) {
        api_.memory_clear(memory_, false);
    }
    memory_end_ = queue_.start();
}

// `most` narrows the window; 0 leaves it.
void drafter::keep_window(int32_t most) {
    if (window() > 0) {
        keep_waiting(most > 0 ? std::min(window(), std::max(most, params_.n_draft_max + 1)) : window());
    }
}

void drafter::align(const int32_t * tokens, int32_t n) {
    const int32_t start = queue_.start();
    if (start >= n) {
        return;
    }
    queue_.cut(start + queue_.common(tokens + start, n - start, start));
}

// Removes what the memory holds beyond the true rows.
void drafter::drop_unverified() {
    if (memory_end_ > queue_.decoded()) {
        rewind(queue_.decoded());
    }
}

// False: the host refused, and the memory starts anew at the queue's end.
bool drafter::rewind(int32_t pos) {
    if (!shares_kv()) {
        stopwatch watch(rollback_ns);
        if (!api_.memory_seq_rm(memory_, 0, pos, -1)) {
            restart(queue_.end());
            return false;
        }
    }
    memory_end_ = pos;
    return true;
}

size_t drafter::state_size() {
    keep_window();
    drop_unverified();
    return queue_.state_size();
}

void drafter::state_set(const uint8_t * data) {
    queue_.state_set(data);
    memory_end_ = queue_.decoded();
}

bool drafter::decode() {
    stopwatch watch(ns);
    ++n_decodes;
    if (api_.decode(params_.draft, batch_.view()) != 0) {
        ++failures_;
        restart(queue_.end());
        return false;
    }
    api_.synchronize(params_.draft);
    memory_end_ += batch_.size();
    return true;
}

void drafter::push(int32_t token, int32_t pos, bool output, const float * hidden) {
    batch_.push(vocabulary_.to_draft(token), pos, output, hidden);
}

// Starts a batch with the rows that wait for positions below end, behind the true rows of the memory.
void drafter::load_waiting(int32_t end) {
    batch_.clear();
    if (shares_kv()) {
        queue_.mark_decoded(queue_.end());  // the target's cells are this head's
        memory_end_ = queue_.end();
        return;
    }
    drop_unverified();
    if (!chained()) {  // a chain adds rows of its own behind them
        batch_.borrow(queue_.hidden(queue_.decoded()));
    }
    for (int32_t p = queue_.decoded(); p < end; ++p) {
        push(queue_.token(p), p, params_.all_outputs != 0, queue_.hidden(p));
    }
    base_ = memory_end_ = queue_.decoded();
    if (chained()) {
        api_.set_nextn_layer_offset(params_.draft, 0);
    }
}

// The waiting rows alone, without an output: a prompt longer than n_batch, or a long stretch at depth 0.
void drafter::catch_up() {
    keep_window();
    while (queue_.waiting() > 0) {
        const int32_t end = std::min(queue_.end(), queue_.decoded() + params_.n_batch);
        load_waiting(end);
        if (batch_.size() > 0 && decode()) {
            finish_chain(1, batch_.size());
        }
        queue_.mark_decoded(std::max(end, queue_.decoded()));  // after a failure nothing waits
    }
}

picks drafter::draft(int32_t last, int32_t pos, int32_t depth, const mtp_rule & rule) {
    picks drafts;
    float chance = 1.0f;  // that all of them are right
    if (chained()) {
        depth = std::min(depth, n_heads_);
    }
    if (!alive() || depth <= 0 || pos != queue_.end()) {
        return drafts;
    }
    keep_window(rule.window);
    if (queue_.waiting() + n_heads_ > params_.n_batch) {
        catch_up();
    }

    // Catch-up and first step in one decode; only its last row is an output.
    load_waiting(pos);
    push(last, pos, true, queue_.hidden(pos));
    const int32_t n_true = batch_.size();
    if (!decode()) {
        return drafts;
    }
    queue_.push_decoded(last);

    int32_t n_steps = 1;
    for (;; ++n_steps) {
        const int32_t row  = batch_.size() - 1;
        const pick    next = (this->*pick_)(row);
        if (next.token < 0 || next.token >= vocabulary_.n_draft() || next.p < rule.p_min) {
            break;
        }
        const int32_t token = vocabulary_.to_target(next.token);
        chance *= accept_of(rule, n_steps - 1, next.klass);
        drafts.tokens.push_back(token);
        drafts.classes.push_back(next.klass);
        if (n_steps == depth || chance < rule.go[n_steps] || !read_hidden(row)) {
            break;
        }
        if (!(this->*add_step_)(token, pos, n_steps) || !decode()) {
            return drafts;
        }
    }
    finish_chain(n_steps, n_true);
    return drafts;
}

bool drafter::grow(int32_t token, int32_t pos, int32_t i) {
    batch_.clear();
    push(token, pos + i, true, hidden_.data());
    return true;
}

bool drafter::stay(int32_t token, int32_t pos, int32_t) {
    batch_.clear();
    push(token, pos, true, hidden_.data());
    return true;
}

bool drafter::chain(int32_t token, int32_t pos, int32_t i) {
    if (!rewind(base_)) {
        return false;
    }
    api_.set_nextn_layer_offset(params_.draft, i);
    batch_.set_output(batch_.size() - 1, params_.all_outputs != 0);
    push(token, pos + i, true, hidden_.data());
    return true;
}

// The heads that n_steps did not reach read the first n_true rows of the batch.
void drafter::finish_chain(int32_t n_steps, int32_t n_true) {
    if (n_steps >= n_heads_) {
        return;
    }
    batch_.shrink(n_true);
    batch_.set_output(n_true - 1, params_.all_outputs != 0);
    for (int32_t head = n_steps; head < n_heads_; ++head) {
        if (!rewind(base_)) {
            return;
        }
        api_.set_nextn_layer_offset(params_.draft, head);
        if (!decode()) {
            return;
        }
    }
}

// The head's own row for the next step, copied out of a buffer that the next decode overwrites.
bool drafter::read_hidden(int32_t row) {
    const float * hidden = nullptr;
    {
        stopwatch watch(ns);
        hidden = api_.get_embeddings_nextn_ith(params_.draft, row);
    }
    if (hidden != nullptr) {
        std::memcpy(hidden_.data(), hidden, sizeof(float) * params_.n_embd);
    }
    return hidden != nullptr;
}

drafter::pick drafter::pick_device(int32_t row) {
    stopwatch watch(ns);
    return { api_.get_sampled_token_ith(params_.draft, row), 1.0f, 0 };
}

drafter::pick drafter::pick_host(int32_t row) {
    stopwatch     watch(ns);
    const float * logits = api_.get_logits_ith(params_.draft, row);
    if (logits == nullptr) {
        return { -1, 0.0f, 0 };
    }
    // The ten best by insertion. Most blocks hold none of them and take one look.
    float   best[n_top];
    int32_t best_token = -1;
    int     n          = 0;
    for (int32_t start = 0; start < vocabulary_.n_draft(); start += n_block) {
        const int32_t end = std::min(start + n_block, vocabulary_.n_draft());
        if (n == n_top && !any_above(logits + start, end - start, best[n_top - 1])) {
            continue;
        }
        for (int32_t i = start; i < end; ++i) {
            const float x = logits[i];
            if (n == n_top && !(x > best[n_top - 1])) {
                continue;
            }
            int k = n < n_top ? n++ : n_top - 1;
            for (; k > 0 && x > best[k - 1]; --k) {
                best[k] = best[k - 1];
            }
            best[k] = x;
            if (k == 0) {
                best_token = i;
            }
        }
    }
    float sum = 0.0f;
    for (int k = 0; k < n; ++k) {
        sum += std::exp(best[k] - best[0]);
    }
    return { best_token, 1.0f / sum, class_of(1.0f / sum) };
}

}  // namespace mtp
