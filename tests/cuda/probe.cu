// What the emulation must do as CUDA does, and what it must notice.
namespace {

// Sum over a block by way of static and dynamic shared memory, then over blocks: whoever comes last adds the parts.
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads) sum_kernel(const T* in, int n, T* parts, unsigned* done, T* out) {
  extern __shared__ unsigned char memory[];
  __shared__ T total;
  __shared__ bool last;
  T* values = reinterpret_cast<T*>(memory);
  T mine = 0;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < n; i += gridDim.x * kThreads) mine += __ldg(in + i);
  values[threadIdx.x] = mine;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
  }
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = values[0];
    __threadfence();
    last = atomicAdd(done, 1u) == gridDim.x - 1;
    total = 0;
  }
  __syncthreads();
  if (!last) return;
  for (int i = threadIdx.x; i < gridDim.x; i += kThreads) atomicAdd(&total, parts[i]);
  __syncthreads();
  if (threadIdx.x == 0) *out = total;
}

// Each lane's row of results: down, up, butterfly and broadcast within segments, ballot.
__global__ void shuffle_kernel(int width, int* out) {
  const int lane = threadIdx.x % warpSize;
  int* row = out + threadIdx.x * 5;
  row[0] = __shfl_down_sync(0xffffffffu, lane, 3, width);
  row[1] = __shfl_up_sync(0xffffffffu, lane, 2, width);
  row[2] = __shfl_xor_sync(0xffffffffu, lane, 5, width);
  row[3] = __shfl_sync(0xffffffffu, lane, 1, width);
  row[4] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
}

// Halves of a warp that each meet by themselves, a different number of times.
__global__ void halves_kernel(int* out) {
  const bool upper = threadIdx.x >= 16;
  const unsigned mask = upper ? 0xffff0000u : 0x0000ffffu;
  int sum = threadIdx.x;
  for (int i = 0; i < (upper ? 3 : 1); ++i) sum += __shfl_xor_sync(mask, sum, 1 << i);
  out[threadIdx.x] = sum;
}

// Turns a block's numbers round, four at a time; `careless` leaves out the barrier.
__global__ void reverse_kernel(const float4* in, float4* out, bool careless) {
  __shared__ __align__(16) float4 tile[64];
  tile[threadIdx.x] = in[threadIdx.x];
  if (!careless) __syncthreads();
  const float4 v = tile[blockDim.x - 1 - threadIdx.x];
  out[threadIdx.x] = make_float4(v.w, v.z, v.y, v.x);
}

// Half of a warp waits for the block, the other half for the warp.
__global__ void stuck_kernel() {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

__global__ void early_kernel(int* out) {
  if (threadIdx.x % 2 == 1) return;
  __syncwarp();
  __syncthreads();
  out[threadIdx.x] = __syncthreads_count(threadIdx.x < 10);
}

__global__ void outside_kernel() { __syncwarp(0x0000000fu); }

__global__ void trap_kernel() {
  if (threadIdx.x == 40) __trap();
  __syncthreads();
}

}  // namespace

extern "C" const char* sum(const double* in, int n, int blocks, double* parts, unsigned* done, double* out) {
  constexpr int kThreads = 128;
  sum_kernel<double, kThreads><<<blocks, kThreads, kThreads * sizeof(double), nullptr>>>(in, n, parts, done, out);
  return cudaGetErrorString(cudaGetLastError());
}
extern "C" const char* shuffle(int width, int* out) {
  shuffle_kernel<<<1, 64>>>(width, out);
  return cudaGetErrorString(cudaGetLastError());
}
extern "C" const char* halves(int* out) {
  halves_kernel<<<1, 32>>>(out);
  return cudaGetErrorString(cudaGetLastError());
}
extern "C" const char* reverse(const float4* in, float4* out, bool careless) {
  reverse_kernel<<<1, 64>>>(in, out, careless);
  return cudaGetErrorString(cudaGetLastError());
}
extern "C" const char* stuck() {
  stuck_kernel<<<2, 32>>>();
  return cudaGetErrorString(cudaGetLastError());
}
extern "C" const char* early(int* out) {
  early_kernel<<<1, 64>>>(out);
  return cudaGetErrorString(cudaGetLastError());
}
extern "C" const char* outside() {
  outside_kernel<<<1, 32>>>();
  return cudaGetErrorString(cudaGetLastError());
}
extern "C" const char* trapped() {
  trap_kernel<<<dim3(2, 3), 64>>>();
  return cudaGetErrorString(cudaGetLastError());
}
extern "C" const char* nothing() {
  trap_kernel<<<0, 64>>>();
  return cudaGetErrorString(cudaGetLastError());
}
