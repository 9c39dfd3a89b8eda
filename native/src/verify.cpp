#include "verify.hpp"

#include <algorithm>

namespace mtp {

verifier::verifier(const host_api & api, const mtp_session_params & params)
    : api_(api), params_(params), memory_(api.get_memory(params.target)), batch_(params.n_draft_max + 1, 0) {
    if (memory_ == nullptr) {
        throw failure(MTP_HOST, "the target context has no memory; MTP needs a model that generates text");
    }
    row_tokens_.reserve(params.n_draft_max + 1);
    if (params_.draft != nullptr) {
        api_.set_embeddings_nextn(params_.target, true, false);
    }
}

void verifier::set_undo(int32_t n_rows) {
    if (params_.rollback == MTP_ROLLBACK_ATTENTION) {
        undo_ = base_ + n_rows;
        return;
    }
    // Also for a batch of several ubatches: the host keeps its trailing 1 + n_rs_seq rows in one
    // (llama-batch.cpp split_equal), and n_ubatch exceeds that.
    undo_ = std::min(params_.n_rs_seq, n_rows - 1);
}

void verifier::close_round() {
    row_tokens_.clear();
    sampled_ = accepted_ = 0;
    rejected_            = false;
}

void verifier::observe_decode(int32_t n, int32_t pos) {
    close_round();
    base_                = pos;
    set_undo(n);
    base_ += n;
    live_row_ = n - 1;
}

void verifier::forget(int32_t n_past) {
    close_round();
    base_                = n_past;
    live_row_            = -1;
    undo_                = params_.rollback == MTP_ROLLBACK_ATTENTION ? n_past : 0;
}

bool verifier::can_truncate(int32_t n_past) const {
    const int32_t back = base_ + rows() - n_past;
    return n_past >= 0 && n_past <= this->n_past() && (n_past == 0 || back <= undo_);
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
    const int32_t base = base_;
    const bool    live = in_round() && n_past > base;
    if (n_past == 0) {  // also when it should be empty: a failed decode may have left rows
        api_.memory_clear(memory_, false);
    } else if (n_past < end && !api_.memory_seq_rm(memory_, 0, n_past, -1)) {
        throw failure(MTP_ROLLBACK, "the host refused to remove the text after position " + std::to_string(n_past) +
                                        "; clear the context and evaluate it again");
    }
    const int32_t row = live ? n_past - base - 1 : (n_past == end ? live_row_ : -1);
    const int32_t undo = n_past == end && n_past > 0 ? undo_ : 0;
    forget(n_past);
    live_row_ = row;
    if (params_.rollback != MTP_ROLLBACK_ATTENTION) {
        undo_ = undo;
    }
}

int32_t verifier::depth_limit(int32_t pos) const {
    int32_t limit = std::min(params_.n_draft_max, params_.n_ctx - pos - 1);
    if (params_.rollback == MTP_ROLLBACK_SNAPSHOTS) {
        limit = std::min({ limit, params_.n_rs_seq, params_.n_ubatch - 1 });
    }
    return std::max(0, limit);
}

void verifier::verify(int32_t last, int32_t pos, const int32_t * drafts, int32_t n) {
    batch_.clear();
    batch_.push(last, pos, true);
    for (int32_t i = 0; i < n; ++i) {
        batch_.push(drafts[i], pos + 1 + i, true);
    }
    live_row_ = -1;
    stopwatch watch(ns);
    ++n_decodes;
    const int32_t undo = undo_;
    undo_              = -1;  // until we know what the decode left behind
    const int32_t code = api_.decode(params_.target, batch_.view());
    if (code != 0) {
        // 1: no room, nothing was decoded. After anything else rows may be there: attention can take them out.
        const bool attention = params_.rollback == MTP_ROLLBACK_ATTENTION;
        if (code == 1 || (attention && (host_end() <= pos || api_.memory_seq_rm(memory_, 0, pos, -1)))) {
            undo_ = undo;
        }
        throw failure(MTP_HOST, "llama_decode returned " + std::to_string(code));
    }
    api_.synchronize(params_.target);
    row_tokens_.assign(1, last);
    row_tokens_.insert(row_tokens_.end(), drafts, drafts + n);
    sampled_ = accepted_ = 0;
    rejected_            = false;
    set_undo(1 + n);
}

int32_t verifier::sample(void * sampler) {
    if (rows_left() <= 0) {
        throw failure(MTP_INVALID, "no verify row is left to sample; verify first");
    }
    int32_t token;
    {
        stopwatch watch(sample_ns);
        token = api_.sampler_sample(sampler, params_.target, sampled_);
    }
    live_row_ = sampled_++;  // only now: a chain that throws leaves the row to be asked for again
    if (sampled_ < rows()) {
        rejected_ = token != row_tokens_[sampled_];
        accepted_ += rejected_ ? 0 : 1;
    }
    return token;
}

void verifier::commit(int32_t n) {
    if (!in_round() || sampled_ > 0 || n < 1 || n > rows()) {
        throw failure(MTP_INVALID, "commit takes 1 to 1 + drafts rows of a round that nobody sampled yet");
    }
    sampled_  = n;
    accepted_ = n - 1;
    live_row_ = n - 1;
}

}  // namespace mtp
