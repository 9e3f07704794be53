// Rows of scores in fp32, bf16 or fp16 as logits, for the kernels over prototypes.
#pragma once

#include "common.h"

#include <algorithm>
#include <optional>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastssl {

constexpr int64_t kLanes = 16;

// The order of floats as integers, and back: compilers vectorise a maximum only of those.
inline int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

// x_k = scale s_k + bias_k for n columns; returns the largest, which may be NaN if one is. x is
// filled up with -inf to a multiple of kLanes, so that loops over it need no end of their own.
template <class Load>
FASTSSL_INLINE inline float fill_logits(int64_t n, float scale, const float* bias,
                                        float* __restrict x, const Load& load) {
  int32_t top = ordered(bit_cast<int32_t>(kFloor));
  const auto put = [&](int64_t k, float v) FASTSSL_INLINE {
    x[k] = v;
    top = std::max(top, ordered(bit_cast<int32_t>(v)));
  };
  if (bias) {
    for (int64_t k = 0; k < n; ++k) put(k, load(k) * scale + bias[k]);
  } else {
    for (int64_t k = 0; k < n; ++k) put(k, load(k) * scale);
  }
  for (int64_t k = n; k % kLanes; ++k) x[k] = kNegInf;
  return bit_cast<float>(ordered(top));
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

// The same of n scores of t that lie together from element `at` on.
inline float logits_of(const Tensor& t, int64_t at, int64_t n, float scale, const float* bias,
                       float* x) {
  if (t.scalar_type() == ScalarType::Float)
    return logits_fp32(static_cast<const float*>(t.const_data_ptr()) + at, n, scale, bias, x);
  const uint16_t* s = static_cast<const uint16_t*>(t.const_data_ptr()) + at;
  return t.scalar_type() == ScalarType::Half ? logits_fp16(s, n, scale, bias, x)
                                             : logits_bf16(s, n, scale, bias, x);
}

// An empty result of many rows. Page faults of fresh memory would cost more than the numbers in it,
// so the system is asked for huge pages.
inline Tensor new_result(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
  Tensor out = torch::stable::new_empty(like, size, dtype);
#ifdef __linux__
  // From here on malloc maps memory anew each time; below it hands out what was in use before.
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21, kMapped = uintptr_t{1} << 25;
  const auto data = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
  const uintptr_t begin = (data + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (data + out.numel() * out.element_size()) / kHugePage * kHugePage;
  if (begin < end && end - begin >= kMapped)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return out;
}

// The scores that are wanted next. A row is loaded, then worked on: fetched during that work, the
// next row is in cache when its turn comes.
struct Ahead {
  const char* data;
  int64_t size;

  Ahead(const Tensor& t, int64_t at)
      : data(static_cast<const char*>(t.const_data_ptr()) + at * t.element_size()),
        size(t.element_size()) {}
  void fetch(int64_t k) const { __builtin_prefetch(data + k * size); }
};

inline void check_scores(const char* name, const Tensor& t) {
  const auto dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  name, " must be float32, bfloat16 or float16");
}

}  // namespace fastssl
