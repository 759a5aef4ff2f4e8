// Cross-entropy of a chunk of logits; a block a row.

// nll = -log softmax(logits)[target] and, unless `dlogits` is null, the gradient
// of scale · nll by the logits: scale (softmax - onehot), in bf16 for the product
// that follows.
KERNEL(512)
cross_entropy(const float *__restrict__ logits, const u32 *__restrict__ targets, u32 width,
              float scale, float *__restrict__ nll, bf16 *__restrict__ dlogits) {
  SHARED(float, partial, 32);
  const float *x = logits + (size_t)blockIdx.x * width;
  // One reading for both: whenever a larger one comes, the sum so far shrinks.
  float most = LOWEST, sum = 0;
  for (u32 i = threadIdx.x; i < width; i += BATCH * blockDim.x) {
    float v[BATCH], top = most;
#pragma unroll
    for (u32 b = 0; b < BATCH; b++) {
      const u32 at = i + b * blockDim.x;
      v[b] = at < width ? x[at] : -infinity();
    }
#pragma unroll
    for (u32 b = 0; b < BATCH; b++) top = fmaxf(top, v[b]);
    sum *= expf(most - top);
#pragma unroll
    for (u32 b = 0; b < BATCH; b++) sum += expf(v[b] - top);
    most = top;
  }
  const float own = most;
  most = block_max(most, partial);
  sum = block_sum(sum * expf(own - most), partial);
  const u32 target = targets[blockIdx.x];
  if (threadIdx.x == 0) nll[blockIdx.x] = logf(sum) - (x[target] - most);
  if (!dlogits) return;
  bf16 *d = dlogits + (size_t)blockIdx.x * width;
  const float by = scale / sum;
  each(x, threadIdx.x, width, blockDim.x, [&](u32 i, float logit) {
    d[i] = narrow(expf(logit - most) * by - (i == target ? scale : 0.0f));
  });
}
EXPORT(cross_entropy)
