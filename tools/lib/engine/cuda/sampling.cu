// Choosing the next token; a block a row.
//
// Nothing is sorted. The order of likelihood is walked as a number: a logit's
// bits make a key that sorts as the logit does, and eleven bits of it at a time,
// from the top, a histogram tells in which part of the order a running sum
// passes a target. Weights are integers (2^-40 of the largest), so that the sums
// do not depend on the order in which threads add.

constexpr float ONE = 1099511627776.0f; // 2^40
constexpr u32 CHOOSERS = 1024;          // threads of a block
constexpr u32 BUCKETS = 2 * CHOOSERS;   // of the histogram: eleven bits

struct Logits {
  const float *x;
  u32 width;
  float top, temperature;

  // The last bit of an exponential is the device's own, so that a draw next to where two
  // tokens meet may take the other one than on the CPU; the likeliest is the same.
  DEVICE_MEMBER u64 weight(float x) const { return (u64)(expf((x - top) / temperature) * ONE); }
};

// Larger for the likelier; as f32's total order. And back.
DEVICE u32 key_of(float x) {
  const u32 bits = as_bits(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float of_key(u32 key) { return as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

template <class F> DEVICE void each(const Logits &logits, F f) {
  each(logits.x, threadIdx.x, logits.width, CHOOSERS, f);
}

// What a block has in common: a histogram, its warps' sums, and what was found in it. The
// machine adds 32 bits in shared memory at once, 64 only by trying again until no other
// thread came between: so sums are in two halves.
struct Histogram {
  u32 low[BUCKETS], high[BUCKETS];
  u64 warps[32], before;
  u32 bucket;

  DEVICE_MEMBER void count(u32 bucket) { atomic_add(&low[bucket], 1); }
  DEVICE_MEMBER void add(u32 bucket, u64 x) {
    const u32 down = (u32)x, old = atomic_add(&low[bucket], down);
    const u32 up = (u32)(x >> 32) + (old + down < old);
    if (up) atomic_add(&high[bucket], up);
  }
  DEVICE_MEMBER u64 sum(u32 bucket) const { return (u64)high[bucket] << 32 | low[bucket]; }
};

// The sum of x over the threads before this one (an exclusive prefix sum); afterwards
// histogram.warps has the warps' sums.
DEVICE u64 sum_before(u64 x, Histogram &histogram) {
  u64 before = 0;
  for (int mask = 1; mask < 32; mask *= 2) {
    const u64 other = shuffle_xor(x, mask); // of as many neighbours
    if (lane() & mask) before += other;
    x += other;
  }
  sync_block(); // the last use of the sums is over
  if (lane() == 0) histogram.warps[warp()] = x;
  sync_block();
  for (int w = 0; w < warp(); w++) before += histogram.warps[w];
  return before;
}

// A place in the order of likelihood: number `rank`, by id, of those with `key`.
struct Place {
  u32 key, rank;
};

// Where the running sum of weights (or, with COUNT, of ones) first exceeds
// `target`, which is less than the sum of all.
template <bool COUNT> DEVICE Place locate(const Logits &logits, u64 target, Histogram &histogram) {
  u32 prefix = 0;
  for (int above = 32, shift = 21; above; above = shift, shift = max(shift - 11, 0)) {
    sync_block();
    for (u32 i = threadIdx.x; i < BUCKETS; i += CHOOSERS) histogram.low[i] = histogram.high[i] = 0;
    if (threadIdx.x == 0) histogram.bucket = histogram.before = 0; // where no weight is a number
    sync_block();
    each(logits, [&](u32, float x) {
      const u32 key = key_of(x), bucket = key >> shift & ((1u << (above - shift)) - 1);
      if (above < 32 && key >> above != prefix) return;
      if (COUNT)
        histogram.count(bucket);
      else
        histogram.add(bucket, logits.weight(x));
    });
    sync_block();
    // A thread has two neighbours, the first threads the likeliest.
    const u32 upper = BUCKETS - 1 - 2 * threadIdx.x;
    const u64 first = histogram.sum(upper), both = first + histogram.sum(upper - 1);
    const u64 before = sum_before(both, histogram);
    if (target >= before && target - before < both) {
      const bool second = target - before >= first;
      histogram.bucket = upper - second;
      histogram.before = before + (second ? first : 0);
    }
    sync_block();
    prefix = prefix << (above - shift) | histogram.bucket;
    target -= histogram.before;
  }
  const u64 weight = COUNT ? 1 : logits.weight(of_key(prefix));
  return Place{prefix, (u32)(target / (weight ? weight : 1))};
}

// The sum of weights up to and with a place.
DEVICE u64 mass_until(const Logits &logits, Place place, Histogram &histogram) {
  u64 sum = 0;
  each(logits, [&](u32, float x) {
    if (key_of(x) > place.key) sum += logits.weight(x);
  });
  return block_sum(sum, histogram.warps) + (place.rank + 1) * logits.weight(of_key(place.key));
}

// The token at a place: number `rank` of those with its key, which the warps count in a
// stretch of ids each, and then all threads in the stretch in which it is.
DEVICE void write_token(const Logits &logits, Place place, Histogram &histogram, u32 *out) {
  const u32 stretch = (logits.width + 31) / 32, mine = min(warp() * stretch, logits.width);
  u64 count = 0;
  each(logits.x, mine + lane(), min(mine + stretch, logits.width), 32u,
       [&](u32, float x) { count += key_of(x) == place.key; });
  sum_before(count, histogram);
  u32 rank = place.rank, from = 0;
  for (int w = 0; w < 31 && rank >= histogram.warps[w]; w++) {
    rank -= (u32)histogram.warps[w];
    from += stretch;
  }
  const u32 to = min(from + stretch, logits.width), own = (stretch + CHOOSERS - 1) / CHOOSERS;
  const u32 first = min(from + threadIdx.x * own, to), last = min(first + own, to);
  count = 0;
  for (u32 i = first; i < last; i++) count += key_of(logits.x[i]) == place.key;
  u64 before = sum_before(count, histogram);
  if (rank < before || rank >= before + count) return;
  for (u32 i = first; i < last; i++)
    if (key_of(logits.x[i]) == place.key && before++ == rank) *out = i;
}

// The likeliest token: of those the one with the lowest id.
DEVICE void write_likeliest(const Logits &logits, Histogram &histogram, u32 *out) {
  u64 best = 0;
  each(logits, [&](u32 i, float x) { best = max(best, (u64)key_of(x) << 32 | ~i); });
  for (int mask = 16; mask; mask /= 2) best = max(best, shuffle_xor(best, mask));
  if (lane() == 0) histogram.warps[warp()] = best;
  sync_block();
  for (u32 w = 0; w < 32; w++) best = max(best, histogram.warps[w]);
  if (threadIdx.x == 0) *out = ~(u32)best;
}

// As the CPU's `choose`: temperature (0: the likeliest), then the `top_k` (0: all)
// likeliest, then the fewest that hold `top_p` of those; one of them by a draw
// keyed by (seed, item, position).
KERNEL(CHOOSERS)
sample(const float *__restrict__ values, u32 width, const u32 *__restrict__ items,
       const u32 *__restrict__ positions, float temperature, u32 top_k, float top_p, u64 seed,
       u32 *__restrict__ out) {
  SHARED(float, partial, 32);
  SHARED(Histogram, histograms, 1);
  Histogram &histogram = histograms[0];
  Logits logits{values + (size_t)blockIdx.x * width, width, -infinity(), temperature};
  out += blockIdx.x;
  if (temperature == 0.0f) return write_likeliest(logits, histogram, out);
  if (threadIdx.x == 0) *out = 0; // stays where nothing is likelier than anything, as of NaN

  float top = -infinity();
  each(logits, [&](u32, float x) { top = fmaxf(top, x); });
  logits.top = block_max(top, partial);
  const u32 kept = top_k && top_k < width ? top_k : width;
  u64 inside = mass_until(logits, locate<true>(logits, kept - 1, histogram), histogram);
  if (top_p < 1.0f) {
    const double wanted = ceil((double)top_p * inside);
    const u64 target = wanted >= 1.0 ? (u64)wanted - 1 : 0;
    inside = mass_until(logits, locate<false>(logits, target, histogram), histogram);
  }
  const Bits bits = philox(seed, items[blockIdx.x], positions[blockIdx.x], 0, 3u << 28);
  const u64 draw = ((u64)bits.word[0] << 32 | bits.word[1]) >> 11;
  const u64 target = (u64)((double)draw * (1.0 / 9007199254740992.0) * inside);
  write_token(logits, locate<false>(logits, target, histogram), histogram, out);
}
EXPORT(sample)
