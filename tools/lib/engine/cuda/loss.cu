// Cross-entropy of a chunk of logits; a block a row.

// nll = -log softmax(logits)[target] and, unless `dlogits` is null, the gradient
// of scale · nll by the logits: scale (softmax - onehot), in bf16 for the product
// that follows.
KERNEL(512)
cross_entropy(const float *__restrict__ logits, const u32 *__restrict__ targets, u32 width,
              float scale, float *__restrict__ nll, bf16 *__restrict__ dlogits) {
  SHARED(float, partial, 32);
  const float *x = logits + (size_t)blockIdx.x * width;
  float most = -infinity();
  for (u32 i = threadIdx.x; i < width; i += blockDim.x) most = fmaxf(most, x[i]);
  most = block_max(most, partial);
  float sum = 0;
  for (u32 i = threadIdx.x; i < width; i += blockDim.x) sum += expf(x[i] - most);
  sum = block_sum(sum, partial);
  const u32 target = targets[blockIdx.x];
  if (threadIdx.x == 0) nll[blockIdx.x] = logf(sum) - (x[target] - most);
  if (!dlogits) return;
  bf16 *d = dlogits + (size_t)blockIdx.x * width;
  const float by = scale / sum;
  for (u32 i = threadIdx.x; i < width; i += blockDim.x)
    d[i] = narrow(expf(x[i] - most) * by - (i == target ? scale : 0.0f));
}
EXPORT(cross_entropy)
