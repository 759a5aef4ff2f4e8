// One token at a time: copies, norms, rotation, gates. Memory-bound: what counts
// is that every value is read and written once, sixteen bytes at a time.

// A row, by the whole block.
DEVICE void copy_row(const bf16 *from, u32 width, bf16 *to) {
  for (u32 i = threadIdx.x * 8; i < width; i += blockDim.x * 8) store16(to + i, load16(from + i));
}

// out[i] = x[index[i]], rows of `width`; a block a row.
KERNEL(256)
gather(const bf16 *__restrict__ x, const u32 *__restrict__ index, u32 width,
       bf16 *__restrict__ out) {
  copy_row(x + (size_t)index[blockIdx.x] * width, width, out + (size_t)blockIdx.x * width);
}
EXPORT(gather)

// out[index[i]] = x[i].
KERNEL(256)
scatter(const bf16 *__restrict__ x, const u32 *__restrict__ index, u32 width,
        bf16 *__restrict__ out) {
  copy_row(x + (size_t)blockIdx.x * width, width, out + (size_t)index[blockIdx.x] * width);
}
EXPORT(scatter)

// The same of single numbers; a thread each.
KERNEL(256)
gather_ids(const u32 *__restrict__ x, const u32 *__restrict__ index, u32 count,
           u32 *__restrict__ out) {
  const u64 i = global_thread();
  if (i < count) out[i] = x[index[i]];
}
EXPORT(gather_ids)

KERNEL(256)
scatter_ids(const u32 *__restrict__ x, const u32 *__restrict__ index, u32 count,
            u32 *__restrict__ out) {
  const u64 i = global_thread();
  if (i < count) out[index[i]] = x[i];
}
EXPORT(scatter_ids)

KERNEL(256)
to_bf16(const float *__restrict__ x, u64 count, bf16 *__restrict__ out) {
  const u64 i = global_thread();
  if (i < count) out[i] = narrow(x[i]);
}
EXPORT(to_bf16)

// out = x · rstd · weight, rstd = 1 / √(mean(x²) + eps); a block a token. The
// second reading of x comes from the cache.
KERNEL(256)
rms_norm(const bf16 *__restrict__ x, const float *__restrict__ weight, u32 width, float eps,
         bf16 *__restrict__ out, float *__restrict__ rstd) {
  SHARED(float, partial, 32);
  const size_t row = (size_t)blockIdx.x * width;
  float sum = 0;
  for (u32 i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
    const Eight v = load8(x + row + i);
    for (int e = 0; e < 8; e++) sum += v.x[e] * v.x[e];
  }
  const float r = 1.0f / sqrtf(block_sum(sum, partial) / width + eps);
  if (threadIdx.x == 0) rstd[blockIdx.x] = r;
  for (u32 i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
    Eight v = load8(x + row + i);
    const Eight w = load8(weight + i);
    for (int e = 0; e < 8; e++) v.x[e] *= r * w.x[e];
    store8(out + row + i, v);
  }
}
EXPORT(rms_norm)

// dx += rstd (g - x rstd² mean(g x)) with g = dy · weight.
KERNEL(256)
rms_norm_backward(const bf16 *__restrict__ dy, const bf16 *__restrict__ x,
                  const float *__restrict__ weight, const float *__restrict__ rstd, u32 width,
                  bf16 *__restrict__ dx) {
  SHARED(float, partial, 32);
  const size_t row = (size_t)blockIdx.x * width;
  const float r = rstd[blockIdx.x];
  float sum = 0;
  for (u32 i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
    const Eight g = load8(dy + row + i), v = load8(x + row + i), w = load8(weight + i);
    for (int e = 0; e < 8; e++) sum += g.x[e] * w.x[e] * v.x[e];
  }
  const float along = block_sum(sum, partial) * r * r / width;
  for (u32 i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
    const Eight g = load8(dy + row + i), v = load8(x + row + i), w = load8(weight + i);
    Eight d = load8(dx + row + i);
    for (int e = 0; e < 8; e++) d.x[e] += r * (g.x[e] * w.x[e] - v.x[e] * along);
    store8(dx + row + i, d);
  }
}
EXPORT(rms_norm_backward)

// One head of one token, a warp's; a lane has features i and i + 1 of the first half, and
// those of the second that turn with them (dim ≤ 128). Grid [tokens, heads / 4].
struct Turn {
  u32 head, i, half;
  size_t row; // of the head in [tokens, q + 2k]
  bool mine;
  float weight[4], cos[2], sin[2];

  DEVICE_MEMBER Turn(const float *q_norm, const float *k_norm, const float *rope,
                     const u32 *positions, u32 query, u32 kv, u32 dim)
      : head(blockIdx.y * 4 + warp()), i(lane() * 2), half(dim / 2),
        row(((size_t)blockIdx.x * (query + 2 * kv) + head) * dim), mine(i < half) {
    const float *norm = head < query ? q_norm : k_norm;
    const float *angles = rope + (size_t)positions[blockIdx.x] * dim;
    for (u32 e = 0; e < 2; e++) {
      weight[e] = mine ? norm[i + e] : 0;
      weight[2 + e] = mine ? norm[half + i + e] : 0;
      cos[e] = mine ? angles[i + e] : 0;
      sin[e] = mine ? angles[half + i + e] : 0;
    }
  }

  DEVICE_MEMBER void load(float (&x)[4], const bf16 *from) const {
    for (u32 e = 0; e < 2; e++) {
      const u32 pair = mine ? *reinterpret_cast<const u32 *>(from + i + e * half) : 0;
      x[2 * e] = low(pair);
      x[2 * e + 1] = high(pair);
    }
  }
  DEVICE_MEMBER void store(bf16 *to, const float (&x)[4]) const {
    for (u32 e = 0; e < 2; e++)
      if (mine) *reinterpret_cast<u32 *>(to + i + e * half) = pack(x[2 * e], x[2 * e + 1]);
  }
};

// Norm and rotation of the queries and keys: feature i turns with feature i + dim / 2.
KERNEL(128)
qk_norm_rope(const bf16 *__restrict__ qkv, const float *__restrict__ q_norm,
             const float *__restrict__ k_norm, const float *__restrict__ rope,
             const u32 *__restrict__ positions, u32 query, u32 kv, u32 dim, float eps,
             bf16 *__restrict__ qk, float *__restrict__ rstd) {
  if (blockIdx.y * 4 + warp() >= query + kv) return;
  const Turn turn(q_norm, k_norm, rope, positions, query, kv, dim);
  float x[4], sum = 0;
  turn.load(x, qkv + turn.row);
  for (int e = 0; e < 4; e++) sum += x[e] * x[e];
  const float r = 1.0f / sqrtf(warp_sum(sum) / dim + eps);
  const size_t task = (size_t)blockIdx.x * (query + kv) + turn.head;
  if (lane() == 0) rstd[task] = r;
  for (int e = 0; e < 4; e++) x[e] *= r * turn.weight[e];
  float y[4];
  for (int e = 0; e < 2; e++) {
    y[e] = x[e] * turn.cos[e] - x[2 + e] * turn.sin[e];
    y[2 + e] = x[2 + e] * turn.cos[e] + x[e] * turn.sin[e];
  }
  turn.store(qk + task * dim, y);
}
EXPORT(qk_norm_rope)

// The gradient by the projected queries and keys, in place.
KERNEL(128)
qk_norm_rope_backward(const bf16 *__restrict__ qkv, const float *__restrict__ rstd,
                      const float *__restrict__ q_norm, const float *__restrict__ k_norm,
                      const float *__restrict__ rope, const u32 *__restrict__ positions, u32 query,
                      u32 kv, u32 dim, bf16 *__restrict__ dqkv) {
  if (blockIdx.y * 4 + warp() >= query + kv) return;
  const Turn turn(q_norm, k_norm, rope, positions, query, kv, dim);
  float x[4], d[4], g[4], sum = 0;
  turn.load(x, qkv + turn.row);
  turn.load(d, dqkv + turn.row);
  for (int e = 0; e < 2; e++) {
    g[e] = (d[e] * turn.cos[e] + d[2 + e] * turn.sin[e]) * turn.weight[e];
    g[2 + e] = (d[2 + e] * turn.cos[e] - d[e] * turn.sin[e]) * turn.weight[2 + e];
  }
  for (int e = 0; e < 4; e++) sum += g[e] * x[e];
  const float r = rstd[(size_t)blockIdx.x * (query + kv) + turn.head];
  const float along = warp_sum(sum) * r * r / dim;
  for (int e = 0; e < 4; e++) d[e] = r * (g[e] - x[e] * along);
  turn.store(dqkv + turn.row, d);
}
EXPORT(qk_norm_rope_backward)

DEVICE float sigmoid(float x) { return fast_reciprocal(1.0f + fast_exp(-x)); }

// out [tokens, width] = silu(gate) · up from [tokens, 2 width]; a block a token.
KERNEL(256)
swiglu(const bf16 *__restrict__ gate_up, u32 width, bf16 *__restrict__ out) {
  const bf16 *row = gate_up + (size_t)blockIdx.x * 2 * width;
  for (u32 i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
    const Eight gate = load8(row + i), up = load8(row + width + i);
    Eight v;
    for (int e = 0; e < 8; e++) v.x[e] = gate.x[e] * sigmoid(gate.x[e]) * up.x[e];
    store8(out + (size_t)blockIdx.x * width + i, v);
  }
}
EXPORT(swiglu)

KERNEL(256)
swiglu_backward(const bf16 *__restrict__ gate_up, const bf16 *__restrict__ dout, u32 width,
                bf16 *__restrict__ dgate_up) {
  const size_t row = (size_t)blockIdx.x * 2 * width;
  for (u32 i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
    const Eight gate = load8(gate_up + row + i), up = load8(gate_up + row + width + i);
    const Eight d = load8(dout + (size_t)blockIdx.x * width + i);
    Eight dgate, dup;
    for (int e = 0; e < 8; e++) {
      const float g = gate.x[e], s = sigmoid(g);
      dup.x[e] = d.x[e] * g * s;
      dgate.x[e] = d.x[e] * up.x[e] * s * (1.0f + g * (1.0f - s));
    }
    store8(dgate_up + row + i, dgate);
    store8(dgate_up + row + width + i, dup);
  }
}
EXPORT(swiglu_backward)

// Keys and values of each token to (slots[t], positions[t]) of [slots, capacity, width].
KERNEL(256)
cache_append(const bf16 *__restrict__ qk, const bf16 *__restrict__ qkv,
             const u32 *__restrict__ slots, const u32 *__restrict__ positions, u32 q_width,
             u32 width, u32 capacity, bf16 *__restrict__ keys, bf16 *__restrict__ values) {
  const size_t t = blockIdx.x;
  const size_t to = ((size_t)slots[t] * capacity + positions[t]) * width;
  copy_row(qk + t * (q_width + width) + q_width, width, keys + to);
  copy_row(qkv + t * (q_width + 2 * width) + q_width + width, width, values + to);
}
EXPORT(cache_append)
