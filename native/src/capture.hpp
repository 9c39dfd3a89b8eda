// Capture: the target's hidden rows, paired with the tokens they predict from, waiting for the draft context.
#pragma once

#include "host_api.hpp"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mtp {

// What the draft context knows, and what it has yet to be told.
//
//     position      start ........ decoded ........ end
//     draft memory  [ true rows    )
//     waiting                      [ tokens         )   and one hidden row more than tokens:
//     hidden row j  is the target's row of position decoded + j - 1; it pairs with the token at decoded + j.
//
// Invariants: start <= decoded <= end. tokens_[p - start] is the token at position p for start <= p < end. Hidden
// row 0..end-decoded exist; a row that nobody captured (the first one, or after a cut below decoded) is zero, as
// llama.cpp's own loop starts a sequence. end - decoded <= capacity; rows_ grows up to it.
class capture_queue {
  public:
    capture_queue(int32_t capacity, int32_t n_embd);

    int32_t start() const { return start_; }
    int32_t decoded() const { return decoded_; }
    int32_t end() const { return start_ + static_cast<int32_t>(tokens_.size()); }
    int32_t waiting() const { return end() - decoded_; }
    int32_t capacity() const { return capacity_; }

    int32_t       token(int32_t pos) const { return tokens_[pos - start_]; }
    const float * hidden(int32_t pos) const { return &rows_[static_cast<size_t>(pos - decoded_) * n_embd_]; }

    // False: hidden(decoded()) is zero, because nobody captured it.
    bool knows_first_row() const;

    int64_t n_bytes() const {
        return static_cast<int64_t>(rows_.capacity() * sizeof(float) + tokens_.capacity() * sizeof(int32_t));
    }

    // Length of the common prefix with tokens at positions pos..pos+n-1, counted from pos.
    int32_t common(const int32_t * tokens, int32_t n, int32_t pos) const;

    // Takes n tokens from position pos with their hidden rows (n x n_embd). What is already known is not taken twice;
    // what contradicts is cut. Needs pos <= end and room for what is new.
    void append(const int32_t * tokens, const float * rows, int32_t n, int32_t pos);

    // Forgets positions from pos on.
    void cut(int32_t pos);

    // Everything before pos, decoded() <= pos <= end(), is now in the draft memory; what waits from there on stays.
    void mark_decoded(int32_t pos);

    // The token at end() went into the draft memory without waiting: the draft's own `last`.
    void push_decoded(int32_t token);

    // Replaces the hidden row of the token to come, hidden(end()).
    void set_row(const float * row);

    // Empties the queue; the next token stands at pos and has no hidden row.
    void restart(int32_t pos);

    // Forgets what stands before pos, decoded() <= pos <= end(); hidden(pos) stays, so that its token has a true row.
    void skip(int32_t pos);

    // The queue as bytes, for this kind of machine: a header, the tokens, the hidden rows 0..waiting.
    size_t state_size() const;
    void   state_get(uint8_t * data) const;
    // NULL, or why these bytes are no queue of this width, capacity and vocabulary that ends by max_end.
    const char * state_check(const uint8_t * data, size_t n, int32_t n_vocab, int32_t max_end) const;
    // Takes over bytes that state_check let pass.
    void state_set(const uint8_t * data);

  private:
    float * row(int32_t index) { return &rows_[static_cast<size_t>(index) * n_embd_]; }
    void    zero(int32_t index);
    void    reserve(int32_t n_waiting);

    const int32_t        capacity_;
    int32_t              n_embd_;
    int32_t              start_   = 0;
    int32_t              decoded_ = 0;
    std::vector<int32_t> tokens_;
    std::vector<float>   rows_;
};

}  // namespace mtp
