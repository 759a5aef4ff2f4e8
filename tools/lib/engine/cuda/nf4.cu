// NF4 weights to bf16, for the products that follow.

CONSTANT float LEVELS[16] = {
    -1.0f,          -0.6961928f,   -0.52507305f,  -0.3949175f,  -0.28444138f, -0.18477343f,
    -0.091050036f,  0.0f,          0.0795803f,    0.1609302f,   0.2461123f,   0.33791524f,
    0.44070983f,    0.562617f,     0.72295684f,   1.0f};

// Of eight codes every other one, times four, as `look_up` takes them: the earlier of a
// byte's two is in its high half.
DEVICE u32 earlier(u32 codes) { return codes >> 2 & 0x3c3c3c3c; }
DEVICE u32 later(u32 codes) { return codes << 2 & 0x3c3c3c3c; }

// out[0..count] = the values from flat index `start` on; both multiples of 8. A
// block of 64 values has the scale absmax[block] (`nested` null), or
// map[nested[block]] · absmax[block / 256] + offset. A thread has PIECES times eight values,
// so that a warp reads 128 bytes and writes 512 at a time, and has all it reads under way at
// once: behind the barrier, and where a piece is not there, it reads the first again. The
// arithmetic is f32, step by step as on the CPU, so that the result is its rounding to the bit.
constexpr int PIECES = 4;

KERNEL(256)
nf4_decode(const u8 *__restrict__ codes, const u8 *__restrict__ nested,
           const float *__restrict__ absmax, const float *__restrict__ map, float offset, u64 start,
           u64 count, bf16 *__restrict__ out) {
  SHARED(Sixteen, levels, 1);
  if (threadIdx.x < 16) levels[0].x[threadIdx.x] = LEVELS[threadIdx.x];
  sync_block();
  const u64 first = (u64)blockIdx.x * (PIECES * 2048) + threadIdx.x * 8;
  if (first >= count) return;
  const int left = (int)min(count - first, (u64)PIECES * 2048);
  const u64 block = (start + first) / 64;
  codes += (start + first) / 2;
  out += first;
  u32 words[PIECES];
  float scale[PIECES];
#pragma unroll
  for (int p = 0; p < PIECES; p++)
    words[p] = *reinterpret_cast<const u32 *>(codes + (p * 2048 < left ? p : 0) * 1024);
  if (nested) {
    nested += block;
    absmax += block / 256;
    const u32 within = block % 256;
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      const int there = p * 2048 < left ? p * 32 : 0;
      scale[p] = add_rn(mul_rn(map[nested[there]], absmax[(within + there) / 256]), offset);
    }
  } else {
    absmax += block;
#pragma unroll
    for (int p = 0; p < PIECES; p++) scale[p] = absmax[p * 2048 < left ? p * 32 : 0];
  }
#pragma unroll
  for (int p = 0; p < PIECES; p++) {
    if (left <= p * 2048) return;
    Eight v;
    for (int b = 0; b < 4; b++) {
      v.x[2 * b] = mul_rn(look_up(levels[0].x, earlier(words[p]), b), scale[p]);
      v.x[2 * b + 1] = mul_rn(look_up(levels[0].x, later(words[p]), b), scale[p]);
    }
    store8(out + p * 2048, v);
  }
}
EXPORT(nf4_decode)

// A quantised weight [outputs, inputs] of a group, and its first output column.
struct Quantised {
  const u8 *codes, *nested;
  const float *absmax;
  float offset;
  u32 outputs, column;
};

// What an adapter adds to a weight's products: scale · xa Bᵀ, by its columns from `rank_at`
// on of xa [tokens, ranks]. No rank: nothing.
struct Update {
  const bf16 *xa;
  const float *b;
  u32 ranks, rank_at, rank;
  float scale;

  // acc [16 outputs, 8 tokens] = xa Bᵀ, not scaled.
  DEVICE_MEMBER void tile(float (&acc)[4], u32 output, u32 outputs, u32 token, u32 tokens) const {
    const u32 g = lane() / 4, c = lane() % 4;
    for (u32 k = 2 * c; k < rank + 2 * c; k += 16) {
      auto value = [&](u32 o, u32 r) { return o < outputs && r < rank ? b[o * rank + r] : 0.0f; };
      auto factors = [&](u32 o, u32 r) { return pack(value(o, r), value(o, r + 1)); };
      auto both = [&](u32 r) {
        return token + g < tokens ? pair_of(xa + (token + g) * ranks + rank_at, r, rank) : 0;
      };
      const u32 o = output + g;
      const u32 a[4] = {factors(o, k), factors(o + 8, k), factors(o, k + 8), factors(o + 8, k + 8)};
      multiply(acc, a, both(k), both(k + 8));
    }
  }
};

// Products of few tokens, which read the weights as they are stored.

constexpr int SPLIT = 8;    // warps of a block: they share its outputs and split the inputs
constexpr int OUTPUTS = 32; // of a block: two tiles of the tensor cores
constexpr int PIECE = 128;  // inputs that a warp takes at a time, 32 a lane

// 32 weights of each of a lane's four rows, as they are stored: what their scales are made of
// is looked up when they are used, for while they are on their way nothing may wait.
struct Weights {
  uint4 codes[4];
  u32 nested[4];
  float absmax[4];
};

DEVICE u32 word(const uint4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

DEVICE void put(bf16 *at, float x) { *at = narrow(x); }
DEVICE void put(float *at, float x) { *at = x; }

// out [tokens, width] = x Wᵀ (+ update) (+ residual) for up to 8 N tokens and the outputs
// from `first` on; T: bf16, or float for logits. The inputs of a product may be taken in any
// order, if weights and tokens agree: so a lane's are neighbours, and travel sixteen bytes at a
// time. Weights become bf16 as `nf4_decode` makes them, sums are f32, and those of the
// warps are added in order. Update and residual are rounded together before they are added,
// as where they are a product of their own (adapter.cu).
template <int N, class T>
DEVICE void nf4_product(const Quantised &w, const Update &update, u32 first, const float *map,
                        const bf16 *x, u32 tokens, u32 inputs, const bf16 *residual, u32 width,
                        T *out) {
  SHARED(Sixteen, levels, 1);
  SHARED(float, scales, 256);
  constexpr int TILES = N * 8 * (OUTPUTS + 4); // the padding spreads tokens over the banks
  SHARED(float, partial, (SPLIT + 1) * TILES); // of each warp, and the update
  const int g = lane() / 4, c = lane() % 4;
  const u32 pieces = inputs / PIECE;
  // Of plain scales the codes stand in for nested ones: what is read there is not used.
  const u8 *nested = w.nested ? w.nested : w.codes;
  const u32 shared_by = w.nested ? 8 : 0; // an absmax, by 2^this blocks of weights
  // Where a row or piece is not there, the last one is read again.
  auto load = [&](Weights &to, u32 piece) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 row = min(first + i * 8 + g, w.outputs - 1);
      const u32 block = (row * pieces + min(piece, pieces - 1)) * (PIECE / 64) + c / 2;
      to.codes[i] = load16(w.codes + (size_t)block * 32 + c % 2 * 16);
      to.nested[i] = nested[block];
      to.absmax[i] = w.absmax[block >> shared_by];
    }
  };
  Weights now, next;
  load(next, warp());
  if (threadIdx.x < 16) levels[0].x[threadIdx.x] = LEVELS[threadIdx.x];
  if (w.nested) scales[threadIdx.x] = map[threadIdx.x];
  sync_block();
  float acc[2][N][4] = {};
  auto keep = [&](u32 of, int m, int n, const float (&acc)[4]) {
    for (int e = 0; e < 4; e++) {
      const int token = n * 8 + 2 * c + e % 2, output = m * 16 + g + e / 2 * 8;
      partial[of * TILES + token * (OUTPUTS + 4) + output] = acc[e];
    }
  };
  if (update.rank && warp() < 2 * N) { // a tile each
    const int m = warp() % 2, n = warp() / 2;
    float added[4] = {};
    update.tile(added, first + m * 16, w.outputs, n * 8, tokens);
    keep(SPLIT, m, n, added);
  }
  for (u32 piece = warp(); piece < pieces; piece += SPLIT) {
    now = next;
    load(next, piece + SPLIT); // under way while this piece is multiplied
    float scale[4];
#pragma unroll
    for (int i = 0; i < 4; i++) // as `nf4_decode` computes it
      scale[i] = w.nested ? add_rn(mul_rn(scales[now.nested[i]], now.absmax[i]), w.offset) : now.absmax[i];
#pragma unroll
    for (int q = 0; q < 4; q++) { // eight inputs, two steps of the tensor cores
      uint4 tile[N];
#pragma unroll
      for (int n = 0; n < N; n++) {
        const u32 token = n * 8 + g;
        const size_t at = (size_t)token * inputs + piece * PIECE + c * 32 + q * 8;
        tile[n] = token < tokens ? load16(x + at) : uint4{0, 0, 0, 0};
      }
#pragma unroll
      for (int m = 0; m < 2; m++) {
        // Row 16 m + g, then 8 below: pairs of neighbours, the earlier in the low half.
        u32 pairs[2][4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const u32 codes = word(now.codes[2 * m + h], q);
          const float by = scale[2 * m + h];
#pragma unroll
          for (int b = 0; b < 4; b++)
            pairs[h][b] = pack(mul_rn(look_up(levels[0].x, earlier(codes), b), by),
                               mul_rn(look_up(levels[0].x, later(codes), b), by));
        }
#pragma unroll
        for (int step = 0; step < 2; step++) {
          const u32 a[4] = {pairs[0][2 * step], pairs[1][2 * step], pairs[0][2 * step + 1],
                            pairs[1][2 * step + 1]};
#pragma unroll
          for (int n = 0; n < N; n++)
            multiply(acc[m][n], a, word(tile[n], 2 * step), word(tile[n], 2 * step + 1));
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < 2; m++)
    for (int n = 0; n < N; n++) keep(warp(), m, n, acc[m][n]);
  sync_block();
  for (int i = threadIdx.x; i < N * 8 * OUTPUTS; i += blockDim.x) {
    const u32 token = i / OUTPUTS, output = i % OUTPUTS, own = token * (OUTPUTS + 4) + output;
    if (token >= tokens || first + output >= w.outputs) continue;
    float sum = 0;
    for (int s = 0; s < SPLIT; s++) sum += partial[s * TILES + own];
    const size_t at = (size_t)token * width + w.column + first + output;
    float there = residual ? widen(residual[at].bits) : 0.0f;
    if (update.rank) there = widen(narrow(there + update.scale * partial[SPLIT * TILES + own]).bits);
    put(out + at, sum + there);
  }
}

DEVICE u32 blocks_of(const Quantised &w) { return (w.outputs + OUTPUTS - 1) / OUTPUTS; }

// Up to three weights that share their input; a block is 32 outputs of one.
#define NF4_PRODUCT(N)                                                                             \
  KERNEL_AT_ONCE(256, 2)                                                                           \
  nf4_product_##N(const u8 *codes0, const u8 *nested0, const float *absmax0, float offset0,        \
                  u32 outputs0, u32 column0, const u8 *codes1, const u8 *nested1,                  \
                  const float *absmax1, float offset1, u32 outputs1, u32 column1,                  \
                  const u8 *codes2, const u8 *nested2, const float *absmax2, float offset2,        \
                  u32 outputs2, u32 column2, const bf16 *xa, u32 ranks, const float *b0,           \
                  u32 rank0, u32 rank_at0, float scale0, const float *b1, u32 rank1, u32 rank_at1, \
                  float scale1, const float *b2, u32 rank2, u32 rank_at2, float scale2,            \
                  const float *map, const bf16 *x, u32 tokens, u32 inputs, const bf16 *residual,   \
                  u32 width, bf16 *out) {                                                          \
    Quantised w = {codes0, nested0, absmax0, offset0, outputs0, column0};                          \
    Update update = {xa, b0, ranks, rank_at0, rank0, scale0};                                      \
    u32 block = blockIdx.x;                                                                        \
    if (block >= blocks_of(w)) {                                                                   \
      block -= blocks_of(w);                                                                       \
      w = Quantised{codes1, nested1, absmax1, offset1, outputs1, column1};                         \
      update = Update{xa, b1, ranks, rank_at1, rank1, scale1};                                     \
      if (block >= blocks_of(w)) {                                                                 \
        block -= blocks_of(w);                                                                     \
        w = Quantised{codes2, nested2, absmax2, offset2, outputs2, column2};                       \
        update = Update{xa, b2, ranks, rank_at2, rank2, scale2};                                   \
      }                                                                                            \
    }                                                                                              \
    nf4_product<N / 8>(w, update, block * OUTPUTS, map, x, tokens, inputs, residual, width, out);  \
  }                                                                                                \
  EXPORT(nf4_product_##N)

NF4_PRODUCT(8)
NF4_PRODUCT(16)
NF4_PRODUCT(32)

// The logits of few tokens: one weight, the vocabulary's, and sums that stay f32.
#define NF4_LOGITS(N)                                                                              \
  KERNEL_AT_ONCE(256, 2)                                                                           \
  nf4_logits_##N(const u8 *codes, const u8 *nested, const float *absmax, float offset,             \
                 u32 outputs, const float *map, const bf16 *x, u32 tokens, u32 inputs,             \
                 float *out) {                                                                     \
    const Quantised w = {codes, nested, absmax, offset, outputs, 0};                               \
    nf4_product<N / 8>(w, Update{}, blockIdx.x * OUTPUTS, map, x, tokens, inputs,                  \
                       (const bf16 *)nullptr, outputs, out);                                       \
  }                                                                                                \
  EXPORT(nf4_logits_##N)

NF4_LOGITS(8)
NF4_LOGITS(16)
NF4_LOGITS(32)

DEVICE float value(const bf16 *x, u64 i) { return widen(x[i].bits); }
DEVICE float value(const float *x, u64 i) { return x[i]; }

// Codes and scale of blocks of 64 values; a warp a block, a byte a lane. The
// arithmetic of engine::nf4, step by step. `count` is even; a scale that is not
// finite tells of a value that is not.
template <class T> DEVICE void nf4_quantize(const T *x, u64 count, u8 *codes, float *absmax) {
  SHARED(float, midpoints, 16); // halfway between neighbouring levels
  if (threadIdx.x < 15)
    midpoints[threadIdx.x] = mul_rn(add_rn(LEVELS[threadIdx.x], LEVELS[threadIdx.x + 1]), 0.5f);
  sync_block();
  const u64 block = global_thread() / 32, i = block * 64 + lane() * 2;
  if (block * 64 >= count) return;
  const float v[2] = {i < count ? value(x, i) : 0.0f, i < count ? value(x, i + 1) : 0.0f};
  // Magnitudes compare as their bits do, and NaN above all.
  u32 most = max(as_bits(v[0]) & 0x7fffffffu, as_bits(v[1]) & 0x7fffffffu);
  for (int mask = 16; mask; mask >>= 1) most = max(most, shuffle_xor(most, mask));
  const float reciprocal = 1.0f / fmaxf(as_float(most), 1e-38f);
  u32 code[2];
  for (int e = 0; e < 2; e++) { // how many midpoints are below
    const float s = mul_rn(v[e], reciprocal);
    u32 n = 0;
    for (u32 step = 8; step; step /= 2)
      if (midpoints[n + step - 1] < s) n += step;
    code[e] = n;
  }
  if (i < count) codes[i / 2] = (u8)(code[0] << 4 | code[1]);
  if (lane() == 0) absmax[block] = as_float(most);
}

KERNEL(256)
nf4_quantize_bf16(const bf16 *__restrict__ x, u64 count, u8 *__restrict__ codes,
                  float *__restrict__ absmax) {
  nf4_quantize(x, count, codes, absmax);
}
EXPORT(nf4_quantize_bf16)

KERNEL(256)
nf4_quantize_f32(const float *__restrict__ x, u64 count, u8 *__restrict__ codes,
                 float *__restrict__ absmax) {
  nf4_quantize(x, count, codes, absmax);
}
EXPORT(nf4_quantize_f32)

// Double quantisation: 256 scales a block of threads, their distance from
// `offset` as the nearest of `map`, ascending, by their largest.
KERNEL(256)
nf4_nest(const float *__restrict__ scales, u64 count, float offset, const float *__restrict__ map,
         u8 *__restrict__ nested, float *__restrict__ absmax) {
  SHARED(float, values, 256);
  SHARED(float, partial, 32);
  values[threadIdx.x] = map[threadIdx.x];
  const u64 i = global_thread();
  const float d = i < count ? add_rn(scales[i], -offset) : 0.0f;
  const float most = block_max(fabsf(d), partial);
  if (threadIdx.x == 0) absmax[blockIdx.x] = most;
  if (i >= count) return;
  const float s = mul_rn(d, 1.0f / most); // 0 · ∞ is NaN, which takes code 0
  u32 below = 0;                           // entries less than s, but for the last
  for (u32 step = 128; step; step /= 2)
    if (values[below + step - 1] < s) below += step;
  const u32 upper = max(below, 1u), lower = upper - 1;
  const float midpoint = mul_rn(add_rn(values[lower], values[upper]), 0.5f);
  nested[i] = (u8)(s < midpoint ? lower : s > midpoint ? upper : lower + lower % 2);
}
EXPORT(nf4_nest)
