// The wrappers of matrix instructions, each alone, for one warp: which lane holds what.
// See tests/runtime.rs.
#include "device.cuh"

// a, b, out: 4, 2 and 4 words of each lane in turn.
KERNEL(32)
fragments_multiply(const u32 *a, const u32 *b, float *out) {
  const int l = threadIdx.x;
  const u32 mine[4] = {a[4 * l], a[4 * l + 1], a[4 * l + 2], a[4 * l + 3]};
  float acc[4] = {};
  multiply(acc, mine, b[2 * l], b[2 * l + 1]);
  for (int i = 0; i < 4; ++i) out[4 * l + i] = acc[i];
}
EXPORT(fragments_multiply)

// 32 rows of 16 bytes, to which the lanes point in turn; out: 4 words of each lane.
template <bool Transposed> DEVICE void load(const uint4 *rows, u32 *out) {
  SHARED(uint4, shared, 32);
  shared[threadIdx.x] = load16(&rows[threadIdx.x]);
  sync_warp();
  u32 mine[4];
  if (Transposed)
    load_matrices_transposed(mine, &shared[threadIdx.x]);
  else
    load_matrices(mine, &shared[threadIdx.x]);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = mine[i];
}
KERNEL(32)
fragments_load(const uint4 *rows, u32 *out) { load<false>(rows, out); }
EXPORT(fragments_load)
KERNEL(32)
fragments_load_transposed(const uint4 *rows, u32 *out) { load<true>(rows, out); }
EXPORT(fragments_load_transposed)
