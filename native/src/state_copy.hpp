// A copy of the recurrent part of the target's memory.
#pragma once

#include "host_api.hpp"

#include <cstdint>
#include <vector>

namespace mtp {

// The state after the first end() positions. Going back to it is right as long as the attention cells of those
// positions stay: the copy holds the recurrent part alone, and loading it cuts the attention part to end().
class state_copy {
  public:
    state_copy(const host_api & api, void * ctx, void * memory) : api_(api), ctx_(ctx), memory_(memory) {}

    int32_t end() const { return end_; }  // -1: there is no copy
    void    drop() { end_ = -1; }

    // Copies the state of a memory that ends at `end`. False, and no copy, when the host fails. One buffer serves
    // every round.
    bool save(int32_t end);

    // Takes the memory back to end(). False when the host fails: what it then holds is unknown.
    bool load();

    // Bytes that a copy of the memory would take now, and those that this one takes.
    size_t size_now() const;
    size_t n_held() const { return data_.size(); }

    int64_t n_bytes = 0;  // copied so far, either way

  private:
    const host_api &     api_;
    void *               ctx_;
    void *               memory_;
    std::vector<uint8_t> data_;
    size_t               n_    = 0;
    int32_t              end_  = -1;
};

}  // namespace mtp
