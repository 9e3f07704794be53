// Rows of scores in fp32, bf16 or fp16 as logits, for the kernels over prototypes.
#pragma once

#include "common.h"

#include <algorithm>
#include <optional>

namespace fastssl {

constexpr int64_t kLanes = 16;
constexpr float kFloor = std::numeric_limits<float>::lowest();  // the maximum of nothing

#define FASTSSL_INLINE __attribute__((always_inline))

// x_k = scale s_k + bias_k for n columns; returns the largest. NaN is larger than nothing: it shows
// in the exponentials.
template <class Load>
FASTSSL_INLINE inline float fill_logits(int64_t n, float scale, const float* bias, float* x,
                                        const Load& load) {
  float lanes[kLanes];
  for (float& lane : lanes) lane = kFloor;
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes)
    for (int64_t c = 0; c < kLanes; ++c) {
      const float v = load(k + c) * scale + (bias ? bias[k + c] : 0.f);
      x[k + c] = v;
      lanes[c] = v > lanes[c] ? v : lanes[c];
    }
  for (; k < n; ++k) {
    x[k] = load(k) * scale + (bias ? bias[k] : 0.f);
    lanes[0] = x[k] > lanes[0] ? x[k] : lanes[0];
  }
  return *std::max_element(lanes, lanes + kLanes);
}
FASTSSL_CLONES static float logits_fp32(const float* s, int64_t n, float scale, const float* bias,
                                        float* x) {
  return fill_logits(n, scale, bias, x, [=](int64_t k) FASTSSL_INLINE { return s[k]; });
}
FASTSSL_CLONES static float logits_bf16(const uint16_t* s, int64_t n, float scale,
                                        const float* bias, float* x) {
  return fill_logits(n, scale, bias, x, [=](int64_t k) FASTSSL_INLINE { return bf16_float(s[k]); });
}
FASTSSL_CLONES static float logits_fp16(const uint16_t* s, int64_t n, float scale,
                                        const float* bias, float* x) {
  return fill_logits(n, scale, bias, x, [=](int64_t k) FASTSSL_INLINE { return half_float(s[k]); });
}

// Logits of n scores of t, which lie together from element `at` on; returns the largest.
inline float logits_of(const Tensor& t, int64_t at, int64_t n, float scale, const float* bias,
                       float* x) {
  if (t.scalar_type() == ScalarType::Float)
    return logits_fp32(static_cast<const float*>(t.const_data_ptr()) + at, n, scale, bias, x);
  const uint16_t* s = static_cast<const uint16_t*>(t.const_data_ptr()) + at;
  return t.scalar_type() == ScalarType::Half ? logits_fp16(s, n, scale, bias, x)
                                             : logits_bf16(s, n, scale, bias, x);
}

inline void check_scores(const char* name, const Tensor& t) {
  const auto dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  name, " must be float32, bfloat16 or float16");
}

}  // namespace fastssl
