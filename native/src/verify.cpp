#include "verify.hpp"

#include <algorithm>
#include <utility>

namespace mtp {

verifier::verifier(const host_api & api, const mtp_session_params & params)
    : api_(api), params_(params), memory_(api.get_memory(params.target)),
      batch_(std::min(2 * params.n_draft_max + 1, params.n_batch), 0),
      replay_max_(std::min(params.n_draft_max, params.n_batch - 1 - params.n_draft_max)),
      copy_(api, params.target, memory_) {
    if (memory_ == nullptr) {
        throw failure(MTP_HOST, "the target context has no memory; MTP needs a model that generates text");
    }
    row_tokens_.reserve(params.n_draft_max + 1);
    if (params_.draft != nullptr) {
        api_.set_embeddings_nextn(params_.target, true, false);
    }
    forget(host_end());
}

// How many positions can be taken back after a decode of n_rows that ends at base + rows.
int32_t verifier::undo_limit(int32_t n_rows) const {
    const int32_t end = base_ + rows();
    switch (params_.rollback) {
        case MTP_ROLLBACK_ATTENTION: return end;
        case MTP_ROLLBACK_CHECKPOINT: return has_copy() ? end - copy_.end() : 0;
        // Snapshots are of the last ubatch. Most memories keep the trailing 1 + n_rs_seq rows in one
        // (llama-batch.cpp split_equal); deepseek4's cuts every n_ubatch rows (split_simple) and would give older ones.
        default: return std::max(0, std::min(params_.n_rs_seq, (n_rows - 1) % params_.n_ubatch));
    }
}

void verifier::close_round() {
    row_tokens_.clear();
    sampled_ = accepted_ = 0;
    rejected_            = false;
    spare_ = spare_right_ = -1;
}

void verifier::keep_rows(bool on) {
    if (on != keeps_rows_ && params_.draft != nullptr) {
        api_.set_embeddings_nextn(params_.target, on, false);
    }
    keeps_rows_ = on;
}

const float * verifier::hidden_rows() {
    if (!keeps_rows_) {
        return nullptr;
    }
    stopwatch     watch(ns);
    const float * rows = api_.get_embeddings_nextn(params_.target);
    return rows != nullptr ? rows + static_cast<size_t>(first_row_) * params_.n_embd : nullptr;
}

void verifier::observe_decode(int32_t n, int32_t pos) {
    forget(pos + n);
    undo_      = undo_limit(n);
    first_row_ = 0;
    live_row_  = n - 1;
}

void verifier::forget(int32_t n_past) {
    close_round();
    copy_.drop();
    replay_.clear();
    behind_   = false;
    base_     = n_past;
    live_row_ = -1;
    undo_     = undo_limit(0);
}

void verifier::clear() {
    api_.memory_clear(memory_, false);
    forget(0);
}

bool verifier::can_truncate(int32_t n_past) const {
    return n_past >= 0 && n_past <= this->n_past() && (n_past == 0 || base_ + rows() - n_past <= undo_);
}

void verifier::truncate(int32_t n_past) {
    if (n_past < 0 || n_past > this->n_past()) {
        throw failure(MTP_INVALID, "cannot truncate to " + std::to_string(n_past) + ": the target ends at " +
                                       std::to_string(this->n_past()));
    }
    if (!can_truncate(n_past)) {
        throw failure(MTP_ROLLBACK, "the recurrent state of position " + std::to_string(n_past) +
                                        " is not kept; clear the context and evaluate the text again");
    }
    const int32_t end  = base_ + rows();
    const bool    live = in_round() && n_past > base_;
    const int32_t row  = live ? first_row_ + n_past - base_ - 1 : (n_past == end ? live_row_ : -1);
    if (n_past == 0) {  // also when it should be empty: a failed decode may have left rows
        clear();
        return;
    }
    if (has_copy()) {
        replay_.insert(replay_.end(), row_tokens_.begin(), row_tokens_.end());
        replay_.resize(n_past - copy_.end());
        behind_ = behind_ || n_past < end;
    } else if (n_past < end && !remove(n_past)) {
        throw failure(MTP_ROLLBACK, "the host refused to remove the text after position " + std::to_string(n_past) +
                                        "; clear the context and evaluate it again");
    }
    const int32_t undo = n_past == end ? undo_ : 0;  // snapshots serve once
    close_round();
    base_     = n_past;
    live_row_ = row;
    undo_     = params_.rollback == MTP_ROLLBACK_SNAPSHOTS ? undo : undo_limit(0);
}

// False where the host refuses.
bool verifier::remove(int32_t pos) {
    stopwatch watch(rollback_ns);
    return api_.memory_seq_rm(memory_, 0, pos, -1);
}

bool verifier::replays_only() const {
    const bool behind = behind_ || kept() < rows();
    return has_copy() && behind && static_cast<int32_t>(replay_.size()) + kept() > replay_max_;
}

int32_t verifier::depth_limit(int32_t pos) const {
    int32_t limit = std::min(params_.n_draft_max, params_.n_ctx - pos - 1);
    if (params_.rollback == MTP_ROLLBACK_SNAPSHOTS) {
        limit = std::min({ limit, params_.n_rs_seq, params_.n_ubatch - 1 });
    }
    return std::max(0, limit);
}

// Takes the memory back to the copy. Where the host fails nothing is known of it any more, and only clearing helps.
void verifier::load_copy() {
    stopwatch watch(ns);
    behind_ = false;
    undo_   = -1;
    if (!copy_.load()) {
        throw failure(MTP_ROLLBACK, "the host refused to load the recurrent state of position " +
                                        std::to_string(copy_.end()) + "; clear the context and evaluate the text again");
    }
    behind_ = true;
    undo_   = undo_limit(0);
}

void verifier::replay() {
    if (!behind_) {
        return;
    }
    live_row_ = -1;
    load_copy();
    if (!replay_.empty()) {
        batch_.clear();
        for (size_t i = 0; i < replay_.size(); ++i) {
            batch_.push(replay_[i], copy_.end() + static_cast<int32_t>(i), i + 1 == replay_.size());
        }
        n_replayed += batch_.size();
        if (const int32_t code = decode()) {
            throw failure(MTP_HOST, "llama_decode returned " + std::to_string(code));
        }
        live_row_ = batch_.size() - 1;
    }
    behind_ = false;
}

// Before the rows of a round: a memory that is behind goes back to the copy; of one that is not a copy is made, if
// there are drafts to take out again. False when the host makes none.
bool verifier::make_ready(bool with_drafts) {
    if (with_drafts && replays_only()) {
        replay();
    }
    if (behind_) {
        load_copy();
        return true;
    }
    replay_.clear();
    copy_.drop();
    undo_ = 0;
    stopwatch watch(ns);
    return !with_drafts || copy_.save(base_);
}

int32_t verifier::decode() {
    stopwatch watch(ns);
    ++n_decodes;
    const int32_t code = api_.decode(params_.target, batch_.view());
    if (code == 0) {
        api_.synchronize(params_.target);
    }
    return code;
}

void verifier::verify(int32_t last, int32_t pos, const int32_t * drafts, int32_t n, int32_t spare) {
    if (!keeps_rows_) {
        throw failure(MTP_INVALID, "hidden rows are switched off; switch them on before a round");
    }
    live_row_ = -1;
    if (has_copies() && !make_ready(n > 0)) {
        n     = 0;
        spare = -1;
    }
    batch_.clear();
    for (const int32_t token : replay_) {
        batch_.push(token, copy_.end() + batch_.size(), false);
    }
    first_row_ = batch_.size();
    n_replayed += first_row_;
    batch_.push(last, pos, true);
    for (int32_t i = 0; i < n; ++i) {
        batch_.push(drafts[i], pos + 1 + i, true);
    }
    // Until we know what the decode left behind.
    const int32_t undo = undo_;
    behind_            = has_copy();
    undo_              = behind_ ? undo : -1;
    if (const int32_t code = decode()) {
        // 1: no room, nothing was decoded. After anything else rows may be there: attention can take them out.
        const bool attention = params_.rollback == MTP_ROLLBACK_ATTENTION;
        if (code == 1 || (attention && (host_end() <= pos || remove(pos)))) {
            undo_ = undo;
        }
        throw failure(MTP_HOST, "llama_decode returned " + std::to_string(code));
    }
    behind_ = false;
    row_tokens_.assign(1, last);
    row_tokens_.insert(row_tokens_.end(), drafts, drafts + n);
    sampled_ = accepted_ = 0;
    rejected_            = false;
    spare_               = spare;
    spare_right_         = -1;
    undo_                = undo_limit(1 + n);
}

int32_t verifier::sample(void * sampler) {
    if (rows_left() <= 0) {
        throw failure(MTP_INVALID, "no verify row is left to sample; verify first");
    }
    int32_t token;
    {
        stopwatch watch(sample_ns);
        token = api_.sampler_sample(sampler, params_.target, first_row_ + sampled_);
    }
    if (!chances_.empty()) {
        token = toss(token);
    }
    live_row_ = first_row_ + sampled_++;  // only now: a chain that throws leaves the row to be asked for again
    if (sampled_ < rows()) {
        rejected_ = token != row_tokens_[sampled_];
        accepted_ += rejected_ ? 0 : 1;
    } else if (spare_ >= 0) {
        spare_right_ = (chances_.empty() ? token == spare_ : heads(sampled_ - 1)) ? 1 : 0;
    }
    return token;
}

void verifier::accept_by_coin(std::vector<float> chances, uint64_t seed) {
    chances_ = std::move(chances);
    coin_    = seed;
}

// The draft where the coin accepts it, and otherwise any other token.
int32_t verifier::toss(int32_t token) {
    if (sampled_ + 1 >= rows()) {
        return token;
    }
    const int32_t draft = row_tokens_[sampled_ + 1];
    if (heads(sampled_)) {
        return draft;
    }
    return token != draft ? token : (token + 1) % params_.n_vocab;
}

bool verifier::heads(int32_t position) {
    coin_ += 0x9e3779b97f4a7c15u;  // splitmix64
    uint64_t x   = coin_;
    x            = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x            = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x            = x ^ (x >> 31);
    const float side = static_cast<float>(x >> 40) / static_cast<float>(1 << 24);  // in [0, 1)
    return side < chances_[std::min<size_t>(position, chances_.size() - 1)];
}

}  // namespace mtp
