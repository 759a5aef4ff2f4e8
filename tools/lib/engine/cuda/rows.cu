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

// What a warp needs to turn one head of one token; `row` is in [tokens, q + 2k].
struct Turn {
  size_t row;
  const float *weight, *cos, *sin;
};

DEVICE Turn turn_of(size_t task, const float *q_norm, const float *k_norm, const float *rope,
                    const u32 *positions, u32 query, u32 kv, u32 dim) {
  const size_t token = task / (query + kv);
  const u32 head = (u32)(task % (query + kv));
  const float *angles = rope + (size_t)positions[token] * dim;
  return Turn{(token * (query + 2 * kv) + head) * dim, head < query ? q_norm : k_norm, angles,
              angles + dim / 2};
}

// Norm and rotation of the queries and keys, a warp a head: feature i turns with
// feature i + dim / 2.
KERNEL(128)
qk_norm_rope(const bf16 *__restrict__ qkv, const float *__restrict__ q_norm,
             const float *__restrict__ k_norm, const float *__restrict__ rope,
             const u32 *__restrict__ positions, u32 tokens, u32 query, u32 kv, u32 dim, float eps,
             bf16 *__restrict__ qk, float *__restrict__ rstd) {
  const size_t task = (size_t)blockIdx.x * 4 + warp();
  if (task >= (size_t)tokens * (query + kv)) return;
  const Turn turn = turn_of(task, q_norm, k_norm, rope, positions, query, kv, dim);
  const bf16 *x = qkv + turn.row;
  bf16 *y = qk + task * dim;
  float sum = 0;
  for (u32 i = lane(); i < dim; i += 32) sum += widen(x[i].bits) * widen(x[i].bits);
  const float r = 1.0f / sqrtf(warp_sum(sum) / dim + eps);
  if (lane() == 0) rstd[task] = r;
  const u32 half = dim / 2;
  for (u32 i = lane(); i < half; i += 32) {
    const float a = widen(x[i].bits) * r * turn.weight[i];
    const float b = widen(x[i + half].bits) * r * turn.weight[i + half];
    y[i] = narrow(a * turn.cos[i] - b * turn.sin[i]);
    y[i + half] = narrow(b * turn.cos[i] + a * turn.sin[i]);
  }
}
EXPORT(qk_norm_rope)

// The gradient by the projected queries and keys, in place. A lane reads and
// writes the same features, so nothing is overwritten before its last use.
KERNEL(128)
qk_norm_rope_backward(const bf16 *__restrict__ qkv, const float *__restrict__ rstd,
                      const float *__restrict__ q_norm, const float *__restrict__ k_norm,
                      const float *__restrict__ rope, const u32 *__restrict__ positions, u32 tokens,
                      u32 query, u32 kv, u32 dim, bf16 *__restrict__ dqkv) {
  const size_t task = (size_t)blockIdx.x * 4 + warp();
  if (task >= (size_t)tokens * (query + kv)) return;
  const Turn turn = turn_of(task, q_norm, k_norm, rope, positions, query, kv, dim);
  const bf16 *x = qkv + turn.row;
  bf16 *d = dqkv + turn.row;
  const float r = rstd[task];
  const u32 half = dim / 2;
  float sum = 0;
  for (u32 i = lane(); i < half; i += 32) {
    const float a = widen(d[i].bits), b = widen(d[i + half].bits);
    sum += (a * turn.cos[i] + b * turn.sin[i]) * turn.weight[i] * widen(x[i].bits) +
           (b * turn.cos[i] - a * turn.sin[i]) * turn.weight[i + half] * widen(x[i + half].bits);
  }
  const float along = warp_sum(sum) * r * r / dim;
  for (u32 i = lane(); i < half; i += 32) {
    const float a = widen(d[i].bits), b = widen(d[i + half].bits);
    const float g0 = (a * turn.cos[i] + b * turn.sin[i]) * turn.weight[i];
    const float g1 = (b * turn.cos[i] - a * turn.sin[i]) * turn.weight[i + half];
    d[i] = narrow(r * (g0 - widen(x[i].bits) * along));
    d[i + half] = narrow(r * (g1 - widen(x[i + half].bits) * along));
  }
}
EXPORT(qk_norm_rope_backward)

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

// out [tokens, width] = silu(gate) · up from [tokens, 2 width].
KERNEL(256)
swiglu(const bf16 *__restrict__ gate_up, u32 tokens, u32 width, bf16 *__restrict__ out) {
  const size_t i = global_thread() * 8;
  if (i >= (size_t)tokens * width) return;
  const size_t row = i / width * 2 * width, column = i % width;
  const Eight gate = load8(gate_up + row + column), up = load8(gate_up + row + width + column);
  Eight v;
  for (int e = 0; e < 8; e++) v.x[e] = gate.x[e] * sigmoid(gate.x[e]) * up.x[e];
  store8(out + i, v);
}
EXPORT(swiglu)

KERNEL(256)
swiglu_backward(const bf16 *__restrict__ gate_up, const bf16 *__restrict__ dout, u32 tokens,
                u32 width, bf16 *__restrict__ dgate_up) {
  const size_t i = global_thread() * 8;
  if (i >= (size_t)tokens * width) return;
  const size_t row = i / width * 2 * width, column = i % width;
  const Eight gate = load8(gate_up + row + column), up = load8(gate_up + row + width + column);
  const Eight d = load8(dout + i);
  Eight dgate, dup;
  for (int e = 0; e < 8; e++) {
    const float g = gate.x[e], s = sigmoid(g);
    dup.x[e] = d.x[e] * g * s;
    dgate.x[e] = d.x[e] * up.x[e] * s * (1.0f + g * (1.0f - s));
  }
  store8(dgate_up + row + column, dgate);
  store8(dgate_up + row + width + column, dup);
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
