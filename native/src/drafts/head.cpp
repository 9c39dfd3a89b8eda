#include "head.hpp"

#include <algorithm>
#include <cstring>

namespace mtp {

namespace {

std::unique_ptr<steps> steps_of(const mtp_session_params & p) {
    switch (p.drafting) {
        case MTP_DRAFTING_CHAINED: return std::make_unique<chained_heads>(std::max(1, std::min(p.n_heads, p.n_draft_max)));
        case MTP_DRAFTING_SHARED_KV: return std::make_unique<shared_kv>();
        default: return std::make_unique<one_head>();
    }
}

}  // namespace

// --- the three ways to go on -------------------------------------------------------------------------------------------

bool one_head::add(head & h, int32_t token, int32_t pos, int32_t i) const {
    h.batch_.clear();
    h.push(token, pos + i, true, h.hidden_.data());
    return true;
}

bool shared_kv::add(head & h, int32_t token, int32_t pos, int32_t) const {
    h.batch_.clear();
    h.push(token, pos, true, h.hidden_.data());
    return true;
}

void chained_heads::first(head & h) const {
    h.api_.set_nextn_layer_offset(h.params_.draft, 0);
}

bool chained_heads::add(head & h, int32_t token, int32_t pos, int32_t i) const {
    if (!h.rewind(h.base_)) {
        return false;
    }
    h.api_.set_nextn_layer_offset(h.params_.draft, i);
    h.batch_.set_output(h.batch_.size() - 1, h.params_.all_outputs != 0);
    h.push(token, pos + i, true, h.hidden_.data());
    return true;
}

// The heads that n_steps did not reach read the first n_true rows of the batch.
bool chained_heads::finish(head & h, int32_t n_steps, int32_t n_true) const {
    if (n_steps >= n_) {
        return true;
    }
    h.batch_.shrink(n_true);
    h.batch_.set_output(n_true - 1, h.params_.all_outputs != 0);
    for (int32_t i = n_steps; i < n_; ++i) {
        if (!h.rewind(h.base_)) {
            return false;
        }
        h.api_.set_nextn_layer_offset(h.params_.draft, i);
        if (!h.decode()) {
            return false;
        }
    }
    return true;
}

// --- what all of them share --------------------------------------------------------------------------------------------

head::head(const host_api & api, const mtp_session_params & params, int32_t end)
    : api_(api), params_(params), memory_(api.get_memory(params.draft)), steps_(steps_of(params)), pick_(api, params_),
      queue_(params.n_batch + window(), params.n_embd), batch_(params.n_batch, params.n_embd), vocabulary_(params),
      hidden_(params.n_embd) {
    if (memory_ == nullptr) {
        throw failure(MTP_HOST, "the draft context has no memory");
    }
    api_.set_embeddings_nextn(params_.draft, true, params_.gathers != 0 || params_.all_outputs != 0);
    restart(end);
    pick_.attach();  // last: a constructor that fails leaves no sampler on the context
}

// Most waiting rows that are read; 0: all. What rounds leave behind is no prompt, and has to fit.
int32_t head::window() const {
    const bool none = !steps_->owns_memory() || params_.prefill_window == 0;
    return none ? 0 : std::max(params_.prefill_window, params_.n_draft_max + 1);
}

void head::begin(const int32_t * tokens, int32_t n) {
    failures_ = 0;
    if (!alive()) {
        error_.clear();
        restart(n);
        return;
    }
    const int32_t start = queue_.start();
    if (start < n) {
        const int32_t same = start + queue_.common(tokens + start, n - start, start);
        if (same < n) {  // what the queue holds beyond n may be evaluated again
            queue_.cut(same);
        }
    }
}

void head::restart(int32_t end) {
    if (steps_->owns_memory()) {
        api_.memory_clear(memory_, false);
    }
    queue_.restart(end);
    memory_end_ = end;
}

void head::process(const int32_t * tokens, const float * rows, int32_t n, int32_t pos) {
    if (!alive()) {
        return;
    }
    if (rows == nullptr) {
        restart(pos + n);
        return;
    }
    if (pos > queue_.end() || pos < queue_.start()) {
        restart_at_gap(pos);
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

void head::restart_at_gap(int32_t pos) {
    if (params_.gaps != 0 && pos > queue_.end()) {
        // The positions in between belong to an image: the memory may jump, the history may not pretend.
        catch_up();
        drop_unverified();  // catch_up has nothing to do when no row waits
        queue_.restart(pos);
    } else {
        ++n_restarts_;
        restart(pos);
    }
}

void head::truncate(int32_t end) {
    queue_.cut(needs_token_before(end) && end >= queue_.start() ? end + 1 : end);
}

const float * head::row(int32_t end) const {
    return queue_.end() == end ? queue_.hidden(end) : nullptr;
}

// Drops all but the last n waiting rows, and the memory, which would have a hole.
void head::keep_waiting(int32_t n) {
    if (queue_.waiting() <= n) {
        return;
    }
    queue_.skip(queue_.end() - n);
    if (steps_->owns_memory()) {
        api_.memory_clear(memory_, false);
    }
    memory_end_ = queue_.start();
}

// `most` narrows the window; 0 leaves it.
void head::keep_window(int32_t most) {
    if (window() > 0) {
        keep_waiting(most > 0 ? std::min(window(), std::max(most, params_.n_draft_max + 1)) : window());
    }
}

// Removes what the memory holds beyond the true rows.
void head::drop_unverified() {
    if (memory_end_ > queue_.decoded()) {
        rewind(queue_.decoded());
    }
}

// False: the host refused, and the memory starts anew at the queue's end.
bool head::rewind(int32_t pos) {
    if (steps_->owns_memory()) {
        stopwatch watch(rollback_ns_);
        if (!api_.memory_seq_rm(memory_, 0, pos, -1)) {
            restart(queue_.end());
            return false;
        }
    }
    memory_end_ = pos;
    return true;
}

size_t head::state_size() {
    keep_window();
    drop_unverified();
    return queue_.state_size();
}

void head::state_get(uint8_t * data, size_t n) const {
    require(n == queue_.state_size(), "the state has another size by now");
    queue_.state_get(data);
}

void head::state_set(const uint8_t * data) {
    queue_.state_set(data);
    memory_end_ = queue_.decoded();
}

bool head::decode() {
    stopwatch watch(ns_);
    ++n_decodes_;
    memory_end_ += batch_.size();  // also where the host throws: rows may be in
    if (const int32_t code = api_.decode(params_.draft, batch_.view())) {
        ++n_failures_;
        ++failures_;
        restart(queue_.end());
        if (failures_ >= max_failures) {
            error_ = "the draft context failed " + std::to_string(failures_) + " times, with llama_decode returning " +
                     std::to_string(code) + "; drafting rests until the next generation";
        }
        return false;
    }
    api_.synchronize(params_.draft);
    return true;
}

void head::push(int32_t token, int32_t pos, bool output, const float * hidden) {
    batch_.push(vocabulary_.to_draft(token), pos, output, hidden);
}

// Starts a batch with the rows that wait for positions below end, behind the true rows of the memory.
void head::load_waiting(int32_t end) {
    batch_.clear();
    if (!steps_->owns_memory()) {
        queue_.mark_decoded(queue_.end());  // the target's cells are this head's
        memory_end_ = queue_.end();
        return;
    }
    drop_unverified();
    if (!steps_->extends_batch()) {
        batch_.borrow(queue_.hidden(queue_.decoded()));
    }
    for (int32_t p = queue_.decoded(); p < end; ++p) {
        push(queue_.token(p), p, params_.all_outputs != 0, queue_.hidden(p));
    }
    base_ = memory_end_ = queue_.decoded();
    steps_->first(*this);
}

// The waiting rows alone, without an output: a prompt longer than n_batch, or a long stretch at depth 0.
void head::catch_up() {
    keep_window();
    while (queue_.waiting() > 0) {
        const int32_t end = std::min(queue_.end(), queue_.decoded() + params_.n_batch);
        load_waiting(end);
        if (batch_.size() > 0 && decode()) {
            steps_->finish(*this, 1, batch_.size());
        }
        queue_.mark_decoded(std::max(end, queue_.decoded()));  // after a failure nothing waits
    }
}

picks head::draft(int32_t last, int32_t pos, int32_t depth, const mtp_rule & rule) {
    picks drafts;
    float chance = 1.0f;  // that all of them are right
    depth        = std::min(depth, steps_->max_depth());
    if (!alive() || depth <= 0 || pos != queue_.end()) {
        return drafts;
    }
    keep_window(rule.window);
    if (queue_.waiting() + steps_->n_heads() > params_.n_batch) {
        catch_up();
        if (!alive()) {
            return drafts;
        }
    }

    // Catch-up and first step in one decode; only its last row is an output.
    load_waiting(pos);
    push(last, pos, true, queue_.hidden(pos));
    const int32_t n_true = batch_.size();
    if (!decode()) {
        return drafts;
    }

    int32_t n_steps = 1;
    for (;; ++n_steps) {
        const int32_t row  = batch_.size() - 1;
        const pick    next = read_pick(row);
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
        if (!steps_->add(*this, token, pos, n_steps) || !decode()) {
            return drafts;
        }
    }
    if (steps_->finish(*this, n_steps, n_true)) {
        queue_.push_decoded(last);  // only now: what a round that fails has written is removed before the next decode
    }
    return drafts;
}

pick head::read_pick(int32_t row) {
    stopwatch watch(ns_);
    return pick_(row, vocabulary_.n_draft());
}

// The head's own row for the next step, copied out of a buffer that the next decode overwrites.
bool head::read_hidden(int32_t row) {
    stopwatch     watch(ns_);
    const float * hidden = api_.get_embeddings_nextn_ith(params_.draft, row);
    if (hidden != nullptr) {
        std::memcpy(hidden_.data(), hidden, sizeof(float) * params_.n_embd);
    }
    return hidden != nullptr;
}

void head::count(mtp_counters & out) const {
    out.n_draft_decodes  = n_decodes_;
    out.n_draft_restarts = n_restarts_;
    out.n_draft_failures = n_failures_;
    out.draft_ns         = ns_;
    out.rollback_ns += rollback_ns_;
    out.n_row_bytes = queue_.n_bytes();
}

}  // namespace mtp
