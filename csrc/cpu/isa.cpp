#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

namespace fastmix {
namespace {

Isa widest() {
#if defined(FASTMIX_HAS_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa chosen() {
  const Isa best = widest();
  const char* wish = std::getenv("FASTMIX_ISA");
  if (wish == nullptr) return best;
  const Isa asked = std::strcmp(wish, "avx512") == 0 ? Isa::avx512
                    : std::strcmp(wish, "avx2") == 0 ? Isa::avx2
                                                     : Isa::baseline;
  return asked < best ? asked : best;
}

}  // namespace

Isa isa() {
  static const Isa value = chosen();
  return value;
}

const char* isa_name() { return isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "baseline"; }

}  // namespace fastmix
