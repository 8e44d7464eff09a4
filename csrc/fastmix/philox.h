// Philox 4x32-10 of Salmon et al. (2011): four random words of a counter and a key, the same on every device.
#pragma once

#include <cstdint>

#include "fastmix/device.h"

namespace fastmix::FASTMIX_ISA {

struct Philox {
  static constexpr int kRounds = 10;
  static constexpr float kScale = 0x1p-24f;  // of the 24 upper bits of a word, which are exact in float

  uint32_t keys[2];

  FASTMIX_ON_DEVICE explicit Philox(int64_t seed)
      : keys{static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)} {}

  // One round, with the keys as they are.
  FASTMIX_ON_DEVICE void round(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) const {
    const uint64_t left = uint64_t{0xD2511F53u} * a, right = uint64_t{0xCD9E8D57u} * c;
    const uint32_t first = static_cast<uint32_t>(right >> 32) ^ b ^ keys[0];
    const uint32_t third = static_cast<uint32_t>(left >> 32) ^ d ^ keys[1];
    a = first;
    b = static_cast<uint32_t>(right);
    c = third;
    d = static_cast<uint32_t>(left);
  }

  // The keys of the next round.
  FASTMIX_ON_DEVICE void advance() {
    keys[0] += 0x9E3779B9u;
    keys[1] += 0xBB67AE85u;
  }
};

}  // namespace fastmix::FASTMIX_ISA
