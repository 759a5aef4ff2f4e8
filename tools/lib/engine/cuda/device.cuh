// What a kernel may use of the machine: one wrapper for each instruction that
// C++ has no word for, and the names in which CUDA and g++ differ. Under a CUDA
// compiler (nvcc or NVRTC, no header of either is needed) these are the
// instructions; under g++ the same names come from tests/cuda-on-cpu/runtime,
// which runs a block's threads as coroutines. Rules that keep both sides true:
// inline assembly only in this file; shared memory only through SHARED and
// DYNAMIC_SHARED; warp collectives by all 32 lanes.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// A bfloat16: the upper half of a float.
struct bf16 {
  u16 bits;
};

#ifdef __CUDACC__

#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__
#define CONSTANT static __constant__ const
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
// For so many blocks a multiprocessor. Without a number the driver's compiler may prefer as
// many as fit, and keep few values on their way for the sake of registers.
#define KERNEL_AT_ONCE(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define EXPORT(kernel)
#define SHARED(T, name, n) __shared__ T name[n]
#define DYNAMIC_SHARED(T, name) T *name = reinterpret_cast<T *>(dynamic_shared)
extern __shared__ uint4 dynamic_shared[];

// One instruction, as which the compiler takes neither a product shifted by 32 nor the
// halves asked for one by one.
DEVICE void multiply_wide(u32 a, u32 b, u32 &low, u32 &high) {
  u64 product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  asm("mov.b64 {%0, %1}, %2;" : "=r"(low), "=r"(high) : "l"(product));
}

// Products and sums that must not be contracted, where bits have to match.
DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }

DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 as_bits(float x) { return __float_as_uint(x); }

// Four of the eight bytes of a and b, a's first, by the selector's digits, the lowest
// first; with 8 added the byte's sign eight times over.
DEVICE u32 permute(u32 a, u32 b, u32 selector) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}

// Two floats to bf16, round to nearest even, the first in the low half.
DEVICE u32 pack(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// By the special-function unit, good to about 2^-21: for what is rounded to bf16.
// What is subnormal is zero, without which both take three times the instructions.
DEVICE float fast_exp(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x * 1.4426950408889634f));
  return r;
}
DEVICE float fast_reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// Of π x.
DEVICE void sine_cosine_pi(float x, float *sine, float *cosine) { sincospif(x, sine, cosine); }

// Sixteen bytes in one access; the address is a multiple of sixteen.
DEVICE uint4 load16(const void *p) { return *static_cast<const uint4 *>(p); }
DEVICE void store16(void *p, uint4 v) { *static_cast<uint4 *>(p) = v; }

DEVICE void sync_block() { __syncthreads(); }
// What the thread wrote before is seen by any that sees what it writes after.
DEVICE void fence() { __threadfence(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE float shuffle_xor(float x, int lane_mask) { return __shfl_xor_sync(~0u, x, lane_mask); }
DEVICE double shuffle_xor(double x, int lane_mask) { return __shfl_xor_sync(~0u, x, lane_mask); }
DEVICE u32 shuffle_xor(u32 x, int lane_mask) { return __shfl_xor_sync(~0u, x, lane_mask); }
DEVICE u64 shuffle_xor(u64 x, int lane_mask) { return __shfl_xor_sync(~0u, x, lane_mask); }
// Gives what was there.
DEVICE u32 atomic_add(u32 *p, u32 x) { return atomicAdd(p, x); }

DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// An entry of a table in shared memory, which begins where the lowest byte of an address
// is zero. `byte` of `offsets`, four times the entry's number, becomes that byte: in one
// instruction. Volatile: it stays behind the barrier that the table was filled before.
DEVICE float look_up(const float *table, u32 offsets, int byte) {
  float x;
  const u32 at = permute(offsets, shared_address(table), 0x7650 | byte);
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(at));
  return x;
}

// Four 8×8 matrices of 16-bit values from shared memory: lane 8i + r points to
// row r of matrix i, 16 bytes aligned to 16; lane l receives, of each matrix,
// columns 2(l % 4) and + 1 of row l / 4 (transposed: of column l / 4).
DEVICE void load_matrices(u32 (&r)[4], const void *p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}
DEVICE void load_matrices_transposed(u32 (&r)[4], const void *p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}

// acc [16, 8] += a [16, 16] · b [16, 8]. With g = lane / 4 and c = 2 (lane % 4):
// a: (g, c), (g + 8, c), (g, c + 8), (g + 8, c + 8); b: (c, g), (c + 8, g), two
// consecutive values in each; acc: (g, c), (g, c + 1), (g + 8, c), (g + 8, c + 1).
DEVICE void multiply(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Sixteen bytes from global to shared memory, in the background; zeros where not
// `valid`. They have arrived when the thread has waited, and for the block's
// other threads after a barrier.
DEVICE void copy_async(void *to, const void *from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
// The same by way of the cache that the multiprocessor's other warps read through.
DEVICE void copy_async_cached(void *to, const void *from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of the groups committed last are still under way.
template <int N> DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#else
#include "runtime.h"
#endif

DEVICE float widen(u16 bits) { return as_float((u32)bits << 16); }
DEVICE float low(u32 pair) { return as_float(pair << 16); }
DEVICE float high(u32 pair) { return as_float(pair & 0xffff0000u); }
DEVICE bf16 narrow(float x) { return bf16{(u16)pack(x, 0.0f)}; }

// Eight activations at once: every row is a multiple of eight wide, so that they
// travel as one 16-byte access.
struct Eight {
  float x[8];
};

DEVICE Eight eight(const uint4 &v) {
  return Eight{{low(v.x), high(v.x), low(v.y), high(v.y), low(v.z), high(v.z), low(v.w), high(v.w)}};
}
DEVICE Eight load8(const bf16 *p) { return eight(load16(p)); }
DEVICE Eight load8(const float *p) {
  const uint4 a = load16(p), b = load16(p + 4);
  return Eight{{as_float(a.x), as_float(a.y), as_float(a.z), as_float(a.w), as_float(b.x),
                as_float(b.y), as_float(b.z), as_float(b.w)}};
}
DEVICE void store8(bf16 *p, const Eight &v) {
  uint4 packed;
  packed.x = pack(v.x[0], v.x[1]);
  packed.y = pack(v.x[2], v.x[3]);
  packed.z = pack(v.x[4], v.x[5]);
  packed.w = pack(v.x[6], v.x[7]);
  store16(p, packed);
}

// Values that a thread has on their way at once, where it reads one after the other: by fewer
// than some twenty kilobytes a multiprocessor memory is not kept busy.
constexpr u32 BATCH = 8;

// Calls f(i, x[i]) for every `stride`-th i of from..to.
template <class I, class F> DEVICE void each(const float *x, I from, I to, I stride, F f) {
  for (I i = from; i < to; i += BATCH * stride) {
    float v[BATCH];
#pragma unroll
    for (u32 b = 0; b < BATCH; b++) v[b] = i + b * stride < to ? x[i + b * stride] : 0.0f;
#pragma unroll
    for (u32 b = 0; b < BATCH; b++)
      if (i + b * stride < to) f(i + b * stride, v[b]);
  }
}

DEVICE int lane() { return threadIdx.x & 31; }
DEVICE int warp() { return threadIdx.x >> 5; }
// This thread's number in the grid.
DEVICE size_t global_thread() { return (size_t)blockIdx.x * blockDim.x + threadIdx.x; }
DEVICE float infinity() { return as_float(0x7f800000u); }
// Below every value, and no infinity: the difference of two is 0.
constexpr float LOWEST = -3e38f;

// A table for `look_up`.
struct alignas(256) Sixteen {
  float x[16];
};

// A product of 64 bits by its halves.
struct Long {
  u32 low, high;
};
DEVICE Long long_product(u32 a, u32 b) {
  Long halves;
  multiply_wide(a, b, halves.low, halves.high);
  return halves;
}

// Two neighbouring values as the tensor cores take them; those from `count` on are 0.
DEVICE u32 pair_of(const bf16 *x, u32 i, u32 count) {
  const u32 even = i < count ? x[i].bits : 0, odd = i + 1 < count ? x[i + 1].bits : 0;
  return odd << 16 | even;
}

template <class T> DEVICE T warp_sum(T x) {
  for (int mask = 16; mask; mask >>= 1) x += shuffle_xor(x, mask);
  return x;
}
DEVICE float warp_max(float x) {
  for (int mask = 16; mask; mask >>= 1) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}

// The sum over the block, in every thread; `partial` holds a value per warp (32).
template <class T> DEVICE T block_sum(T x, T *partial) {
  x = warp_sum(x);
  sync_block(); // the last use of `partial` is over
  if (lane() == 0) partial[warp()] = x;
  sync_block();
  return warp_sum(lane() < (int)blockDim.x / 32 ? partial[lane()] : T(0));
}
DEVICE float block_max(float x, float *partial) {
  x = warp_max(x);
  sync_block();
  if (lane() == 0) partial[warp()] = x;
  sync_block();
  return warp_max(lane() < (int)blockDim.x / 32 ? partial[lane()] : -infinity());
}
