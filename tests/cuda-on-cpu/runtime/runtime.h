// The g++ side of tools/lib/engine/cuda/device.cuh: CUDA's names on a processor.
//
// Everything here is `static`: the kernels are compiled twice, plain and with
// every memory access reported (see check.cc), and linked into one program.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace cpu {

// One thread of the block that is running.
struct Fiber {
  uint3 index;
  int number, lane, warp;
};
extern Fiber *current;
extern uint3 block_index, block_size, grid_size;
extern unsigned char *dynamic_shared;

// A `__shared__` array: a heap block of exactly its size, as much aligned as any is that a
// kernel has, found by check.cc.
struct Shared {
  unsigned char *bytes;
  size_t size;
  Shared *next;
  explicit Shared(size_t size);
};

void load16(void *to, const void *from);
void store16(void *to, const void *from);
void barrier();
void warp_barrier();
void exchange(void *value, size_t size, int mask);
void matrices(u32 *out, const void *row, bool transposed);
void multiply(float *acc, const u32 *a, u32 b0, u32 b1);
void copy_async(void *to, const void *from, bool valid);
void copy_commit();
void copy_wait(int pending);
uint32_t atomic_add(uint32_t *p, uint32_t x);

using Thunk = void (*)(void *function, void **arguments);
void add_kernel(const char *name, bool checked, Thunk, void *function, const size_t *sizes, int count);

template <class... A, size_t... I>
__attribute__((no_sanitize("thread"))) static void call(void *f, void **a, std::index_sequence<I...>) {
  reinterpret_cast<void (*)(A...)>(f)(*static_cast<A *>(a[I])...);
}
template <class... A> __attribute__((no_sanitize("thread"))) static void thunk(void *f, void **a) {
  call<A...>(f, a, std::index_sequence_for<A...>{});
}
template <class... A> static int add(const char *name, void (*f)(A...)) {
  static const size_t sizes[] = {sizeof(A)...};
#ifdef CHECKED
  add_kernel(name, true, thunk<A...>, reinterpret_cast<void *>(f), sizes, sizeof...(A));
#else
  add_kernel(name, false, thunk<A...>, reinterpret_cast<void *>(f), sizes, sizeof...(A));
#endif
  return 0;
}

} // namespace cpu

#define DEVICE static inline __attribute__((unused))
#define DEVICE_MEMBER inline __attribute__((always_inline))
#define CONSTANT static const
#define KERNEL(threads) static void
#define KERNEL_AT_ONCE(threads, blocks) static void
#define EXPORT(kernel) static int registered_##kernel __attribute__((unused)) = cpu::add(#kernel, kernel);
#define SHARED(T, name, n)                                                                         \
  static cpu::Shared name##_storage(sizeof(T[n]));                                                 \
  T(&name)[n] = *reinterpret_cast<T(*)[n]>(name##_storage.bytes)
#define DYNAMIC_SHARED(T, name) T *name = reinterpret_cast<T *>(cpu::dynamic_shared)
#define __restrict__ __restrict
#define threadIdx (cpu::current->index)
#define blockIdx (cpu::block_index)
#define blockDim (cpu::block_size)
#define gridDim (cpu::grid_size)

DEVICE void multiply_wide(u32 a, u32 b, u32 &low, u32 &high) {
  const u64 product = (u64)a * b;
  low = (u32)product;
  high = (u32)(product >> 32);
}
DEVICE float look_up(const float *table, u32 offsets, int byte) { return table[(offsets >> 8 * byte & 255) / 4]; }
DEVICE float mul_rn(float a, float b) { return a * b; } // built with -ffp-contract=off
DEVICE float add_rn(float a, float b) { return a + b; }
DEVICE float as_float(u32 bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
DEVICE u32 as_bits(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  return bits;
}
DEVICE u32 permute(u32 a, u32 b, u32 selector) {
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    const u32 digit = selector >> 4 * i & 15, byte = ((u64)b << 32 | a) >> 8 * (digit & 7) & 255;
    r |= (digit & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
  }
  return r;
}
DEVICE u32 to_bf16(float x) {
  const u32 bits = as_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff; // the device's NaN
  return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;      // to nearest, ties to even
}
DEVICE u32 pack(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }
DEVICE uint4 load16(const void *p) {
  uint4 v;
  cpu::load16(&v, p);
  return v;
}
DEVICE void store16(void *p, uint4 v) { cpu::store16(p, &v); }
DEVICE void sync_block() { cpu::barrier(); }
DEVICE void fence() {} // blocks run one after the other
DEVICE void sync_warp() { cpu::warp_barrier(); }
template <class T> DEVICE T shuffle_xor(T x, int lane_mask) {
  cpu::exchange(&x, sizeof x, lane_mask);
  return x;
}
DEVICE u32 atomic_add(u32 *p, u32 x) { return cpu::atomic_add(p, x); }
DEVICE void load_matrices(u32 (&r)[4], const void *p) { cpu::matrices(r, p, false); }
DEVICE void load_matrices_transposed(u32 (&r)[4], const void *p) { cpu::matrices(r, p, true); }
DEVICE void multiply(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) { cpu::multiply(acc, a, b0, b1); }
DEVICE void copy_async(void *to, const void *from, bool valid) { cpu::copy_async(to, from, valid); }
DEVICE void copy_async_cached(void *to, const void *from, bool valid) { cpu::copy_async(to, from, valid); }
DEVICE void copy_commit() { cpu::copy_commit(); }
template <int N> DEVICE void copy_wait() { cpu::copy_wait(N); }
DEVICE float rsqrtf(float x) { return 1.0f / sqrtf(x); }
DEVICE float fast_exp(float x) { return expf(x); }
DEVICE float fast_reciprocal(float x) { return 1.0f / x; }
DEVICE void sine_cosine_pi(float x, float *sine, float *cosine) {
  *sine = (float)sin(M_PI * x);
  *cosine = (float)cos(M_PI * x);
}
template <class T> DEVICE T min(T a, T b) { return b < a ? b : a; }
template <class T> DEVICE T max(T a, T b) { return a < b ? b : a; }
