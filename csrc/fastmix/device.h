// Marks what both the C++ and the CUDA compiler make code of.
#pragma once

#if defined(__CUDACC__)
#define FASTMIX_ON_DEVICE __host__ __device__
#else
#define FASTMIX_ON_DEVICE
#endif
