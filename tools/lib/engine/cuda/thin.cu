// Low-rank products of dropped-out inputs, x [tokens, inputs] under a mask of its own
// for each member of a group. The masks are drawn where they are used, forward and
// backward, so that no dropped copy is written or read again (but for large ranks: see
// src/cuda/thin.rs). A draw of Philox decides eight neighbouring inputs of a token; in
// each product the lanes of a warp share out inputs such that eight of them are always
// one lane's, and no draw is made twice. That takes no shuffles: rows and columns of a
// product may be numbered in any order.
//
// What is kept is scaled, by 1 / (1 - p), once a sum is there. Sums are f32, in an order
// that the sizes alone decide.

// The members of a group that have adapters: their ranks, which lie side by side in
// [tokens, ranks] and one below the other in A [ranks, inputs], and their streams.
#define MEMBERS                                                                                    \
  u32 rank0, u32 rank1, u32 rank2, u32 stream0, u32 stream1, u32 stream2

// Tiles of 16 ranks, as which dxa lies [tokens, 16 tiles]; columns that are no rank are 0.
DEVICE u32 tiles_of(u32 rank0, u32 rank1, u32 rank2) {
  return (rank0 + 15) / 16 + (rank1 + 15) / 16 + (rank2 + 15) / 16;
}

DEVICE u32 of(u32 member, u32 a, u32 b, u32 c) { return member == 0 ? a : member == 1 ? b : c; }

// Tile `tile` of a group whose ranks are cut into tiles of N, none of two members.
struct Cut {
  u32 member, column, left; // its first column of all ranks; the member's ranks from there on

  template <int N> DEVICE_MEMBER static Cut at(u32 tile, u32 rank0, u32 rank1, u32 rank2) {
    const u32 second = (rank0 + N - 1) / N, third = second + (rank1 + N - 1) / N;
    const u32 member = tile < second ? 0 : tile < third ? 1 : 2;
    const u32 start = (tile - of(member, 0, second, third)) * N; // in the member
    const u32 rank = of(member, rank0, rank1, rank2);
    return Cut{member, of(member, 0, rank0, rank0 + rank1) + start, start < rank ? rank - start : 0};
  }
};

// `philox` at (row, step, position), for several blocks: of the first three rounds most
// depends on the token alone.
struct Draws {
  u32 key0, key1, first, second, third, fourth, fifth;

  DEVICE_MEMBER Draws(u64 seed, u32 row, u32 step, u32 position)
      : key0((u32)seed), key1((u32)(seed >> 32)) {
    const Long x = long_product(0xD2511F53u, row), z = long_product(0xCD9E8D57u, position);
    first = x.high ^ key1;
    second = z.low ^ round0(1);
    const Long c = long_product(0xD2511F53u, z.high ^ step ^ key0);
    const Long d = long_product(0xCD9E8D57u, c.high ^ x.low ^ round1(1));
    third = d.high ^ round0(2);
    fourth = c.low ^ round1(2);
    fifth = d.low;
  }

  DEVICE_MEMBER Bits block(u32 stream_and_block) const {
    const Long a = long_product(0xCD9E8D57u, first ^ stream_and_block);
    const Long b = long_product(0xD2511F53u, a.high ^ second);
    Bits c = {{a.low ^ third, fifth, b.high ^ fourth, b.low}};
#pragma unroll
    for (u32 round = 3; round < 10; round++) {
      const Long x = long_product(0xD2511F53u, c.word[0]), z = long_product(0xCD9E8D57u, c.word[2]);
      c = Bits{{z.high ^ c.word[1] ^ round0(round), z.low, x.high ^ c.word[3] ^ round1(round), x.low}};
    }
    return c;
  }

private:
  DEVICE_MEMBER u32 round0(u32 round) const { return key0 + round * 0x9E3779B9u; }
  DEVICE_MEMBER u32 round1(u32 round) const { return key1 + round * 0xBB67AE85u; }
};

// Values whose draw is less than a threshold are dropped.
struct Threshold {
  u32 low, rest; // its lower fifteen bits, twice; all ones where the highest is 0

  explicit DEVICE_MEMBER Threshold(u32 least)
      : low((least & 0x7fff) * 0x10001u), rest((least >> 15) - 1) {}

  // Two neighbouring values, without branches: at a half's highest bit `above` says
  // whether the draw's lower fifteen bits are no less than the threshold's.
  DEVICE_MEMBER u32 kept(u32 pair, u32 draws) const {
    const u32 above = (draws | 0x80008000u) - low;
    return pair & permute((draws & above) | ((draws | above) & rest), 0, 0xbb99);
  }
  DEVICE_MEMBER uint4 kept(const uint4 &x, const Bits &draws) const {
    return uint4{kept(x.x, draws.word[0]), kept(x.y, draws.word[1]), kept(x.z, draws.word[2]),
                 kept(x.w, draws.word[3])};
  }
};

// out [tokens, width] = kept(x), of one module; a block a token.
KERNEL(256)
thin_copy(const bf16 *__restrict__ x, const u32 *__restrict__ rows,
          const u32 *__restrict__ positions, u32 width, u64 seed, u32 step, u32 stream, u32 least,
          bf16 *__restrict__ out) {
  const Draws keys(seed, rows[blockIdx.x], step, positions[blockIdx.x]);
  const Threshold threshold(least);
  const size_t start = (size_t)blockIdx.x * width;
  for (u32 block = threadIdx.x; block < width / 8; block += blockDim.x)
    store16(out + start + block * 8,
            threshold.kept(load16(x + start + block * 8), keys.block(stream | block)));
}
EXPORT(thin_copy)

constexpr int THIN = 8;  // warps of a block
constexpr int RANKS = 6; // most tiles of eight ranks of a block of `thin_product`
constexpr int STAGES = 3;

// xa [tokens, ranks] = scale · kept(x) Aᵀ, for `breadth` tiles of ranks a block. Of the
// eight warps `split` share 16 tokens and take turns with the inputs, 32 at a time, eight
// a lane; the others have other tokens, and find in the cache what of A these have read.
// What a lane needs it copies itself, two turns ahead, so that warps need not meet.
KERNEL(256)
thin_product(const bf16 *__restrict__ x, const bf16 *__restrict__ a, const u32 *__restrict__ rows,
             const u32 *__restrict__ positions, u32 tokens, u32 inputs, u64 seed, u32 step,
             u32 least, float scale, MEMBERS, u32 split, u32 breadth, bf16 *__restrict__ xa) {
  DYNAMIC_SHARED(uint4, slots); // [STAGES, THIN, RANKS + 2, 32]
  const int g = lane() / 4, c = lane() % 4;
  const u32 part = warp() % split, start = (blockIdx.x * (THIN / split) + warp() / split) * 16;
  const Threshold threshold(least);
  // What is beyond the tokens, and beyond a member's ranks, is computed and not stored.
  const u32 at[2] = {min(start + g, tokens - 1), min(start + g + 8, tokens - 1)};
  const Draws keys[2] = {Draws(seed, rows[at[0]], step, positions[at[0]]),
                         Draws(seed, rows[at[1]], step, positions[at[1]])};
  u32 tiles = 0, owners = 0; // of a member's eight bits in `owners` its tiles' are set
  const bf16 *from[RANKS + 2];
#pragma unroll
  for (u32 j = 0; j < RANKS; j++) {
    const Cut cut = Cut::at<8>(blockIdx.y * breadth + j, rank0, rank1, rank2);
    if (j < breadth && cut.left > 0) tiles = j + 1, owners |= 1u << (cut.member * 8 + j);
    from[j] = a + (size_t)(cut.column + min((u32)g, cut.left - 1)) * inputs + part * 32 + c * 8;
  }
  for (u32 h = 0; h < 2; h++) from[RANKS + h] = x + (size_t)at[h] * inputs + part * 32 + c * 8;
  uint4 *mine = slots + warp() * (RANKS + 2) * 32 + lane(); // a stage is this far from the next
  constexpr u32 STAGE = THIN * (RANKS + 2) * 32;
  u32 input = part * 32 + c * 8; // of the next turn
  auto fetch = [&](u32 stage) {
#pragma unroll
    for (u32 k = 0; k < RANKS + 2; k++) {
      uint4 *to = mine + stage * STAGE + k * 32;
      const bf16 *at = input < inputs ? from[k] : x;
      if (k >= RANKS)
        copy_async(to, at, input < inputs);
      else if (k < tiles)
        copy_async_cached(to, at, input < inputs);
      from[k] += split * 32;
    }
    input += split * 32;
    copy_commit();
  };
  float acc[RANKS][4] = {};
  fetch(0);
  fetch(1);
  u32 stage = 0;
  for (u32 piece = part; piece * 32 < inputs; piece += split) {
    fetch((stage + 2) % STAGES);
    copy_wait<2>();
    const uint4 *arrived = mine + stage * STAGE;
    const uint4 now[2] = {load16(arrived + RANKS * 32), load16(arrived + (RANKS + 1) * 32)};
#pragma unroll 1
    for (u32 member = 0; member < 3; member++) {
      const u32 own = owners >> member * 8;
      if ((own & 255) == 0) continue;
      const u32 stream = of(member, stream0, stream1, stream2) | (piece * 4 + c);
      const uint4 upper = threshold.kept(now[0], keys[0].block(stream));
      const uint4 lower = threshold.kept(now[1], keys[1].block(stream));
      const u32 early[4] = {upper.x, lower.x, upper.y, lower.y};
      const u32 late[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
      for (u32 j = 0; j < RANKS; j++)
        if (own >> j & 1) {
          const uint4 b = load16(arrived + j * 32);
          multiply(acc[j], early, b.x, b.y);
          multiply(acc[j], late, b.z, b.w);
        }
    }
    stage = (stage + 1) % STAGES;
  }
  copy_wait<0>();
  sync_block(); // the slots become sums [THIN, 16, 8 RANKS + 4]
  float *partial = reinterpret_cast<float *>(slots);
  constexpr u32 WIDTH = RANKS * 8 + 4; // spreads tokens over the banks
#pragma unroll
  for (int j = 0; j < RANKS; j++)
    for (int e = 0; e < 4; e++)
      partial[(warp() * 16 + g + e / 2 * 8) * WIDTH + j * 8 + 2 * c + e % 2] = acc[j][e];
  sync_block();
  for (u32 i = threadIdx.x; i < THIN / split * 16 * RANKS * 8; i += blockDim.x) {
    const u32 column = i % (RANKS * 8), token = i / (RANKS * 8); // of the block's
    const u32 to = blockIdx.x * (THIN / split) * 16 + token;
    const Cut cut = Cut::at<8>(blockIdx.y * breadth + column / 8, rank0, rank1, rank2);
    if (to >= tokens || column / 8 >= tiles || column % 8 >= cut.left) continue;
    const float *own = partial + (token / 16 * split * 16 + token % 16) * WIDTH + column;
    float sum = 0;
    u32 s = 0;
    do sum += own[s * 16 * WIDTH];
    while (++s < split);
    xa[(size_t)to * (rank0 + rank1 + rank2) + cut.column + column % 8] = narrow(scale * sum);
  }
}
EXPORT(thin_product)

constexpr int WIDE = 64; // inputs of a block of the gradients' kernels
constexpr int HIGH = 3;  // tiles of 16 ranks of a block of `thin_factors`

// Adds a gradient of A where its member's lies.
DEVICE void onto_factor(float *grads0, float *grads1, float *grads2, u32 member, size_t at,
                        float value) {
  float *grads = member == 0 ? grads0 : member == 1 ? grads1 : grads2;
  grads[at] += value;
}

// dA [ranks, inputs] += scale · dxaᵀ kept(x), for 48 ranks from 48 blockIdx.y on and 64
// inputs from 64 blockIdx.x on. The warps take turns with the tokens, 16 at a time, of
// which a lane has eight inputs of four; the blocks along z have a stretch of the tokens
// each, and leave their sums in `partial` [stretches, ranks, inputs] for `thin_sum`.
KERNEL(256)
thin_factors(const bf16 *__restrict__ x, const bf16 *__restrict__ dxa, const u32 *__restrict__ rows,
             const u32 *__restrict__ positions, u32 tokens, u32 inputs, u64 seed, u32 step,
             u32 least, float scale, MEMBERS, float *__restrict__ grads0, float *__restrict__ grads1,
             float *__restrict__ grads2, float *__restrict__ partial) {
  SHARED(uint4, storage, THIN * 2 * HIGH * 16 * 24 / 8);
  float *sums = reinterpret_cast<float *>(storage); // once the tokens are through
  bf16(*staged)[HIGH][16][24] = reinterpret_cast<bf16(*)[HIGH][16][24]>(storage) + warp() * 2;
  const int g = lane() / 4, c = lane() % 4;
  const u32 ranks = rank0 + rank1 + rank2, high = blockIdx.y * HIGH;
  const u32 i = min(blockIdx.x * WIDE + g * 8, inputs - 8); // what is beyond is not stored
  const u32 width = tiles_of(rank0, rank1, rank2) * 16;
  const Threshold threshold(least);
  const u32 tiles = (tokens + 15) / 16, stretch = (tiles + gridDim.z - 1) / gridDim.z;
  const u32 from = blockIdx.z * stretch, end = min(from + stretch, tiles);
  Cut cuts[HIGH];
#pragma unroll
  for (int t = 0; t < HIGH; t++) cuts[t] = Cut::at<16>(high + t, rank0, rank1, rank2);
  auto load = [&](uint4 (&to)[4], u32 tile) {
    for (u32 e = 0; e < 4; e++)
      to[e] = load16(x + (size_t)min(tile * 16 + c * 4 + e, tokens - 1) * inputs + i);
  };
  // What is beyond the tokens is zero here, and so counts for nothing in x.
  auto stage = [&](u32 buffer, u32 tile) {
    const u32 token = tile * 16 + lane() / 2, half = lane() % 2 * 8;
    for (u32 t = 0; t < HIGH; t++) {
      const bool there = tile < end && token < tokens && (high + t) * 16 < width;
      copy_async(&staged[buffer][t][lane() / 2][half],
                 dxa + (there ? (size_t)token * width + (high + t) * 16 + half : 0), there);
    }
    copy_commit();
  };
  float acc[HIGH][8][4] = {};
  uint4 now[4], next[4];
  load(next, from + warp());
  stage(0, from + warp());
  u32 buffer = 0;
  for (u32 base = from; base < end; base += THIN, buffer ^= 1) {
    const u32 tile = base + warp();
    for (int e = 0; e < 4; e++) now[e] = next[e];
    copy_wait<0>();
    sync_block(); // all lanes have their copies, and are through with the other buffer
    load(next, tile + THIN); // under way while this one is multiplied
    stage(buffer ^ 1, tile + THIN);
    u32 row[4], position[4];
    for (u32 e = 0; e < 4; e++) {
      const u32 at = min(tile * 16 + c * 4 + e, tokens - 1);
      row[e] = rows[at];
      position[e] = positions[at];
    }
    const Draws keys[4] = {Draws(seed, row[0], step, position[0]), Draws(seed, row[1], step, position[1]),
                           Draws(seed, row[2], step, position[2]), Draws(seed, row[3], step, position[3])};
    // dxaᵀ: columns 2c, 2c + 1 and these + 8 of the tensor cores are tokens 4c to 4c + 3.
    u32 d[HIGH][4];
    const int token = lane() % 8 / 2 * 4 + lane() % 2 + lane() / 16 * 2;
#pragma unroll
    for (int t = 0; t < HIGH; t++)
      load_matrices_transposed(d[t], &staged[buffer][t][token][lane() / 8 % 2 * 8]);
#pragma unroll 1
    for (u32 member = 0; member < 3; member++) {
      bool mine[HIGH], any = false;
#pragma unroll
      for (int t = 0; t < HIGH; t++) {
        mine[t] = cuts[t].member == member && cuts[t].left > 0;
        any |= mine[t];
      }
      if (!any) continue;
      const u32 stream = of(member, stream0, stream1, stream2) | i / 8;
      uint4 left[4];
#pragma unroll
      for (int e = 0; e < 4; e++) left[e] = threshold.kept(now[e], keys[e].block(stream));
      u32 pairs[8][2]; // of each of a lane's eight inputs the tokens, two by two
#pragma unroll
      for (int j = 0; j < 8; j++)
        for (int k = 0; k < 2; k++)
          pairs[j][k] = permute(word(left[2 * k], j / 2), word(left[2 * k + 1], j / 2),
                                j % 2 ? 0x7632 : 0x5410);
#pragma unroll
      for (int t = 0; t < HIGH; t++)
        if (mine[t])
#pragma unroll
          for (int j = 0; j < 8; j++) multiply(acc[t][j], d[t], pairs[j][0], pairs[j][1]);
    }
  }
  copy_wait<0>(); // that of a tile beyond the last
#pragma unroll
  for (int t = 0; t < HIGH; t++) {
    if (cuts[t].left == 0) break;
    sync_block(); // the last use of `sums` is over
#pragma unroll
    for (int j = 0; j < 8; j++)
      for (int e = 0; e < 4; e++)
        sums[(warp() * 16 + g + e / 2 * 8) * (WIDE + 4) + (2 * c + e % 2) * 8 + j] = acc[t][j][e];
    sync_block();
    for (u32 k = threadIdx.x; k < 16 * WIDE; k += blockDim.x) {
      const u32 r = k / WIDE, input = blockIdx.x * WIDE + k % WIDE;
      if (r >= cuts[t].left || input >= inputs) continue;
      float sum = 0;
      for (u32 w = 0; w < THIN; w++) sum += sums[(w * 16 + r) * (WIDE + 4) + k % WIDE];
      const u32 column = cuts[t].column + r;
      const u32 above = of(cuts[t].member, 0, rank0, rank0 + rank1);
      if (partial)
        partial[((size_t)blockIdx.z * ranks + column) * inputs + input] = sum;
      else
        onto_factor(grads0, grads1, grads2, cuts[t].member,
                    (size_t)(column - above) * inputs + input, scale * sum);
    }
  }
}
EXPORT(thin_factors)

// dA += scale · the sum of `partial` [stretches, ranks, inputs] in order; a block along y
// has a rank.
KERNEL(256)
thin_sum(const float *__restrict__ partial, u32 stretches, u32 inputs, float scale, u32 rank0,
         u32 rank1, u32 ranks, float *__restrict__ grads0, float *__restrict__ grads1,
         float *__restrict__ grads2) {
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x, column = blockIdx.y;
  if (i >= inputs) return;
  float sum = 0;
  for (u32 s = 0; s < stretches; s++) sum += partial[((size_t)s * ranks + column) * inputs + i];
  const u32 member = column < rank0 ? 0 : column < rank0 + rank1 ? 1 : 2;
  const u32 above = of(member, 0, rank0, rank0 + rank1);
  onto_factor(grads0, grads1, grads2, member, (size_t)(column - above) * inputs + i, scale * sum);
}
EXPORT(thin_sum)

constexpr int SLAB = 8; // tiles of 16 ranks of A that a block of `thin_inputs` holds at a time

// dx [tokens, inputs] = scale · Σ kept(dxa A) over the members, for 64 inputs from
// 64 blockIdx.x on. A warp has 16 tokens, of which a lane has 16 inputs of two; a block
// along y goes on with tokens 128 gridDim.y further. A lies in shared memory, whole if
// its tiles are no more than SLAB, so that it is read once; with column 8 s + j holding
// input 8 j + s, that the tensor cores leave a lane what one draw decides.
KERNEL(256)
thin_inputs(const bf16 *__restrict__ dxa, const bf16 *__restrict__ a, const u32 *__restrict__ rows,
            const u32 *__restrict__ positions, u32 tokens, u32 inputs, u64 seed, u32 step,
            u32 least, float scale, MEMBERS, bf16 *__restrict__ dx) {
  SHARED(uint4, slab_storage, SLAB * 16 * (WIDE + 8) / 8); // rows of which no two collide
  bf16(*slab)[WIDE + 8] = reinterpret_cast<bf16(*)[WIDE + 8]>(slab_storage);
  const int g = lane() / 4, c = lane() % 4;
  const u32 first = blockIdx.x * WIDE;
  const u32 tiles = tiles_of(rank0, rank1, rank2);
  auto fill = [&](u32 tile) {
    for (u32 i = threadIdx.x; i < SLAB * 16 * (WIDE / 16); i += blockDim.x) {
      const u32 r = i / (WIDE / 16), s = i % (WIDE / 16) * 2; // eights s and s + 1 of a rank
      if (tile + r / 16 >= tiles) break;
      const Cut cut = Cut::at<16>(tile + r / 16, rank0, rank1, rank2);
      auto load = [&](u32 input) {
        return r % 16 < cut.left && input < inputs
                   ? load16(a + (size_t)(cut.column + r % 16) * inputs + input)
                   : uint4{0, 0, 0, 0};
      };
      const uint4 one = load(first + s * 8), two = load(first + s * 8 + 8);
#pragma unroll
      for (int j = 0; j < 8; j++)
        *reinterpret_cast<u32 *>(&slab[r][j * 8 + s]) =
            permute(word(one, j / 2), word(two, j / 2), j % 2 ? 0x7632 : 0x5410);
    }
  };
  for (u32 base = blockIdx.y * 16 * THIN; base < tokens; base += gridDim.y * 16 * THIN) {
    const u32 token[2] = {base + warp() * 16 + g, base + warp() * 16 + g + 8};
    const u32 at[2] = {min(token[0], tokens - 1), min(token[1], tokens - 1)};
    const Draws keys[2] = {Draws(seed, rows[at[0]], step, positions[at[0]]),
                           Draws(seed, rows[at[1]], step, positions[at[1]])};
    float sum[8][4] = {};
    u32 tile = 0;
#pragma unroll 1
    for (u32 member = 0; member < 3; member++) {
      const u32 rank = of(member, rank0, rank1, rank2);
      if (rank == 0) continue;
      float acc[8][4] = {};
#pragma unroll 1
      for (u32 start = 0; start < rank; start += 16, tile++) {
        if (tile % SLAB == 0 && (tiles > SLAB || base == blockIdx.y * 16 * THIN)) {
          sync_block(); // the last use of the slab is over
          fill(tile);
          sync_block();
        }
        u32 d[4];
#pragma unroll
        for (u32 k = 0; k < 4; k++) // rows g and g + 8, then eight ranks further
          d[k] = *reinterpret_cast<const u32 *>(dxa + ((size_t)at[k % 2] * tiles + tile) * 16 + 2 * c +
                                                k / 2 * 8);
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
          u32 b[4];
          load_matrices_transposed(
              b, &slab[tile % SLAB * 16 + lane() % 16][j * 8 + lane() / 16 * 8]);
          multiply(acc[j], d, b[0], b[1]);
          multiply(acc[j + 1], d, b[2], b[3]);
        }
      }
      // acc[j][2 h + s] is input 8 (2 c + s) + j of token h.
      const u32 stream = of(member, stream0, stream1, stream2) | (first / 8 + 2 * c);
#pragma unroll
      for (u32 e = 0; e < 4; e++) {
        const Bits draws = keys[e / 2].block(stream + e % 2);
#pragma unroll
        for (int j = 0; j < 8; j++) {
          const u32 draw = j % 2 ? draws.word[j / 2] : draws.word[j / 2] << 16;
          if (draw >= least << 16) sum[j][e] += acc[j][e];
        }
      }
    }
#pragma unroll
    for (u32 e = 0; e < 4; e++) {
      const u32 input = first + (2 * c + e % 2) * 8;
      if (token[e / 2] >= tokens || input >= inputs) continue;
      Eight v;
      for (int j = 0; j < 8; j++) v.x[j] = scale * sum[j][e];
      store8(dx + (size_t)token[e / 2] * inputs + input, v);
    }
  }
}
EXPORT(thin_inputs)
