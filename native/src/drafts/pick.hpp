// Pick: the most likely token of a row of the draft context.
#pragma once

#include "../host_api.hpp"

#include <cstdint>
#include <memory>

namespace mtp {

struct pick {
    int32_t token;  // the draft context's own; -1: the host has no such row
    float   p;
    uint8_t klass;
};

// On the device, where nobody asks for probabilities and the host can: 4 bytes come back in place of a row of logits.
class picker {
  public:
    picker(const host_api & api, const mtp_session_params & params)
        : api_(api), params_(params), chain_(nullptr, api.sampler_free) {}

    // Hangs a sampler on the draft context, where one serves.
    void attach();
    // Takes it off again: the context outlives this object.
    void detach();

    pick operator()(int32_t row, int32_t n_vocab) const { return on_device_ ? from_device(row) : from_logits(row, n_vocab); }

  private:
    pick from_device(int32_t row) const;
    pick from_logits(int32_t row, int32_t n_vocab) const;

    const host_api &                        api_;
    const mtp_session_params &              params_;
    std::unique_ptr<void, void (*)(void *)> chain_;
    bool                                    on_device_ = false;
};

}  // namespace mtp
