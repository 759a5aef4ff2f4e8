// Low-rank products of few tokens, as in decoding: what counts is how many kernels there
// are. The factors are read as they are stored, in f32, and rounded where they are used:
// a bf16 copy would be one kernel more, and be read once. Members of a group: see thin.cu.
// Of weights in NF4 the second product is part of the first (nf4.cu).

constexpr u32 DEPTH = 4; // pieces of a lane that are read at once

// xa [tokens, ranks] = x [tokens, inputs] Aᵀ, of 16 tokens and 8 ranks a block; grid
// [tokens / 16, tiles of ranks, stretches]. The warps of all stretches share out the inputs, 32
// at a time, eight a lane. Of several stretches each leaves its sums in `partial` and takes a
// ticket; who has the last one adds them up in order, and puts the tickets, which start as 0,
// back.
KERNEL_AT_ONCE(256, 2)
few_ranks(const bf16 *__restrict__ x, const float *__restrict__ a0, const float *__restrict__ a1,
          const float *__restrict__ a2, u32 tokens, u32 inputs, u32 rank0, u32 rank1, u32 rank2,
          float *partial, u32 *tickets, bf16 *__restrict__ xa) {
  SHARED(float, sums, 8 * 16 * 8);
  SHARED(u32, ticket, 1);
  const u32 g = lane() / 4, c = lane() % 4;
  const Cut cut = Cut::at<8>(blockIdx.y, rank0, rank1, rank2);
  const u32 rank = cut.column - of(cut.member, 0, rank0, rank0 + rank1), token = blockIdx.x * 16;
  const float *a = cut.member == 0 ? a0 : cut.member == 1 ? a1 : a2;
  // What is beyond the tokens, and beyond a member's ranks, is computed and not stored.
  a += (size_t)(rank + min(g, cut.left - 1)) * inputs;
  const bf16 *upper = x + (size_t)min(token + g, tokens - 1) * inputs;
  const bf16 *lower = x + (size_t)min(token + g + 8, tokens - 1) * inputs;
  float acc[4] = {};
  const u32 step = 8 * gridDim.z;
  for (u32 piece = blockIdx.z * 8 + warp(); piece * 32 < inputs; piece += step * DEPTH) {
    uint4 up[DEPTH], down[DEPTH];
    Eight row[DEPTH];
    bool there[DEPTH];
#pragma unroll
    for (u32 d = 0; d < DEPTH; d++) {
      // Beyond the inputs the last are read again, and count nothing.
      const u32 i = (piece + step * d) * 32 + c * 8, from = min(i, inputs - 8);
      up[d] = load16(upper + from);
      down[d] = load16(lower + from);
      row[d] = load8(a + from);
      there[d] = i < inputs;
    }
#pragma unroll
    for (u32 d = 0; d < DEPTH; d++) {
      Eight v = row[d];
      for (int e = 0; e < 8; e++) v.x[e] = there[d] ? v.x[e] : 0.0f;
      const u32 early[4] = {up[d].x, down[d].x, up[d].y, down[d].y};
      const u32 late[4] = {up[d].z, down[d].z, up[d].w, down[d].w};
      multiply(acc, early, pack(v.x[0], v.x[1]), pack(v.x[2], v.x[3]));
      multiply(acc, late, pack(v.x[4], v.x[5]), pack(v.x[6], v.x[7]));
    }
  }
  for (int e = 0; e < 4; e++) sums[(warp() * 16 + g + e / 2 * 8) * 8 + 2 * c + e % 2] = acc[e];
  sync_block();
  float sum = 0;
  if (threadIdx.x < 128)
    for (int w = 0; w < 8; w++) sum += sums[w * 128 + threadIdx.x];
  if (gridDim.z > 1) {
    const u32 tile = blockIdx.y * gridDim.x + blockIdx.x;
    float *own = partial + (size_t)tile * gridDim.z * 128 + threadIdx.x;
    if (threadIdx.x < 128) own[blockIdx.z * 128] = sum;
    fence();
    sync_block();
    if (threadIdx.x == 0) {
      ticket[0] = atomic_add(&tickets[tile], 1);
      if (ticket[0] == gridDim.z - 1) tickets[tile] = 0;
      fence();
    }
    sync_block();
    if (ticket[0] != gridDim.z - 1) return;
    sum = 0;
    if (threadIdx.x < 128)
      for (u32 z = 0; z < gridDim.z; z++) sum += own[z * 128];
  }
  const u32 to = token + threadIdx.x / 8, column = threadIdx.x % 8;
  if (threadIdx.x >= 128 || to >= tokens || column >= cut.left) return;
  xa[(size_t)to * (rank0 + rank1 + rank2) + cut.column + column] = narrow(sum);
}
EXPORT(few_ranks)

// out [tokens, width] = scale · xa Bᵀ (+ residual): each member in its columns from `column`
// on, by its columns from `rank_at` on of xa [tokens, ranks]. A block has 256 of a member's
// outputs, a warp 32, and every gridDim.y-th 16 tokens. Outputs are numbered such that eight
// neighbours are one lane's.
KERNEL(256)
few_update(const bf16 *__restrict__ xa, const float *__restrict__ b0, const float *__restrict__ b1,
           const float *__restrict__ b2, u32 tokens, u32 ranks, u32 rank0, u32 rank1, u32 rank2,
           u32 rank_at0, u32 rank_at1, u32 rank_at2, u32 outputs0, u32 outputs1, u32 outputs2,
           u32 column0, u32 column1, u32 column2, float scale0, float scale1, float scale2,
           const bf16 *residual, u32 width, bf16 *out) {
  const u32 g = lane() / 4, c = lane() % 4;
  const u32 second = (outputs0 + 255) / 256, third = second + (outputs1 + 255) / 256;
  const u32 member = blockIdx.x < second ? 0 : blockIdx.x < third ? 1 : 2;
  const u32 first = (blockIdx.x - of(member, 0, second, third)) * 256 + warp() * 32;
  const u32 outputs = of(member, outputs0, outputs1, outputs2);
  const u32 rank = of(member, rank0, rank1, rank2);
  const u32 rank_at = of(member, rank_at0, rank_at1, rank_at2);
  const float *b = member == 0 ? b0 : member == 1 ? b1 : b2;
  const float scale = member == 0 ? scale0 : member == 1 ? scale1 : scale2;
  const u32 column = of(member, column0, column1, column2) + first + c * 8;
  for (u32 start = blockIdx.y * 16; start < tokens; start += gridDim.y * 16) {
    auto pair = [&](u32 token, u32 r) {
      return token < tokens ? pair_of(xa + token * ranks + rank_at, r, rank) : 0;
    };
    float acc[4][4] = {};
    for (u32 k = 2 * c; k < rank + 2 * c; k += 16) {
      const u32 a[4] = {pair(start + g, k), pair(start + g + 8, k), pair(start + g, k + 8),
                        pair(start + g + 8, k + 8)};
#pragma unroll
      for (u32 j = 0; j < 4; j++) {
        const u32 output = first + g / 2 * 8 + j * 2 + g % 2;
        auto value = [&](u32 r) {
          return output < outputs && r < rank ? b[output * rank + r] : 0.0f;
        };
        multiply(acc[j], a, pack(value(k), value(k + 1)), pack(value(k + 8), value(k + 9)));
      }
    }
    for (u32 half = 0; half < 2; half++) {
      const u32 token = start + g + 8 * half;
      if (token >= tokens || first + c * 8 >= outputs) continue;
      const size_t at = (size_t)token * width + column;
      Eight v = residual ? load8(residual + at) : Eight{};
      for (u32 j = 0; j < 4; j++)
        for (u32 e = 0; e < 2; e++) v.x[2 * j + e] += scale * acc[j][2 * half + e];
      store8(out + at, v);
    }
  }
}
EXPORT(few_update)
