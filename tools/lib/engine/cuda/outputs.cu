// The gradients on the outputs' side of a group's adapters, from one reading of dout [tokens,
// width]: by xa, and of B. Two products of cuBLAS' would read it twice, and with a rank of 16
// in tiles made for hundreds. Ranks up to 16.

constexpr int SPAN = 512;     // columns of a block, of one member
constexpr int TOKENS = 32;    // of a turn
constexpr int MOST_RANK = 16; // ranks that are computed; those that are not there are 0

// What a block holds: two turns' tokens, one arriving, and the warps' sums by xa.
struct Turns {
  bf16 dout[2][TOKENS][SPAN + 8]; // the padding moves each row by four banks
  bf16 xa[2][TOKENS][MOST_RANK + 8];
  float sums[8][TOKENS][MOST_RANK + 4];
};

// Which member a span of columns belongs to, and its first column there.
struct Span {
  u32 member, first;
  DEVICE_MEMBER Span(u32 span, u32 outputs0, u32 outputs1) {
    const u32 second = (outputs0 + SPAN - 1) / SPAN;
    const u32 third = second + (outputs1 + SPAN - 1) / SPAN;
    member = span < second ? 0 : span < third ? 1 : 2;
    first = (span - of(member, 0, second, third)) * SPAN;
  }
};

// by_xa [spans, tokens, 16]: each span's part of dout B. by_b [stretches, spans · 512, 16]:
// each stretch's part of doutᵀ xa. Grid [spans, stretches of tokens]; a warp has 64 columns.
KERNEL_AT_ONCE(256, 2)
b_gradients(const bf16 *__restrict__ dout, const bf16 *__restrict__ xa,
            const float *__restrict__ b0, const float *__restrict__ b1,
            const float *__restrict__ b2, u32 tokens, u32 width, u32 ranks, u32 rank0, u32 rank1,
            u32 rank2, u32 rank_at0, u32 rank_at1, u32 rank_at2, u32 outputs0, u32 outputs1,
            u32 outputs2, u32 column0, u32 column1, u32 column2, float *__restrict__ by_xa,
            float *__restrict__ by_b) {
  DYNAMIC_SHARED(Turns, all);
  Turns &turns = *all;
  const Span span(blockIdx.x, outputs0, outputs1);
  const u32 g = lane() / 4, c = lane() % 4, own = warp() * 64;
  const u32 rank = of(span.member, rank0, rank1, rank2);
  const u32 rank_at = of(span.member, rank_at0, rank_at1, rank_at2);
  const u32 outputs = of(span.member, outputs0, outputs1, outputs2) - span.first;
  const float *b = span.member == 0 ? b0 : span.member == 1 ? b1 : b2;
  dout += of(span.member, column0, column1, column2) + span.first;
  const u32 all_turns = (tokens + TOKENS - 1) / TOKENS;
  const u32 stretch = (all_turns + gridDim.y - 1) / gridDim.y;
  const u32 from = blockIdx.y * stretch, end = min(from + stretch, all_turns);

  // What is beyond the tokens or the outputs is zero, and so counts for nothing.
  auto fetch = [&](u32 buffer, u32 turn) {
    const u32 column = threadIdx.x % (SPAN / 8) * 8;
#pragma unroll 2
    for (u32 t = threadIdx.x / (SPAN / 8); t < TOKENS; t += 256 / (SPAN / 8)) {
      const u32 token = turn * TOKENS + t;
      const bool there = turn < end && token < tokens && column < outputs;
      copy_async(&turns.dout[buffer][t][column], dout + (there ? (size_t)token * width + column : 0),
                 there);
    }
    copy_commit();
  };
  // Two ranks of a token are a thread's.
  const u32 t_mine = threadIdx.x / 8, r_mine = threadIdx.x % 8 * 2;
  auto pair = [&](u32 turn) {
    const u32 token = turn * TOKENS + t_mine;
    const bool there = turn < end && token < tokens;
    return there ? pair_of(xa + (size_t)token * ranks + rank_at, r_mine, rank) : 0;
  };
  auto keep = [&](u32 buffer, u32 two) {
    *reinterpret_cast<u32 *>(&turns.xa[buffer][t_mine][r_mine]) = two;
  };
  fetch(0, from);
  keep(0, pair(from));
  u32 factors[4][2][2]; // of 16 columns each, 8 ranks each
#pragma unroll
  for (u32 s = 0; s < 4; s++)
    for (u32 t = 0; t < 2; t++)
      for (u32 h = 0; h < 2; h++) {
        auto value = [&](u32 column) {
          const u32 r = t * 8 + g;
          return column < outputs && r < rank ? b[(span.first + column) * rank + r] : 0.0f;
        };
        const u32 column = own + s * 16 + h * 8 + 2 * c;
        factors[s][t][h] = pack(value(column), value(column + 1));
      }
  float sum[4][2][4] = {}; // of B: 16 columns, 8 ranks
  u32 buffer = 0;
  for (u32 turn = from; turn < end; turn++, buffer ^= 1) {
    copy_wait<0>();
    sync_block(); // what was fetched is there, and the other buffer is no longer read
    fetch(buffer ^ 1, turn + 1);
    const u32 next = pair(turn + 1);
    const auto &tile = turns.dout[buffer];
#pragma unroll
    for (u32 half = 0; half < 2; half++) { // sixteen tokens
      float acc[2][4] = {};
      u32 low_ranks[4];
      load_matrices_transposed(low_ranks,
                               &turns.xa[buffer][half * 16 + lane() % 16][lane() / 16 * 8]);
#pragma unroll
      for (u32 s = 0; s < 4; s++) {
        u32 a[4];
        load_matrices(a, &tile[half * 16 + lane() % 16][own + s * 16 + lane() / 16 * 8]);
        for (u32 t = 0; t < 2; t++) multiply(acc[t], a, factors[s][t][0], factors[s][t][1]);
        // The same turned round: rows are columns of dout, columns tokens.
        load_matrices_transposed(
            a, &tile[half * 16 + lane() % 8 + lane() / 16 * 8][own + s * 16 + lane() / 8 % 2 * 8]);
        for (u32 t = 0; t < 2; t++)
          multiply(sum[s][t], a, low_ranks[2 * t], low_ranks[2 * t + 1]);
      }
      for (u32 t = 0; t < 2; t++)
        for (u32 e = 0; e < 4; e++)
          turns.sums[warp()][half * 16 + g + e / 2 * 8][t * 8 + 2 * c + e % 2] = acc[t][e];
    }
    keep(buffer ^ 1, next);
    sync_block();
    for (u32 i = threadIdx.x; i < TOKENS * MOST_RANK; i += 256) {
      const u32 t = i / MOST_RANK, r = i % MOST_RANK, token = turn * TOKENS + t;
      if (token >= tokens) break;
      float total = 0;
      for (u32 w = 0; w < 8; w++) total += turns.sums[w][t][r];
      by_xa[((size_t)blockIdx.x * tokens + token) * MOST_RANK + r] = total;
    }
  }
  copy_wait<0>(); // that of a turn beyond the last
#pragma unroll
  for (u32 s = 0; s < 4; s++)
    for (u32 t = 0; t < 2; t++)
      for (u32 e = 0; e < 4; e++) {
        const size_t column = ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * SPAN + own + s * 16 +
                              g + e / 2 * 8;
        by_b[column * MOST_RANK + t * 8 + 2 * c + e % 2] = sum[s][t][e];
      }
}
EXPORT(b_gradients)

// Both sums, in order: dxa [tokens, gradients] = scale · Σ by_xa over a member's spans, zero in
// columns that are no rank, and B's gradients += scale · Σ by_b over the stretches (none where
// null). The first `blocks` blocks are dxa's.
KERNEL(256)
b_gradients_sum(const float *__restrict__ by_xa, const float *__restrict__ by_b, u32 blocks,
                u32 spans, u32 stretches, u32 tokens, u32 gradients, u32 rank0, u32 rank1,
                u32 rank2, u32 gradient_at0, u32 gradient_at1, u32 gradient_at2, u32 outputs0,
                u32 outputs1, u32 outputs2, float scale0, float scale1, float scale2,
                bf16 *__restrict__ dxa, float *__restrict__ grads0, float *__restrict__ grads1,
                float *__restrict__ grads2) {
  if (blockIdx.x < blocks) {
    const u32 i = blockIdx.x * 256 + threadIdx.x, column = i % gradients, token = i / gradients;
    if (token >= tokens) return;
    // Of members that are not there the rank is 0.
    const u32 member = rank2 && column >= gradient_at2 ? 2 : rank1 && column >= gradient_at1 ? 1 : 0;
    const u32 r = column - of(member, gradient_at0, gradient_at1, gradient_at2);
    const u32 second = (outputs0 + SPAN - 1) / SPAN;
    const u32 third = second + (outputs1 + SPAN - 1) / SPAN;
    float sum = 0;
    if (r < of(member, rank0, rank1, rank2))
      for (u32 s = of(member, 0, second, third); s < of(member, second, third, spans); s++)
        sum += by_xa[((size_t)s * tokens + token) * MOST_RANK + r];
    dxa[i] = narrow((member == 0 ? scale0 : member == 1 ? scale1 : scale2) * sum);
    return;
  }
  const u32 i = (blockIdx.x - blocks) * 256 + threadIdx.x, r = i % MOST_RANK, column = i / MOST_RANK;
  const Span span(column / SPAN, outputs0, outputs1);
  const u32 rank = of(span.member, rank0, rank1, rank2);
  const u32 output = span.first + column % SPAN;
  float *grads = span.member == 0 ? grads0 : span.member == 1 ? grads1 : grads2;
  if (!grads || r >= rank || output >= of(span.member, outputs0, outputs1, outputs2)) return;
  float sum = 0;
  for (u32 s = 0; s < stretches; s++) sum += by_b[((size_t)s * spans * SPAN + column) * MOST_RANK + r];
  const float scale = span.member == 0 ? scale0 : span.member == 1 ? scale1 : scale2;
  grads[output * rank + r] += scale * sum;
}
EXPORT(b_gradients_sum)
