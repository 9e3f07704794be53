// The k largest of each row of scores, kept up to date while the columns come in chunks.
//
// A score and its column are one integer: the score's bits in ascending order, over the column from
// behind, so that of equal scores the first is the larger. Each row of `best` is a heap with the
// least on top. A score that exceeds it is rare, k log(M / k) of M in random order, so nearly all the
// work is one comparison of each score, 4 bytes read. NaN counts as the largest.
#include "rows.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <tuple>

namespace fastssl {
namespace {

constexpr int64_t kNotYet = std::numeric_limits<int64_t>::min();
constexpr int64_t kLast = 0xffffffff;  // column
constexpr int64_t kLook = 32;          // scores of one comparison

inline int64_t key(float x, int64_t column) {
  const int32_t bits = x != x ? 0x7fffffff : ordered(bit_cast<int32_t>(x + 0.f));  // -0 becomes 0
  return (static_cast<int64_t>(bits) << 32) | (kLast - column);
}

// The next multiple of kLook from `at` on, of n in all, with a score that is not <= least.
FASTSSL_CLONES int64_t next_above(const float* x, const float* scale, int64_t at, int64_t n,
                                  float least) {
  for (; at + kLook <= n; at += kLook) {
    int32_t above = 0;
    if (scale)
      for (int64_t c = 0; c < kLook; ++c) above |= !(x[at + c] * scale[at + c] <= least);
    else
      for (int64_t c = 0; c < kLook; ++c) above |= !(x[at + c] <= least);
    if (above) break;
  }
  return at;
}

void update(int64_t* best, int64_t k, const float* x, const float* scale, int64_t n, int64_t first) {
  const std::greater<int64_t> later;
  for (int64_t at = 0; at < n;) {
    if (best[0] != kNotYet) {
      const auto bits = static_cast<int32_t>(best[0] >> 32);
      if (bits == 0x7fffffff) return;  // k times NaN
      at = next_above(x, scale, at, n, bit_cast<float>(ordered(bits)));
    }
    for (const int64_t end = std::min(n, at + kLook); at < end; ++at) {
      const int64_t mine = key(scale ? x[at] * scale[at] : x[at], first + at);
      if (mine <= best[0]) continue;
      std::pop_heap(best, best + k, later);
      best[k - 1] = mine;
      std::push_heap(best, best + k, later);
    }
  }
}

// best (R, k), int64, takes in scores (R, C), times scale (C,), of columns `first` and after.
void topk(Tensor best, Tensor scores, std::optional<Tensor> scale, int64_t first) {
  const int64_t R = scores.size(0), C = scores.size(1), k = best.size(1);
  STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Float && (C < 2 || scores.stride(1) == 1) &&
                      best.scalar_type() == ScalarType::Long && best.is_contiguous() &&
                      best.size(0) == R && k > 0 && first + C <= kLast,
                  "topk: best must be (R, k) int64 and scores (R, C) float32, of contiguous rows");
  STD_TORCH_CHECK(!scale || (scale->numel() == C && scale->scalar_type() == ScalarType::Float &&
                             scale->is_contiguous()),
                  "topk: scale must be contiguous float32 of ", C, " elements");
  const float* factors = scale ? static_cast<const float*>(scale->const_data_ptr()) : nullptr;
  int64_t* heaps = static_cast<int64_t*>(best.mutable_data_ptr());
  const float* x = static_cast<const float*>(scores.const_data_ptr());
  const int64_t share = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(C, 1));
  torch::stable::parallel_for(0, R, share, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      update(heaps + i * k, k, x + i * scores.stride(0), factors, C, first);
  });
}

// The scores (R, k), largest first, and their columns.
std::tuple<Tensor, Tensor> topk_result(Tensor best) {
  STD_TORCH_CHECK(best.scalar_type() == ScalarType::Long && best.is_contiguous(),
                  "topk: best must be contiguous int64");
  const int64_t R = best.size(0), k = best.size(1);
  Tensor scores = torch::stable::new_empty(best, {R, k}, ScalarType::Float);
  Tensor columns = torch::stable::new_empty(best, {R, k});
  auto* x = static_cast<float*>(scores.mutable_data_ptr());
  auto* j = static_cast<int64_t*>(columns.mutable_data_ptr());
  const auto* keys = static_cast<const int64_t*>(best.const_data_ptr());
  torch::stable::parallel_for(0, R, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t* row = j + i * k;
      std::copy_n(keys + i * k, k, row);
      std::sort(row, row + k, std::greater<int64_t>());
      for (int64_t c = 0; c < k; ++c) {
        x[i * k + c] = bit_cast<float>(ordered(static_cast<int32_t>(row[c] >> 32)));
        row[c] = kLast - (row[c] & kLast);
      }
    }
  });
  return {scores, columns};
}

// 1 / |x| by rows, of at least 1e-12.
template <class T, class Load>
FASTSSL_INLINE inline float inverse_length(const T* x, int64_t D, const Load& load) {
  float lanes[64] = {};
  int64_t d = 0;
  for (; d + 64 <= D; d += 64)
    for (int64_t c = 0; c < 64; ++c) lanes[c] += load(x[d + c]) * load(x[d + c]);
  for (; d < D; ++d) lanes[d % 64] += load(x[d]) * load(x[d]);
  for (int64_t half = 32; half; half /= 2)
    for (int64_t c = 0; c < half; ++c) lanes[c] += lanes[c + half];
  const float length = std::sqrt(lanes[0]);
  return 1.f / (length < 1e-12f ? 1e-12f : length);
}
FASTSSL_CLONES float inverse_length_of(const float* x, int64_t D) {
  return inverse_length(x, D, [](float v) FASTSSL_INLINE { return v; });
}
FASTSSL_CLONES float inverse_length_of(const uint16_t* x, int64_t D) {
  return inverse_length(x, D, [](uint16_t v) FASTSSL_INLINE { return bf16_float(v); });
}

Tensor inverse_lengths(Tensor x) {
  const int64_t R = x.size(0), D = x.size(1);
  const bool half = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK((half || x.scalar_type() == ScalarType::Float) && (x.stride(1) == 1 || D == 1),
                  "inverse_lengths: x must be float32 or bfloat16 of contiguous rows");
  Tensor out = torch::stable::new_empty(x, {R}, ScalarType::Float);
  float* data = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, R, std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(D, 1)),
                              [&](int64_t i, int64_t end) {
    for (; i < end; ++i) {
      const int64_t at = i * x.stride(0);
      data[i] = half ? inverse_length_of(static_cast<const uint16_t*>(x.const_data_ptr()) + at, D)
                     : inverse_length_of(static_cast<const float*>(x.const_data_ptr()) + at, D);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("topk_", TORCH_BOX(&topk));
  m.impl("topk_result", TORCH_BOX(&topk_result));
  m.impl("inverse_lengths", TORCH_BOX(&inverse_lengths));
}

}  // namespace fastssl
