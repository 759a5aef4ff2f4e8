// The norm of the gradients and the update of the adapters. The sums have a
// shape that depends on nothing, so that a run is repeatable.

// partial[block] = Σ x² over the threads' shares, in f64; grid 256.
KERNEL(256)
sum_squares(const float *__restrict__ x, u64 count, double *__restrict__ partial) {
  SHARED(double, warps, 32);
  double sum = 0;
  const u64 first = global_thread(), stride = gridDim.x * blockDim.x;
  each(x, first, count, stride, [&](u64, float x) { sum += (double)x * x; });
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

// What an update is done with: `keep` = 1 - lr λ, `rate` = lr / (1 - β1^t), `root` =
// √(1 - β2^t), `fresh` = 1 - β; clipping compares the norm with `max_norm`, unless
// that is infinite.
struct Rates {
  float max_norm, fresh1, beta2, fresh2, keep, rate, root, eps;
};

// The factor of the gradients.
DEVICE float clip_of(float max_norm, const float *norm) {
  return fminf(max_norm / add_rn(norm[0], 1e-6f), 1.0f);
}

// One parameter's update, as torch's AdamW. Rounded step by step, as on the CPU: an
// 8-bit code shows the last bit where a value lies between two.
DEVICE float updated(const Rates &r, float g, float p, float &m, float &v) {
  m = add_rn(m, mul_rn(r.fresh1, add_rn(g, -m)));
  v = add_rn(mul_rn(r.beta2, v), mul_rn(mul_rn(r.fresh2, g), g));
  const float change = mul_rn(r.rate, m) / add_rn(sqrtf(v) / r.root, r.eps);
  return add_rn(mul_rn(p, r.keep), -change);
}

KERNEL(256)
adamw(const float *__restrict__ grads, const float *__restrict__ norm, u64 count, float max_norm,
      float fresh1, float beta2, float fresh2, float keep, float rate, float root, float eps,
      float *__restrict__ params, float *__restrict__ m, float *__restrict__ v) {
  const Rates rates = {max_norm, fresh1, beta2, fresh2, keep, rate, root, eps};
  const u64 i = global_thread();
  if (i >= count) return;
  float m1 = m[i], v1 = v[i];
  const float g = mul_rn(grads[i], clip_of(max_norm, norm));
  params[i] = updated(rates, g, params[i], m1, v1);
  m[i] = m1;
  v[i] = v1;
}
EXPORT(adamw)

// The number of thresholds below x.
DEVICE u32 dynamic_code(const float *thresholds, float x) {
  u32 below = 0;
  for (u32 step = 128; step; step >>= 1) below += x > thresholds[below + step - 1] ? step : 0;
  return below;
}

// adamw with moments in 8 bits, a warp a block of 256 values: code c of a block stands
// for values[c] · absmax[block]. `tables` holds, 256 each, the values of m and of v,
// then their thresholds. The grid strides over the blocks, so that the tables are read
// once for many.
KERNEL(256)
adamw_8bit(const float *__restrict__ grads, const float *__restrict__ norm, u64 count,
           float max_norm, float fresh1, float beta2, float fresh2, float keep, float rate,
           float root, float eps, const float *__restrict__ tables, float *__restrict__ params,
           u8 *__restrict__ m_codes, float *__restrict__ m_absmax, u8 *__restrict__ v_codes,
           float *__restrict__ v_absmax) {
  SHARED(float, table, 1024);
  for (u32 i = threadIdx.x; i < 1024; i += blockDim.x) table[i] = tables[i];
  sync_block();
  const Rates rates = {max_norm, fresh1, beta2, fresh2, keep, rate, root, eps};
  const float clip = clip_of(max_norm, norm);
  const u64 warps = blockDim.x / 32;
  for (u64 b = blockIdx.x * warps + warp(); b * 256 < count; b += gridDim.x * warps) {
    const u64 first = b * 256 + lane();
    float m[8], v[8], m_most = 0, v_most = 0;
    for (int j = 0; j < 8; j++) {
      const u64 i = first + 32 * j;
      m[j] = v[j] = 0;
      if (i >= count) continue;
      m[j] = mul_rn(table[m_codes[i]], m_absmax[b]);
      v[j] = mul_rn(table[256 + v_codes[i]], v_absmax[b]);
      params[i] = updated(rates, mul_rn(grads[i], clip), params[i], m[j], v[j]);
      m_most = fmaxf(m_most, fabsf(m[j]));
      v_most = fmaxf(v_most, v[j]);
    }
    m_most = warp_max(m_most); // also: every lane has read the scales
    v_most = warp_max(v_most);
    for (int j = 0; j < 8; j++) {
      const u64 i = first + 32 * j;
      if (i >= count) continue;
      m_codes[i] = (u8)dynamic_code(table + 512, m[j] / m_most);
      v_codes[i] = (u8)dynamic_code(table + 768, v[j] / v_most);
    }
    if (lane() == 0) {
      m_absmax[b] = m_most;
      v_absmax[b] = v_most;
    }
  }
}
EXPORT(adamw_8bit)
