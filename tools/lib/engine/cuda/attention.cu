// Causal attention inside packed rows, and over the cache.
//
// A block of four warps owns 64 queries (or, for the gradients of keys and
// values, 64 keys) of one row and head, and walks over the tiles of 64 that
// these meet; a warp owns 16 of the 64. Scores live in registers only, in the
// order in which the tensor cores leave them (`multiply` in device.cuh). After
// Dao, "FlashAttention-2", arXiv 2307.08691; without its atomics: dQ and dK, dV
// are two kernels, each of which recomputes the scores.

constexpr int TILE = 64;
constexpr int THREADS = 128;

// The padding moves each row by four banks: no two rows of a matrix collide.
template <int D> struct Tile {
  bf16 row[TILE][D + 8];
};

// Where a head's rows lie: row i at `base + i · stride`.
struct Rows {
  const bf16 *base;
  size_t stride;
};

// Starts loading rows from..from+64; those beyond `count` become zero.
template <int D> DEVICE void load_tile(Tile<D> &tile, Rows rows, int from, int count) {
  constexpr int TURN = THREADS / (D / 8); // rows that the block loads at a time
  const int first = threadIdx.x / (D / 8), column = threadIdx.x % (D / 8) * 8;
  const bf16 *at = rows.base + (from + first) * rows.stride + column;
#pragma unroll 2 // more of them take registers that others need
  for (int r = first; r < TILE; r += TURN, at += TURN * rows.stride) {
    const bool valid = from + r < count;
    copy_async(&tile.row[r][column], valid ? at : rows.base, valid);
  }
}

// Of the tile's columns, in sixteens, those from `low` to before `high`: a warp's others are
// masked, and with rows of tweets they are most.
struct Part {
  int low, high;
  DEVICE_MEMBER bool has(int sixteen) const { return low <= sixteen && sixteen < high; }
};

// acc [16, 64] = x[first..first+16] · yᵀ, and 0 outside of the part.
template <int D>
DEVICE void scores(float (&acc)[8][4], const Tile<D> &x, int first, const Tile<D> &y, Part part) {
  for (int n = 0; n < 8; n++)
    for (int e = 0; e < 4; e++) acc[n][e] = 0;
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    u32 a[4];
    load_matrices(a, &x.row[first + lane() % 16][k + lane() / 16 * 8]);
#pragma unroll
    for (int n = 0; n < 4; n++) {
      if (!part.has(n)) continue;
      u32 b[4];
      load_matrices(b, &y.row[n * 16 + lane() % 8 + lane() / 16 * 8][k + lane() / 8 % 2 * 8]);
      multiply(acc[2 * n], a, b[0], b[1]);
      multiply(acc[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// acc [16, D] += p [16, 64] · y, with p rounded to bf16, which is 0 outside of the part.
template <int D>
DEVICE void accumulate(float (&acc)[D / 8][4], const float (&p)[8][4], const Tile<D> &y,
                       Part part) {
#pragma unroll
  for (int k = 0; k < 4; k++) {
    if (!part.has(k)) continue;
    const u32 a[4] = {pack(p[2 * k][0], p[2 * k][1]), pack(p[2 * k][2], p[2 * k][3]),
                      pack(p[2 * k + 1][0], p[2 * k + 1][1]), pack(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
      u32 b[4];
      load_matrices_transposed(b, &y.row[k * 16 + lane() % 16][n * 16 + lane() / 16 * 8]);
      multiply(acc[2 * n], a, b[0], b[1]);
      multiply(acc[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// Row (of the warp's 16) and column (of the tile's 64) of element e of acc[n].
DEVICE int row_of(int e) { return lane() / 4 + e / 2 * 8; }
DEVICE int column_of(int n, int e) { return n * 8 + lane() % 4 * 2 + e % 2; }

// Rows of acc [16, D], times a factor of their own, to out + row · stride.
template <int D>
DEVICE void store_rows(bf16 *out, size_t stride, int first, int count, const float (&acc)[D / 8][4],
                       float upper, float lower) {
  for (int half = 0; half < 2; half++) {
    const int r = first + row_of(2 * half);
    const float by = half ? lower : upper;
    if (r >= count) continue;
#pragma unroll
    for (int n = 0; n < D / 8; n++)
      *reinterpret_cast<u32 *>(out + r * stride + column_of(n, 0)) =
          pack(acc[n][2 * half] * by, acc[n][2 * half + 1] * by);
  }
}

// The four lanes that hold a row of scores.
DEVICE float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// One head of one packed row, with the layouts of the `Backend` trait:
// qk [tokens, q + k], qkv and dqkv [tokens, q + 2k], out and dout [tokens, q].
struct Head {
  int start, count;
  u32 query, kv;

  DEVICE_MEMBER Head(const u32 *bounds, u32 query, u32 kv)
      : start(bounds[blockIdx.x]), count(bounds[blockIdx.x + 1] - start), query(query), kv(kv) {}
  template <int D> DEVICE_MEMBER Rows q(const bf16 *qk, u32 head) const {
    const size_t stride = (size_t)(query + kv) * D;
    return Rows{qk + start * stride + head * D, stride};
  }
  template <int D> DEVICE_MEMBER Rows k(const bf16 *qk, u32 kv_head) const {
    return q<D>(qk, query + kv_head);
  }
  template <int D> DEVICE_MEMBER Rows v(const bf16 *qkv, u32 kv_head) const {
    const size_t stride = (size_t)(query + 2 * kv) * D;
    return Rows{qkv + start * stride + (query + kv + kv_head) * D, stride};
  }
  template <int D> DEVICE_MEMBER Rows o(const bf16 *out, u32 head) const {
    const size_t stride = (size_t)query * D;
    return Rows{out + start * stride + head * D, stride};
  }
  // Of a token's softmax denominators.
  DEVICE_MEMBER size_t lse(int token, u32 head) const {
    return (size_t)(start + token) * query + head;
  }
};

// Grid [rows, query heads, tiles of the longest row], of which the last, that meets the most
// keys, is begun first: blocks start in their order, and what starts last should be short.
DEVICE int tile_of_queries() { return gridDim.z - 1 - blockIdx.z; }

template <int D>
DEVICE void attention(const bf16 *qk, const bf16 *qkv, const u32 *bounds, u32 query, u32 kv,
                      float scale, bf16 *out, float *lse) {
  DYNAMIC_SHARED(Tile<D>, tiles); // queries; two each of keys and values
  Tile<D> &q_tile = tiles[0];
  const Head head(bounds, query, kv);
  const int last = tile_of_queries(), from = last * TILE, count = head.count;
  if (from >= count) return;
  const u32 h = blockIdx.y, kv_head = h * kv / query;
  const Rows q = head.q<D>(qk, h), k = head.k<D>(qk, kv_head), v = head.v<D>(qkv, kv_head);
  const int first = warp() * 16;

  load_tile(q_tile, q, from, count);
  load_tile(tiles[1], k, 0, count);
  load_tile(tiles[2], v, 0, count);
  copy_commit();
  float acc[D / 8][4] = {}, top[2] = {-infinity(), -infinity()}, sum[2] = {0, 0};
  for (int j = 0; j <= last; j++) {
    const Tile<D> &keys = tiles[1 + j % 2 * 2], &values = tiles[2 + j % 2 * 2];
    if (j < last) {
      load_tile(tiles[3 - j % 2 * 2], k, (j + 1) * TILE, count);
      load_tile(tiles[4 - j % 2 * 2], v, (j + 1) * TILE, count);
    }
    copy_commit(); // an empty group at the end keeps the count
    copy_wait<1>();
    sync_block();
    // Keys up to the warp's last query, if it has any that is there.
    const int queries = count - from - first;
    const int seen = min(from + first + min(queries, 16) - j * TILE, TILE);
    const Part part = {0, queries > 0 ? (seen + 15) / 16 : 0};
    float s[8][4];
    scores(s, q_tile, first, keys, part);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      // A row always sees the first key, so `most` is finite from there on.
      const int token = from + first + row_of(2 * half);
      float most = top[half];
#pragma unroll
      for (int n = 0; n < 8; n++)
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          s[n][e] = j * TILE + column_of(n, e) <= token ? s[n][e] * scale : -infinity();
          most = fmaxf(most, s[n][e]);
        }
      most = quad_max(most);
      const float fade = fast_exp(top[half] - most);
      float total = 0;
#pragma unroll
      for (int n = 0; n < 8; n++)
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          s[n][e] = fast_exp(s[n][e] - most);
          total += s[n][e];
        }
      top[half] = most;
      sum[half] = sum[half] * fade + quad_sum(total);
#pragma unroll
      for (int n = 0; n < D / 8; n++)
        for (int e = 2 * half; e < 2 * half + 2; e++) acc[n][e] *= fade;
    }
    accumulate(acc, s, values, part);
    sync_block(); // these tiles are loaded over next
  }
  copy_wait<0>();
  const size_t stride = (size_t)query * D;
  store_rows<D>(out + head.start * stride + h * D, stride, from + first, count, acc, 1.0f / sum[0],
                1.0f / sum[1]);
  for (int half = 0; half < 2; half++) {
    const int token = from + first + row_of(2 * half);
    if (lane() % 4 == 0 && token < count) lse[head.lse(token, h)] = top[half] + logf(sum[half]);
  }
}

// `delta[i] = dout · out` and the denominators of 64 queries, to shared memory;
// two threads a query, from rows that are on their way to a tile anyway.
template <int D>
DEVICE void load_statistics(const Head &head, u32 h, Rows o, Rows d, const float *lse, int from,
                            float *delta, float *denominator) {
  const int token = from + threadIdx.x / 2;
  float sum = 0;
  if (token < head.count)
    for (int i = threadIdx.x % 2 * 8; i < D; i += 16) {
      const Eight a = load8(o.base + token * o.stride + i), b = load8(d.base + token * d.stride + i);
      for (int e = 0; e < 8; e++) sum += a.x[e] * b.x[e];
    }
  sum += shuffle_xor(sum, 1);
  if (threadIdx.x % 2) return;
  delta[threadIdx.x / 2] = sum;
  denominator[threadIdx.x / 2] = token < head.count ? lse[head.lse(token, h)] : 0;
}

// dQ. Grid as forward's.
template <int D>
DEVICE void attention_backward_q(const bf16 *qk, const bf16 *qkv, const bf16 *out, const float *lse,
                                 const bf16 *dout, const u32 *bounds, u32 query, u32 kv, float scale,
                                 bf16 *dqkv) {
  DYNAMIC_SHARED(Tile<D>, tiles);
  SHARED(float, delta, TILE);
  SHARED(float, denominator, TILE);
  const Head head(bounds, query, kv);
  const int from = tile_of_queries() * TILE, count = head.count;
  if (from >= count) return;
  const u32 h = blockIdx.y, kv_head = h * kv / query;
  const Rows q = head.q<D>(qk, h), k = head.k<D>(qk, kv_head), v = head.v<D>(qkv, kv_head);
  const Rows o = head.o<D>(out, h), d = head.o<D>(dout, h);
  const int first = warp() * 16;

  load_tile(tiles[0], q, from, count);
  load_tile(tiles[1], d, from, count);
  load_statistics<D>(head, h, o, d, lse, from, delta, denominator);
  float acc[D / 8][4] = {};
  for (int j = 0; j * TILE <= from; j++) {
    sync_block(); // the last tiles have been read
    load_tile(tiles[2], k, j * TILE, count);
    load_tile(tiles[3], v, j * TILE, count);
    copy_commit();
    copy_wait<0>();
    sync_block();
    const int queries = count - from - first;
    const int before = min(from + first + min(queries, 16) - j * TILE, TILE);
    const Part part = {0, queries > 0 ? (before + 15) / 16 : 0};
    float s[8][4], ds[8][4];
    scores(s, tiles[0], first, tiles[2], part);
    scores(ds, tiles[1], first, tiles[3], part);
#pragma unroll
    for (int n = 0; n < 8; n++)
      for (int e = 0; e < 4; e++) {
        const int r = first + row_of(e);
        const bool seen = j * TILE + column_of(n, e) <= from + r;
        const float p = seen ? fast_exp(s[n][e] * scale - denominator[r]) : 0.0f;
        ds[n][e] = p * (ds[n][e] - delta[r]);
      }
    accumulate(acc, ds, tiles[2], part);
  }
  const size_t stride = (size_t)(query + 2 * kv) * D;
  store_rows<D>(dqkv + head.start * stride + h * D, stride, from + first, count, acc, scale, scale);
}

// dK and dV. Grid [rows, key/value heads, tiles of the longest row]: a block sums
// over the query heads that its keys serve, in their order.
template <int D>
DEVICE void attention_backward_kv(const bf16 *qk, const bf16 *qkv, const bf16 *out,
                                  const float *lse, const bf16 *dout, const u32 *bounds, u32 query,
                                  u32 kv, float scale, bf16 *dqkv) {
  DYNAMIC_SHARED(Tile<D>, tiles);
  SHARED(float, delta, TILE);
  SHARED(float, denominator, TILE);
  const Head head(bounds, query, kv);
  const int from = blockIdx.z * TILE, count = head.count;
  if (from >= count) return;
  const u32 kv_head = blockIdx.y, per_kv = query / kv;
  const int first = warp() * 16;

  load_tile(tiles[0], head.k<D>(qk, kv_head), from, count);
  load_tile(tiles[1], head.v<D>(qkv, kv_head), from, count);
  float dk[D / 8][4] = {}, dv[D / 8][4] = {};
  for (u32 h = kv_head * per_kv; h < (kv_head + 1) * per_kv; h++) {
    const Rows q = head.q<D>(qk, h), o = head.o<D>(out, h), d = head.o<D>(dout, h);
    for (int queries = from; queries < count; queries += TILE) {
      sync_block(); // the last tiles and statistics have been read
      load_tile(tiles[2], q, queries, count);
      load_tile(tiles[3], d, queries, count);
      copy_commit();
      load_statistics<D>(head, h, o, d, lse, queries, delta, denominator);
      copy_wait<0>();
      sync_block();
      // Transposed: a row is a key, a column a query.
      const int after = queries == from ? first : 0; // no query before the warp's first key
      const int there = from + first < count ? min(count - queries, TILE) : 0;
      const Part part = {after / 16, (there + 15) / 16};
      float p[8][4], ds[8][4];
      scores(p, tiles[0], first, tiles[2], part);
#pragma unroll
      for (int n = 0; n < 8; n++)
        for (int e = 0; e < 4; e++) {
          const int c = column_of(n, e), token = queries + c;
          const bool seen = from + first + row_of(e) <= token && token < count;
          p[n][e] = seen ? fast_exp(p[n][e] * scale - denominator[c]) : 0.0f;
        }
      accumulate(dv, p, tiles[3], part);
      scores(ds, tiles[1], first, tiles[3], part);
#pragma unroll
      for (int n = 0; n < 8; n++)
        for (int e = 0; e < 4; e++) ds[n][e] = p[n][e] * (ds[n][e] - delta[column_of(n, e)]);
      accumulate(dk, ds, tiles[2], part);
    }
  }
  const size_t stride = (size_t)(query + 2 * kv) * D;
  bf16 *to = dqkv + head.start * stride;
  store_rows<D>(to + (query + kv_head) * D, stride, from + first, count, dk, scale, scale);
  store_rows<D>(to + (query + kv + kv_head) * D, stride, from + first, count, dv, 1.0f, 1.0f);
}

#define ATTENTION(D)                                                                               \
  KERNEL(THREADS)                                                                                  \
  attention_##D(const bf16 *qk, const bf16 *qkv, const u32 *bounds, u32 query, u32 kv,             \
                float scale, bf16 *out, float *lse) {                                              \
    attention<D>(qk, qkv, bounds, query, kv, scale, out, lse);                                     \
  }                                                                                                \
  EXPORT(attention_##D)                                                                            \
  KERNEL_AT_ONCE(THREADS, 3)                                                                       \
  attention_backward_q_##D(const bf16 *qk, const bf16 *qkv, const bf16 *out, const float *lse,     \
                           const bf16 *dout, const u32 *bounds, u32 query, u32 kv, float scale,    \
                           bf16 *dqkv) {                                                           \
    attention_backward_q<D>(qk, qkv, out, lse, dout, bounds, query, kv, scale, dqkv);              \
  }                                                                                                \
  EXPORT(attention_backward_q_##D)                                                                 \
  KERNEL_AT_ONCE(THREADS, 2)                                                                       \
  attention_backward_kv_##D(const bf16 *qk, const bf16 *qkv, const bf16 *out, const float *lse,    \
                            const bf16 *dout, const u32 *bounds, u32 query, u32 kv, float scale,   \
                            bf16 *dqkv) {                                                          \
    attention_backward_kv<D>(qk, qkv, out, lse, dout, bounds, query, kv, scale, dqkv);             \
  }                                                                                                \
  EXPORT(attention_backward_kv_##D)

ATTENTION(32)
ATTENTION(64)
ATTENTION(128)

// Attention of a new token over its slot's cached positions 0..=positions[t]. A block has up
// to SHARING query heads of one token that share their keys and values, which are so read
// once; grid [tokens, kv heads · blocks a kv head]. Its warps take turns with the positions,
// sixteen at a time, keep a softmax each, and at the end put them together.
//
// A product of the tensor cores has sixteen rows, of which the heads are eight. The other
// eight take what is left of the weights once they are rounded, so that both together are
// good to 2^-17, and nothing more is computed for it. Keys and values come straight from
// memory, in the order in which the tensor cores want them: dimensions may be numbered in
// any order, if queries and keys agree, and so may the columns of the output.
constexpr int SHARING = 8, WARPS = 4;

// Two rows' values of column j of a lane's, as a pair.
DEVICE u32 pair_up(u32 even, u32 odd, int j) { return permute(even, odd, j % 2 ? 0x7632 : 0x5410); }

template <int D>
DEVICE void cache_attention(const bf16 *qk, const bf16 *keys, const bf16 *values, const u32 *slots,
                            const u32 *positions, u32 query, u32 kv, u32 capacity, float scale,
                            bf16 *out) {
  constexpr int PIECES = D / 32;             // of sixteen bytes of a key, a lane
  constexpr int OWN = D < 64 ? D / 8 : 8;    // dimensions of a value that a lane has side by side,
  constexpr int HALVES = D / 8 / OWN;        // and how often
  constexpr int ROW = D + 8;                 // the padding spreads heads over the banks
  SHARED(float, tops, WARPS * SHARING);
  SHARED(float, sums, WARPS * SHARING);
  SHARED(uint4, storage, WARPS * SHARING * ROW / 4);
  float *parts = reinterpret_cast<float *>(storage);
  const u32 g = lane() / 4, c = lane() % 4;
  const u32 t = blockIdx.x, per_kv = query / kv, blocks = (per_kv + SHARING - 1) / SHARING;
  const u32 kv_head = blockIdx.y / blocks, before = blockIdx.y % blocks * SHARING;
  const u32 first = kv_head * per_kv + before, count = min(per_kv - before, (u32)SHARING);
  const u32 seen = positions[t] + 1, stride = kv * D;
  const size_t base = ((size_t)slots[t] * capacity * kv + kv_head) * D;
  keys += base + g * stride + c * 8;
  values += base + 2 * c * stride + g * OWN;
  const uint4 nothing = {0, 0, 0, 0};
  uint4 q[PIECES];
#pragma unroll
  for (int i = 0; i < PIECES; i++)
    q[i] = g < count ? load16(qk + ((size_t)t * (query + kv) + first + g) * D + (i * 4 + c) * 8) : nothing;
  float acc[D / 8][4] = {}, top = LOWEST, sum = 0;
  for (u32 from = warp() * 16; from < seen; from += WARPS * 16) {
    // Keys g and g + 8; values 2c, 2c + 1 and these + 8.
    uint4 k[2][PIECES], v[4][HALVES];
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
      const u32 p = from + r * 8 + g;
      const bf16 *at = keys + (from + r * 8) * stride;
#pragma unroll
      for (int i = 0; i < PIECES; i++) k[r][i] = p < seen ? load16(at + i * 32) : nothing;
    }
#pragma unroll
    for (u32 r = 0; r < 4; r++) {
      const u32 p = from + r / 2 * 8 + 2 * c + r % 2;
      const bf16 *at = values + (from + r / 2 * 8 + r % 2) * stride;
#pragma unroll
      for (int h = 0; h < HALVES; h++) {
        v[r][h] = nothing;
        if (p >= seen) continue;
        if (OWN == 8) {
          v[r][h] = load16(at + h * 64);
        } else {
          v[r][h].x = reinterpret_cast<const u32 *>(at)[0];
          v[r][h].y = reinterpret_cast<const u32 *>(at)[1];
        }
      }
    }
    float s[2][4] = {};
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int i = 0; i < PIECES; i++) {
        const u32 early[4] = {q[i].x, 0, q[i].y, 0}, late[4] = {q[i].z, 0, q[i].w, 0};
        multiply(s[r], early, k[r][i].x, k[r][i].y);
        multiply(s[r], late, k[r][i].z, k[r][i].w);
      }
    float most = top;
#pragma unroll
    for (u32 r = 0; r < 2; r++)
      for (u32 e = 0; e < 2; e++) {
        s[r][e] = from + r * 8 + 2 * c + e < seen ? s[r][e] * scale : -infinity();
        most = fmaxf(most, s[r][e]);
      }
    most = quad_max(most);
    const float fade = fast_exp(top - most);
    top = most;
    sum *= fade; // of the lane's own; the quad's are added up at the end
    u32 p[4];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      for (int e = 0; e < 2; e++) {
        s[r][e] = fast_exp(s[r][e] - most);
        sum += s[r][e];
      }
      p[2 * r] = pack(s[r][0], s[r][1]);
      p[2 * r + 1] = pack(s[r][0] - low(p[2 * r]), s[r][1] - high(p[2 * r]));
    }
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
      for (int e = 0; e < 4; e++) acc[n][e] *= fade;
      const int h = n / OWN, j = n % OWN;
      multiply(acc[n], p, pair_up(word(v[0][h], j / 2), word(v[1][h], j / 2), j),
               pair_up(word(v[2][h], j / 2), word(v[3][h], j / 2), j));
    }
  }
  sum = quad_sum(sum);
  if (g < count) {
    const u32 part = warp() * SHARING + g;
    if (c == 0) {
      tops[part] = top;
      sums[part] = sum;
    }
    // acc[OWN h + j][e] is dimension 8 OWN h + OWN (2c + e) + j.
#pragma unroll
    for (int n = 0; n < D / 8; n += 4)
#pragma unroll
      for (u32 e = 0; e < 2; e++) {
        u32 four[4];
#pragma unroll
        for (int j = 0; j < 4; j++) four[j] = as_bits(acc[n + j][e] + acc[n + j][e + 2]);
        store16(parts + part * ROW + n / OWN * OWN * 8 + (2 * c + e) * OWN + n % OWN,
                uint4{four[0], four[1], four[2], four[3]});
      }
  }
  sync_block();
  for (u32 i = threadIdx.x * 4; i < count * D; i += blockDim.x * 4) {
    const u32 h = i / D;
    float most = LOWEST, total = 0, value[4] = {};
    for (u32 w = 0; w < WARPS; w++) most = fmaxf(most, tops[w * SHARING + h]);
    for (u32 w = 0; w < WARPS; w++) {
      const float by = fast_exp(tops[w * SHARING + h] - most);
      const uint4 part = load16(parts + (w * SHARING + h) * ROW + i % D);
      total += by * sums[w * SHARING + h];
      for (int j = 0; j < 4; j++) value[j] += by * as_float(word(part, j));
    }
    const float whole = fast_reciprocal(total);
    u32 *to = reinterpret_cast<u32 *>(out + ((size_t)t * query + first) * D + i);
    to[0] = pack(value[0] * whole, value[1] * whole);
    to[1] = pack(value[2] * whole, value[3] * whole);
  }
}

#define CACHE_ATTENTION(D)                                                                         \
  KERNEL_AT_ONCE(WARPS * 32, 3)                                                                    \
  cache_attention_##D(const bf16 *__restrict__ qk, const bf16 *__restrict__ keys,                  \
                      const bf16 *__restrict__ values, const u32 *__restrict__ slots,              \
                      const u32 *__restrict__ positions, u32 query, u32 kv, u32 capacity,          \
                      float scale, bf16 *__restrict__ out) {                                       \
    cache_attention<D>(qk, keys, values, slots, positions, query, kv, capacity, scale, out);       \
  }                                                                                                \
  EXPORT(cache_attention_##D)

CACHE_ATTENTION(32)
CACHE_ATTENTION(64)
CACHE_ATTENTION(128)
