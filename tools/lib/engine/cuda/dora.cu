// DoRA: rows of an updated weight rescaled to learnt lengths, which on activations
// is a factor for each output: out = magnitude / norm · y.

// Eight columns' factors; without magnitudes they are 1.
DEVICE Eight gains(const float *magnitude, const float *norm, u32 column) {
  Eight gain;
  for (int e = 0; e < 8; e++) gain.x[e] = magnitude ? magnitude[column + e] / norm[column + e] : 1.0f;
  return gain;
}

// y *= magnitude / norm, then += residual if there is one: `columns` columns of
// rows `width` apart, to which y and residual point; a block a token.
KERNEL(256)
dora_rescale(const float *__restrict__ magnitude, const float *__restrict__ norm,
             const bf16 *__restrict__ residual, u32 columns, u32 width, bf16 *__restrict__ y) {
  const size_t row = (size_t)blockIdx.x * width;
  for (u32 i = threadIdx.x * 8; i < columns; i += blockDim.x * 8) {
    const Eight gain = gains(magnitude, norm, i);
    Eight v = load8(y + row + i);
    for (int e = 0; e < 8; e++) v.x[e] *= gain.x[e];
    if (residual) {
      const Eight r = load8(residual + row + i);
      for (int e = 0; e < 8; e++) v.x[e] += r.x[e];
    }
    store8(y + row + i, v);
  }
}
EXPORT(dora_rescale)

// The gradient before rescaling, in place of y: y = dout · magnitude / norm; and, with
// `grads`, grads += Σ dout · y / norm over the tokens. A block has 64 columns: thread
// t the eight from 8 (t % 8) on, of every 32nd token from t / 8 on. The sums have a
// shape that depends on the number of tokens alone.
KERNEL(256)
dora_backward(const bf16 *__restrict__ dout, const float *__restrict__ magnitude,
              const float *__restrict__ norm, u32 tokens, u32 columns, u32 width,
              bf16 *__restrict__ y, float *__restrict__ grads) {
  SHARED(float, partial, 32 * 64);
  const u32 octet = threadIdx.x % 8 * 8, part = threadIdx.x / 8;
  const u32 column = blockIdx.x * 64 + octet;
  Eight sum{};
  if (column < columns) {
    const Eight gain = gains(magnitude, norm, column);
    for (u32 t = part; t < tokens; t += 32) {
      const size_t at = (size_t)t * width + column;
      Eight d = load8(dout + at);
      if (grads) {
        const Eight v = load8(y + at);
        for (int e = 0; e < 8; e++) sum.x[e] += d.x[e] * v.x[e];
      }
      for (int e = 0; e < 8; e++) d.x[e] *= gain.x[e];
      store8(y + at, d);
    }
  }
  if (!grads) return;
  for (int e = 0; e < 8; e++) partial[part * 64 + octet + e] = sum.x[e];
  sync_block();
  const u32 own = blockIdx.x * 64 + threadIdx.x;
  if (threadIdx.x >= 64 || own >= columns) return;
  float total = 0;
  for (int p = 0; p < 32; p++) total += partial[p * 64 + threadIdx.x];
  grads[own] += total / norm[own];
}
EXPORT(dora_backward)

// norm[o] = ‖W[o] + scale · B[o] A‖, expanded so that the updated weight never exists:
// ‖W[o]‖² + Σ b_j (2 scale u[o, j] + scale² Σ gram[j, k] b_k) with u = W Aᵀ and
// gram = A Aᵀ; a warp a row. B is rounded as in the products that use it.
KERNEL(128)
dora_norms(const bf16 *__restrict__ weight, const float *__restrict__ b,
           const float *__restrict__ u, const float *__restrict__ gram, u32 rows, u32 cols,
           u32 rank, float scale, float *__restrict__ norm) {
  const u32 row = blockIdx.x * 4 + warp();
  if (row >= rows) return;
  const bf16 *w = weight + (size_t)row * cols;
  float sum = 0;
  for (u32 i = lane() * 8; i < cols; i += 256) {
    const Eight v = load8(w + i);
    for (int e = 0; e < 8; e++) sum += v.x[e] * v.x[e];
  }
  const size_t first = (size_t)row * rank;
  for (u32 j = lane(); j < rank; j += 32) {
    float along = 0;
    for (u32 k = 0; k < rank; k++) along += gram[j * rank + k] * widen(narrow(b[first + k]).bits);
    sum += widen(narrow(b[first + j]).bits) * scale * (2.0f * u[first + j] + scale * along);
  }
  sum = warp_sum(sum);
  if (lane() == 0) norm[row] = sqrtf(fmaxf(sum, 0.0f));
}
EXPORT(dora_norms)
