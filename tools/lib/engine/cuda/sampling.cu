// Choosing the next token; a block a row.
//
// Nothing is sorted. The order of likelihood is walked as a number: a logit's
// bits make a key that sorts as the logit does, and eight bits of it at a time,
// from the top, a histogram tells in which part of the order a running sum
// passes a target. Weights are integers (2^-40 of the largest), so that the sums
// do not depend on the order in which threads add.

constexpr float ONE = 1099511627776.0f; // 2^40

struct Logits {
  const float *x;
  u32 width;
  float top, temperature;

  // Larger for the likelier; as f32's total order.
  DEVICE_MEMBER u32 key(u32 i) const {
    const u32 bits = as_bits(x[i]);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
  }
  DEVICE_MEMBER u64 weight(u32 i) const { return (u64)(expf((x[i] - top) / temperature) * ONE); }
};

// A place in the order of likelihood: number `rank`, by id, of those with `key`.
struct Place {
  u32 key, rank;
};

// Where the running sum of weights (or, with COUNT, of ones) first exceeds
// `target`, which is less than the sum of all.
template <bool COUNT> DEVICE Place locate(const Logits &logits, u64 target, u64 *histogram) {
  u32 prefix = 0;
  u64 before = 0, each = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    sync_block();
    for (u32 i = threadIdx.x; i < 256; i += blockDim.x) histogram[i] = 0;
    sync_block();
    for (u32 i = threadIdx.x; i < logits.width; i += blockDim.x) {
      const u32 key = logits.key(i);
      if (shift == 24 || key >> (shift + 8) == prefix)
        atomic_add(&histogram[key >> shift & 255], COUNT ? 1 : logits.weight(i));
    }
    sync_block();
    u32 digit = 255;
    while (digit > 0 && before + histogram[digit] <= target) before += histogram[digit--];
    prefix = prefix << 8 | digit;
  }
  if (COUNT) {
    each = 1;
  } else {
    const float x = as_float(prefix >> 31 ? prefix & 0x7fffffffu : ~prefix);
    each = (u64)(expf((x - logits.top) / logits.temperature) * ONE);
  }
  return Place{prefix, (u32)((target - before) / (each ? each : 1))};
}

// The sum of weights up to and with a place.
DEVICE u64 mass_until(const Logits &logits, Place place, u64 *partial) {
  u64 sum = 0;
  for (u32 i = threadIdx.x; i < logits.width; i += blockDim.x) {
    const u32 key = logits.key(i);
    if (key > place.key) sum += logits.weight(i);
  }
  const float x = as_float(place.key >> 31 ? place.key & 0x7fffffffu : ~place.key);
  const u64 each = (u64)(expf((x - logits.top) / logits.temperature) * ONE);
  return block_sum(sum, partial) + (place.rank + 1) * each;
}

// The token at a place: each thread counts in a stretch of ids of its own.
DEVICE void write_token(const Logits &logits, Place place, u32 *counts, u32 *out) {
  const u32 stretch = (logits.width + blockDim.x - 1) / blockDim.x;
  const u32 from = min(threadIdx.x * stretch, logits.width), to = min(from + stretch, logits.width);
  u32 count = 0;
  for (u32 i = from; i < to; i++) count += logits.key(i) == place.key;
  sync_block();
  counts[threadIdx.x] = count;
  sync_block();
  u32 before = 0;
  for (u32 i = 0; i < threadIdx.x; i++) before += counts[i];
  if (place.rank < before || place.rank >= before + count) return;
  for (u32 i = from; i < to; i++)
    if (logits.key(i) == place.key && before++ == place.rank) *out = i;
}

// As the CPU's `choose`: temperature (0: the likeliest), then the `top_k` (0: all)
// likeliest, then the fewest that hold `top_p` of those; one of them by a draw
// keyed by (seed, item, position).
KERNEL(256)
sample(const float *__restrict__ values, u32 width, const u32 *__restrict__ items,
       const u32 *__restrict__ positions, float temperature, u32 top_k, float top_p, u64 seed,
       u32 *__restrict__ out) {
  SHARED(float, partial, 32);
  SHARED(u64, sums, 32);
  SHARED(u64, histogram, 256);
  SHARED(u32, counts, 256);
  Logits logits{values + (size_t)blockIdx.x * width, width, -infinity(), temperature};
  float top = -infinity();
  for (u32 i = threadIdx.x; i < width; i += blockDim.x) top = fmaxf(top, logits.x[i]);
  logits.top = block_max(top, partial);
  out += blockIdx.x;
  if (temperature == 0.0f) return write_token(logits, locate<true>(logits, 0, histogram), counts, out);

  const u32 kept = top_k && top_k < width ? top_k : width;
  u64 inside = mass_until(logits, locate<true>(logits, kept - 1, histogram), sums);
  if (top_p < 1.0f) {
    const double wanted = ceil((double)top_p * inside);
    const u64 target = wanted >= 1.0 ? (u64)wanted - 1 : 0;
    inside = mass_until(logits, locate<false>(logits, target, histogram), sums);
  }
  const Bits bits = philox(seed, items[blockIdx.x], positions[blockIdx.x], 0, 3u << 28);
  const u64 draw = ((u64)bits.word[0] << 32 | bits.word[1]) >> 11;
  const u64 target = (u64)((double)draw * (1.0 / 9007199254740992.0) * inside);
  write_token(logits, locate<false>(logits, target, histogram), counts, out);
}
EXPORT(sample)
