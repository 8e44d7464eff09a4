// One warp at the matrix units, with fragments as csrc/cuda/ptx.h says they lie.
#include "cuda/ptx.h"

using namespace fastmix::FASTMIX_ISA;

namespace {

__device__ uint32_t pair(const float* matrix, int columns, int row, int column, bool down) {
  return pack_half(matrix[row * columns + column], matrix[(row + down) * columns + column + !down]);
}

// d [16, 8] += a [16, 16] b [16, 8], once from registers and once by way of shared memory, a and b transposed there.
__global__ void half_kernel(const float* a, const float* b, float* plain, float* loaded) {
  __shared__ uint16_t rows[16 * 8];     // b
  __shared__ uint16_t turned[16 * 16];  // a, transposed
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 128; i += 32) rows[i] = static_cast<uint16_t>(pack_half(b[i], 0));
  for (int i = lane; i < 256; i += 32) turned[i] = static_cast<uint16_t>(pack_half(a[i % 16 * 16 + i / 16], 0));
  __syncwarp();
  float d[2][4];
  for (int i = 0; i < 4; ++i) d[0][i] = d[1][i] = plain[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  const uint32_t factors[4] = {pair(a, 16, g, 2 * t, false), pair(a, 16, g + 8, 2 * t, false),
                               pair(a, 16, g, 2 * t + 8, false), pair(a, 16, g + 8, 2 * t + 8, false)};
  multiply_half(d[0], factors, pair(b, 8, 2 * t, g, true), pair(b, 8, 2 * t + 8, g, true));
  uint32_t as[4], bs[4];
  load_matrices_transposed(as, &turned[(lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8]);
  load_matrices_transposed(bs, &rows[lane % 16 * 8]);
  multiply_half(d[1], as, bs[0], bs[1]);
  for (int i = 0; i < 4; ++i) {
    plain[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[0][i];
    loaded[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[1][i];
  }
}

// d [16, 8] += a [16, 8] b [8, 8]
__global__ void tf32_kernel(const float* a, const float* b, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  float factors[4];
  for (int i = 0; i < 4; ++i) factors[i] = to_tf32(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  multiply_tf32(sums, factors, to_tf32(b[t * 8 + g]), to_tf32(b[(t + 4) * 8 + g]));
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// Rows as load_matrices gives them: [matrix][row][pair].
__global__ void rows_kernel(const uint16_t* in, uint32_t* out) {
  __shared__ uint16_t rows[32 * 8];
  for (int i = threadIdx.x; i < 256; i += 32) rows[i] = in[i];
  __syncwarp();
  uint32_t d[4];
  load_matrices(d, &rows[threadIdx.x * 8]);
  for (int i = 0; i < 4; ++i) out[i * 32 + threadIdx.x] = d[i];
}

// A copy read before it was waited for, behind the wait, and one of nothing.
__global__ void copy_kernel(const float* in, float* out) {
  extern __shared__ __align__(16) unsigned char memory[];
  float* values = reinterpret_cast<float*>(memory);
  copy_async(values, in);
  end_copies();
  copy_async<4>(values + 4, in, false);
  end_copies();
  out[0] = values[0];
  copies_arrived<1>();
  for (int i = 0; i < 4; ++i) out[1 + i] = values[i];
  out[5] = values[4];
  copies_arrived<0>();
  out[6] = values[4];
}

__global__ void halves_kernel(const float* in, int n, float* out) {
  for (int i = threadIdx.x; i < n; i += 32) {
    const float2 rounded = unpack_half(pack_half(in[i], -in[i]));
    const float2 product = unpack_half(times_half(pack_half(in[i], 1), pack_half(0.5f, 3)));
    out[4 * i] = rounded.x, out[4 * i + 1] = rounded.y, out[4 * i + 2] = product.x, out[4 * i + 3] = product.y;
  }
}

}  // namespace

extern "C" const char* half_products(const float* a, const float* b, float* plain, float* loaded) {
  half_kernel<<<1, 32>>>(a, b, plain, loaded);
  return cudaGetErrorString(cudaGetLastError());
}
extern "C" const char* tf32_products(const float* a, const float* b, float* d) {
  tf32_kernel<<<1, 32>>>(a, b, d);
  return cudaGetErrorString(cudaGetLastError());
}
extern "C" const char* rows(const uint16_t* in, uint32_t* out) {
  rows_kernel<<<1, 32>>>(in, out);
  return cudaGetErrorString(cudaGetLastError());
}
extern "C" const char* copies(const float* in, float* out) {
  copy_kernel<<<1, 1, 64, nullptr>>>(in, out);
  return cudaGetErrorString(cudaGetLastError());
}
extern "C" const char* halves(const float* in, int n, float* out) {
  halves_kernel<<<1, 32>>>(in, n, out);
  return cudaGetErrorString(cudaGetLastError());
}
