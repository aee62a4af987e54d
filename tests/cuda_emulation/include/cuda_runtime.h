// Stands in for CUDA's header where a C++ compiler compiles kernels, which runtime.cpp then runs on the CPU: as much of
// CUDA as the kernels in csrc/ use.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

namespace emulation {

// Where in the source a thread waits.
struct Place {
  const char* file;
  int line;
  bool operator==(const Place&) const = default;
};

dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();

// What a block allocates once for all its threads; site tells one variable from the others. Holds arbitrary bytes.
void* static_shared_memory(const void* site, size_t bytes);
void* dynamic_shared_memory();

void wait_for_block(Place place);

// Waits for the lanes of the mask, and returns what each of them gave.
std::array<uint64_t, 32> wait_for_lanes(unsigned mask, uint64_t value, bool orders_memory, Place place);

// Lets other threads go on before this one, or not.
void maybe_pause();

[[noreturn]] void fail(const std::string& problem, Place place);

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

template <class... Parameters>
auto launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes = 0, cudaStream_t = nullptr) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "too many arguments for a kernel");
  return [=](Parameters... arguments) { run(grid, block, shared_bytes, [&] { kernel(arguments...); }); };
}

template <class T>
T& static_shared(const void* site) {
  return *static_cast<std::remove_reference_t<T>*>(static_shared_memory(site, sizeof(T)));
}

template <class T>
uint64_t bits_of(T value) {
  static_assert(std::is_arithmetic_v<T>, "not a type that CUDA shuffles");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T shuffle(unsigned mask, T value, int from, Place place) {
  const auto values = wait_for_lanes(mask, bits_of(value), false, place);
  if (from < 0 || from > 31) return value;
  if (!(mask >> from & 1)) fail("a shuffle from a lane outside the mask", place);
  T result;
  std::memcpy(&result, &values[from], sizeof(T));
  return result;
}

// Calls found(value) for the value of each lane of the mask that satisfies it, and returns the mask of these lanes.
template <class Predicate>
unsigned lanes_where(unsigned mask, uint64_t value, Place place, const Predicate& predicate) {
  const auto values = wait_for_lanes(mask, value, false, place);
  unsigned lanes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1 && predicate(values[lane])) lanes |= 1u << lane;
  return lanes;
}

template <class T, class Update>
T atomic(T* address, const Update& update) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long> ||
                    std::is_same_v<T, float>,
                "not a type of CUDA's atomics");
  maybe_pause();
  T before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  do after = update(before);
  while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}

inline int lane_index() { return int(thread_index().x % 32); }

}  // namespace emulation

#define threadIdx emulation::thread_index()
#define blockIdx emulation::block_index()
#define blockDim emulation::block_size()
#define gridDim emulation::grid_size()

#define EMULATION_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATION_PLACE) { emulation::wait_for_block({file, line}); }
inline void __syncwarp(unsigned mask = ~0u, EMULATION_PLACE) { emulation::wait_for_lanes(mask, 0, true, {file, line}); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, EMULATION_PLACE) {
  return emulation::shuffle(mask, value, lane % 32, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, EMULATION_PLACE) {
  return emulation::shuffle(mask, value, emulation::lane_index() - int(distance), {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, EMULATION_PLACE) {
  return emulation::shuffle(mask, value, emulation::lane_index() + int(distance), {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, EMULATION_PLACE) {
  return emulation::shuffle(mask, value, emulation::lane_index() ^ other, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, bool vote, EMULATION_PLACE) {
  return emulation::lanes_where(mask, vote, {file, line}, [](uint64_t other) { return other != 0; });
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, EMULATION_PLACE) {
  const uint64_t own = emulation::bits_of(value);
  return emulation::lanes_where(mask, own, {file, line}, [=](uint64_t other) { return other == own; });
}

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return emulation::atomic(address, [=](T before) { return before + value; });
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return emulation::atomic(address, [=](T before) { return std::min(before, value); });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return emulation::atomic(address, [=](T before) { return std::max(before, value); });
}

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return std::countl_zero(unsigned(bits)); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

// A launch has run when it returns, and throws what went wrong.
struct cudaFuncAttributes {};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}

// What torch declares for CUDA alone; for the others runtime.cpp has definitions that go before those of torch.
inline void torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char**) {}
inline void torch_c10_cuda_free_error_msg(char*) {}
inline int32_t aoti_torch_get_current_cuda_stream(int32_t, void**) { return 0; }
