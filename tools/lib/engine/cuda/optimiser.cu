// The norm of the gradients and the update of the adapters. The sums have a
// shape that depends on nothing, so that a run is repeatable.

// partial[block] = Σ x² over every 256th thread's share, in f64; grid 256.
KERNEL(256)
sum_squares(const float *__restrict__ x, u64 count, double *__restrict__ partial) {
  SHARED(double, warps, 32);
  double sum = 0;
  for (u64 i = global_thread(); i < count; i += (u64)gridDim.x * blockDim.x)
    sum += (double)x[i] * x[i];
  sum = block_sum(sum, warps);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
EXPORT(sum_squares)

// norm = √Σ partial; one block of 256.
KERNEL(256)
root_of_sum(const double *__restrict__ partial, float *__restrict__ norm) {
  SHARED(double, warps, 32);
  const double sum = block_sum(partial[threadIdx.x], warps);
  if (threadIdx.x == 0) norm[0] = (float)sqrt(sum);
}
EXPORT(root_of_sum)

// As torch's AdamW. `keep` = 1 - lr λ, `rate` = lr / (1 - β1^t), `root` =
// √(1 - β2^t), `fresh` = 1 - β; clipping compares norm[0] with `max_norm`, unless
// that is infinite.
KERNEL(256)
adamw(const float *__restrict__ grads, const float *__restrict__ norm, u64 count, float max_norm,
      float fresh1, float beta2, float fresh2, float keep, float rate, float root, float eps,
      float *__restrict__ params, float *__restrict__ m, float *__restrict__ v) {
  const u64 i = global_thread();
  if (i >= count) return;
  const float clip = fminf(max_norm / (norm[0] + 1e-6f), 1.0f);
  const float g = grads[i] * clip;
  const float m1 = m[i] + fresh1 * (g - m[i]);
  const float v1 = beta2 * v[i] + fresh2 * g * g;
  m[i] = m1;
  v[i] = v1;
  params[i] = params[i] * keep - rate * m1 / (sqrtf(v1) / root + eps);
}
EXPORT(adamw)
