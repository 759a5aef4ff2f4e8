// The streams of engine::rng, bit for bit.

struct Bits {
  u32 word[4];
};

// Philox 4×32-10 (Salmon et al., SC 2011).
DEVICE Bits philox(u64 seed, u32 x, u32 y, u32 z, u32 tag) {
  u32 key0 = (u32)seed, key1 = (u32)(seed >> 32);
  Bits c = {{x, y, z, tag}};
  for (int round = 0; round < 10; round++) {
    const Long x = long_product(0xD2511F53u, c.word[0]), z = long_product(0xCD9E8D57u, c.word[2]);
    c = Bits{{z.high ^ c.word[1] ^ key0, z.low, x.high ^ c.word[3] ^ key1, x.low}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// Adds noise, uniform in ±alpha / √(length · width), to rows x [tokens, width] that
// lie between `bounds`; grid [rows, longest], a block a token.
KERNEL(256)
add_noise(const u32 *__restrict__ bounds, const u32 *__restrict__ rows, u32 width, u64 seed,
          u32 step, u32 stream, float alpha, bf16 *__restrict__ x) {
  const u32 start = bounds[blockIdx.x], length = bounds[blockIdx.x + 1] - start;
  const float bound = alpha / sqrtf((float)(length * width));
  // A row may have more tokens than a grid has blocks that way.
  for (u32 position = blockIdx.y; position < length; position += gridDim.y) {
    bf16 *row = x + (size_t)(start + position) * width;
    for (u32 block = threadIdx.x; block < width / 8; block += blockDim.x) {
      const Bits bits = philox(seed, rows[start], step, position, stream | block);
      Eight v = load8(row + block * 8);
      for (int e = 0; e < 8; e++) {
        const int draw = bits.word[e / 2] >> 16 * (e % 2) & 0xffff;
        const float unit = (float)(2 * draw - 65535) * (1.0f / 65536);
        v.x[e] = add_rn(v.x[e], mul_rn(unit, bound));
      }
      store8(row + block * 8, v);
    }
  }
}
EXPORT(add_noise)

// Two values of a normal distribution, from 24 bits each (Box and Muller, 1958).
DEVICE void normal_pair(u32 a, u32 b, float deviation, float *out) {
  const float unit = (float)((a >> 8) + 1) * (1.0f / 16777216); // never 0
  const float radius = deviation * sqrtf(-2.0f * logf(unit));
  float sine, cosine;
  sine_cosine_pi((float)(b >> 8) * (1.0f / 8388608), &sine, &cosine);
  out[0] = radius * cosine;
  out[1] = radius * sine;
}

// Values `first` to `first + count` (multiples of eight) of random weight `number`,
// for measurements: a block of bits is four of them.
KERNEL(256)
random_weight(u64 seed, u32 number, u32 stream, u64 first, u64 count, float deviation,
              bf16 *__restrict__ out) {
  const u64 i = global_thread() * 8;
  if (i >= count) return;
  Eight v;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const u64 block = (first + i) / 4 + half;
    const Bits bits = philox(seed, (u32)block, (u32)(block >> 32), number, stream);
#pragma unroll
    for (int pair = 0; pair < 2; pair++)
      normal_pair(bits.word[2 * pair], bits.word[2 * pair + 1], deviation, v.x + 4 * half + 2 * pair);
  }
  store8(out + i, v);
}
EXPORT(random_weight)
