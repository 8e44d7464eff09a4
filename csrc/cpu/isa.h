// One source, three instruction sets: every file of csrc/cpu is compiled with FASTMIX_ISA = avx512, avx2 and baseline,
// and the widest set that the processor has is chosen once at run time.
//
// All code with a body that such a file includes lives in namespace fastmix::FASTMIX_ISA. Otherwise the linker would
// keep one copy of an inline function for all three, and might keep the one with AVX-512 instructions.
#pragma once

namespace fastmix {

enum class Isa { baseline, avx2, avx512 };

Isa isa();               // what this process uses; FASTMIX_ISA=avx512|avx2|baseline in the environment lowers it
const char* isa_name();  // the same in words

}  // namespace fastmix

#if defined(FASTMIX_HAS_X86)
#define FASTMIX_DECLARE(signature) \
  namespace avx512 {               \
  signature;                       \
  }                                \
  namespace avx2 {                 \
  signature;                       \
  }                                \
  namespace baseline {             \
  signature;                       \
  }
#define FASTMIX_DISPATCH(function, ...)                                                  \
  (::fastmix::isa() == ::fastmix::Isa::avx512 ? ::fastmix::avx512::function(__VA_ARGS__) \
   : ::fastmix::isa() == ::fastmix::Isa::avx2 ? ::fastmix::avx2::function(__VA_ARGS__)   \
                                              : ::fastmix::baseline::function(__VA_ARGS__))
#else
#define FASTMIX_DECLARE(signature) \
  namespace baseline {             \
  signature;                       \
  }
#define FASTMIX_DISPATCH(function, ...) ::fastmix::baseline::function(__VA_ARGS__)
#endif
