// NF4 weights to bf16, for the products that follow.

CONSTANT float LEVELS[16] = {
    -1.0f,          -0.6961928f,   -0.52507305f,  -0.3949175f,  -0.28444138f, -0.18477343f,
    -0.091050036f,  0.0f,          0.0795803f,    0.1609302f,   0.2461123f,   0.33791524f,
    0.44070983f,    0.562617f,     0.72295684f,   1.0f};

// out[0..count] = the values from flat index `start` on; both multiples of 8. A
// block of 64 values has the scale absmax[block] (`nested` null), or
// map[nested[block]] · absmax[block / 256] + offset. Eight values a thread: a
// warp reads 128 bytes and writes 512. The arithmetic is f32, step by step as on
// the CPU, so that the result is its rounding to the bit.
KERNEL(256)
nf4_decode(const u8 *__restrict__ codes, const u8 *__restrict__ nested,
           const float *__restrict__ absmax, const float *__restrict__ map, float offset, u64 start,
           u64 count, bf16 *__restrict__ out) {
  SHARED(float, levels, 16);
  SHARED(float, scales, 256);
  if (threadIdx.x < 16) levels[threadIdx.x] = LEVELS[threadIdx.x];
  if (nested) scales[threadIdx.x] = map[threadIdx.x];
  sync_block();
  const u64 i = global_thread() * 8;
  if (i >= count) return;
  const u64 block = (start + i) / 64;
  const float scale =
      nested ? add_rn(mul_rn(scales[nested[block]], absmax[block / 256]), offset) : absmax[block];
  const u32 word = *reinterpret_cast<const u32 *>(codes + (start + i) / 2);
  Eight v;
  for (int b = 0; b < 4; b++) { // the earlier value is in the high half of its byte
    const u32 byte = word >> 8 * b;
    v.x[2 * b] = mul_rn(levels[byte >> 4 & 15], scale);
    v.x[2 * b + 1] = mul_rn(levels[byte & 15], scale);
  }
  store8(out + i, v);
}
EXPORT(nf4_decode)
