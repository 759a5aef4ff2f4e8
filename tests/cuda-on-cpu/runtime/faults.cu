// Kernels with one mistake each, which the runtime must not let pass; and one that
// is right. See tests/runtime.rs.
#include "device.cuh"

KERNEL(64)
fault_none(float *out) {
  SHARED(float, a, 64);
  a[threadIdx.x] = threadIdx.x;
  sync_block();
  out[threadIdx.x] = a[63 - threadIdx.x];
}
EXPORT(fault_none)

KERNEL(64)
fault_no_barrier(float *out) {
  SHARED(float, a, 64);
  a[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = a[63 - threadIdx.x];
}
EXPORT(fault_no_barrier)

// A warp's barrier does not order what another warp wrote.
KERNEL(64)
fault_weak_barrier(float *out) {
  SHARED(float, a, 64);
  a[threadIdx.x] = threadIdx.x;
  sync_warp();
  out[threadIdx.x] = a[63 - threadIdx.x];
}
EXPORT(fault_weak_barrier)

KERNEL(64)
fault_overwritten(float *out) {
  SHARED(float, a, 64);
  a[threadIdx.x] = threadIdx.x;
  sync_block();
  out[threadIdx.x] = a[63 - threadIdx.x];
  a[threadIdx.x] = 0; // others may still read
}
EXPORT(fault_overwritten)

KERNEL(64)
fault_divergent(float *out) {
  if (threadIdx.x < 40) sync_block();
  out[threadIdx.x] = 0;
}
EXPORT(fault_divergent)

KERNEL(64)
fault_divergent_warp(float *out) {
  if (threadIdx.x < 40)
    out[threadIdx.x] = shuffle_xor(1.0f, 1);
  else
    sync_warp();
}
EXPORT(fault_divergent_warp)

KERNEL(64)
fault_outside(float *out) { out[threadIdx.x + 1] = 0; }
EXPORT(fault_outside)

KERNEL(64)
fault_outside_shared(float *out) {
  DYNAMIC_SHARED(float, a);
  a[threadIdx.x + 1] = 0;
  out[threadIdx.x] = 0;
}
EXPORT(fault_outside_shared)

KERNEL(64)
fault_misaligned(float *out) { store16(out + threadIdx.x % 32, uint4{0, 0, 0, 0}); }
EXPORT(fault_misaligned)

// Shared memory that nobody wrote.
KERNEL(64)
fault_uninitialised(float *out) {
  SHARED(float, a, 64);
  out[threadIdx.x] = a[threadIdx.x];
}
EXPORT(fault_uninitialised)

// The copy is read before it was waited for.
KERNEL(64)
fault_no_wait(float *out) {
  SHARED(uint4, a, 64);
  copy_async(&a[threadIdx.x], out, true);
  copy_commit();
  copy_wait<1>();
  const float seen = as_float(a[threadIdx.x].x);
  copy_wait<0>();
  sync_block();
  out[threadIdx.x] = seen;
}
EXPORT(fault_no_wait)
