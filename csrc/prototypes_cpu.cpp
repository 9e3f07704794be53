// Sinkhorn-Knopp over prototypes in scaling form: with logits x_bk = scale s_bk + bias_k,
// out_k = log sum_b e^x_bk (the first pass, no bias yet) or log sum_b softmax_k(x_b)_k (the others),
// and softmax_k(x_b) itself, the codes.
//
// Each pass reads the scores once, in their own dtype. A task owns fixed rows: it holds one row of
// exponentials, or a block of 16 rows x 512 columns, and K sums. About one exponential an element.
// Exponents are differences to maxima, so nothing overflows; sums are fp32 inside a block of rows
// and fp64 across blocks, merged in task order: deterministic for a given number of threads.
// Paper: SwAV arXiv:2006.09882 for the problem, arXiv:1306.0895 for the iteration.
#include "common.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>

namespace fastssl {
namespace {

constexpr int64_t kLanes = 16, kRows = 16, kColumns = 512;
constexpr float kFloor = std::numeric_limits<float>::lowest();  // the maximum of nothing

#define FASTSSL_INLINE __attribute__((always_inline))

// x_k = scale s_k + bias_k for n columns; returns the largest. NaN is larger than nothing: it shows
// in the exponentials.
template <class Load>
FASTSSL_INLINE inline float logits(int64_t n, float scale, const float* bias, float* x,
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
FASTSSL_CLONES float logits_fp32(const float* s, int64_t n, float scale, const float* bias,
                                 float* x) {
  return logits(n, scale, bias, x, [=](int64_t k) FASTSSL_INLINE { return s[k]; });
}
FASTSSL_CLONES float logits_bf16(const uint16_t* s, int64_t n, float scale, const float* bias,
                                 float* x) {
  return logits(n, scale, bias, x, [=](int64_t k) FASTSSL_INLINE { return bf16_float(s[k]); });
}
FASTSSL_CLONES float logits_fp16(const uint16_t* s, int64_t n, float scale, const float* bias,
                                 float* x) {
  return logits(n, scale, bias, x, [=](int64_t k) FASTSSL_INLINE { return half_float(s[k]); });
}

// x_k = e^(x_k - max); returns their sum.
FASTSSL_CLONES double exponentials(float* x, int64_t n, float max) {
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += 1024) {
    const int64_t end = std::min(n, begin + 1024);
    float lanes[kLanes] = {};
    int64_t k = begin;
    for (; k + kLanes <= end; k += kLanes)
      for (int64_t c = 0; c < kLanes; ++c) {
        const float e = exp_poly(x[k + c] - max);
        x[k + c] = e;
        lanes[c] += e;
      }
    for (; k < end; ++k) lanes[0] += x[k] = exp_poly(x[k] - max);
    for (float lane : lanes) total += lane;
  }
  return total;
}
FASTSSL_CLONES void add_scaled(float* sum, const float* x, int64_t n, float factor) {
  for (int64_t k = 0; k < n; ++k) sum[k] += x[k] * factor;
}
FASTSSL_CLONES void write_scaled(float* out, const float* x, int64_t n, float factor) {
  for (int64_t k = 0; k < n; ++k) out[k] = x[k] * factor;
}
FASTSSL_CLONES void flush(double* total, float* sum, int64_t n) {
  for (int64_t k = 0; k < n; ++k) total[k] += sum[k], sum[k] = 0.f;
}

// (max, sum) of columns takes in the logits of up to kRows rows x (., kColumns).
FASTSSL_CLONES void add_columns(const float* x, int64_t rows, int64_t n, float* max, double* sum) {
  float top[kColumns], block[kColumns] = {};
  std::copy(max, max + n, top);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < n; ++k) {
      const float v = x[i * kColumns + k];
      top[k] = v > top[k] ? v : top[k];
    }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < n; ++k) block[k] += exp_poly(x[i * kColumns + k] - top[k]);
  for (int64_t k = 0; k < n; ++k) {
    sum[k] = sum[k] * exp_poly(max[k] - top[k]) + block[k];
    max[k] = top[k];
  }
}

// (max, sum) of columns takes in that of other rows.
FASTSSL_CLONES void merge_columns(float* max, double* sum, const float* other_max,
                                  const double* other_sum, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    const float top = other_max[k] > max[k] ? other_max[k] : max[k];
    sum[k] = sum[k] * exp_poly(max[k] - top) + other_sum[k] * exp_poly(other_max[k] - top);
    max[k] = top;
  }
}

struct Scores {
  Tensor t;
  ScalarType dtype;
  const void* data;
  int64_t stride, B, K, tasks;
  float scale;
  const float* bias;

  Scores(const Tensor& scores, double scale, const std::optional<Tensor>& bias)
      : t(scores.stride(1) == 1 || scores.size(1) == 1 ? scores : torch::stable::contiguous(scores)),
        dtype(t.scalar_type()), data(t.const_data_ptr()), stride(t.stride(0)), B(t.size(0)),
        K(t.size(1)), scale(static_cast<float>(scale)),
        bias(bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr) {
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                        dtype == ScalarType::Half,
                    "sinkhorn: scores must be float32, bfloat16 or float16");
    // Fixed shares of the rows, none of them tiny.
    tasks = std::min({int64_t(torch::stable::get_num_threads()), B, (B * K + (1 << 14) - 1) >> 14});
    tasks = std::max<int64_t>(1, tasks);
    STD_TORCH_CHECK(!bias || (bias->numel() == K && bias->scalar_type() == ScalarType::Float &&
                              bias->is_contiguous()),
                    "sinkhorn: bias must be a contiguous float32 tensor of ", K, " elements");
  }
  // Logits of n columns of a row, from column k0 on; returns the largest.
  float row(int64_t b, int64_t k0, int64_t n, float* x) const {
    const int64_t at = b * stride + k0;
    const float* some = bias ? bias + k0 : nullptr;
    if (dtype == ScalarType::Float)
      return logits_fp32(static_cast<const float*>(data) + at, n, scale, some, x);
    const uint16_t* s = static_cast<const uint16_t*>(data) + at;
    return dtype == ScalarType::Half ? logits_fp16(s, n, scale, some, x)
                                     : logits_bf16(s, n, scale, some, x);
  }
  // f(task, first row, last row).
  template <class F>
  void each_task(const F& f) const {
    parallel_tasks(tasks, [&](int64_t task) { f(task, B * task / tasks, B * (task + 1) / tasks); });
  }
  // f(first column, last column) over shares of the columns.
  template <class F>
  void each_columns(const F& f) const {
    parallel_tasks(tasks, [&](int64_t task) { f(K * task / tasks, K * (task + 1) / tasks); });
  }
};

// log sum_b e^x_bk of each column, from maxima and sums that the tasks merge.
void column_lse(const Scores& p, float* out) {
  std::vector<float> max(p.tasks * p.K, kFloor);
  std::vector<double> sum(p.tasks * p.K, 0.0);
  p.each_task([&](int64_t task, int64_t begin, int64_t end) {
    std::vector<float> block(kRows * kColumns);
    for (int64_t b = begin; b < end; b += kRows)
      for (int64_t k = 0; k < p.K; k += kColumns) {
        const int64_t rows = std::min(kRows, end - b), n = std::min(kColumns, p.K - k);
        for (int64_t i = 0; i < rows; ++i) p.row(b + i, k, n, &block[i * kColumns]);
        add_columns(block.data(), rows, n, &max[task * p.K + k], &sum[task * p.K + k]);
      }
  });
  p.each_columns([&](int64_t begin, int64_t end) {
    for (int64_t task = 1; task < p.tasks; ++task)
      merge_columns(&max[0] + begin, &sum[0] + begin, &max[task * p.K] + begin,
                    &sum[task * p.K] + begin, end - begin);
    for (int64_t k = begin; k < end; ++k) out[k] = max[k] + std::log(static_cast<float>(sum[k]));
  });
}

// log sum_b softmax_k(x_b)_k of each column.
void share_sums(const Scores& p, float* out) {
  std::vector<double> totals(p.tasks * p.K, 0.0);
  p.each_task([&](int64_t task, int64_t begin, int64_t end) {
    std::vector<float> x(p.K), sum(p.K, 0.f);
    for (int64_t b = begin; b < end; ++b) {
      const float max = p.row(b, 0, p.K, x.data());
      const double total = exponentials(x.data(), p.K, max);
      add_scaled(sum.data(), x.data(), p.K, static_cast<float>(1.0 / total));
      if ((b - begin) % 64 == 63 || b + 1 == end) flush(&totals[task * p.K], sum.data(), p.K);
    }
  });
  p.each_columns([&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      double total = 0.0;
      for (int64_t task = 0; task < p.tasks; ++task) total += totals[task * p.K + k];
      out[k] = std::log(static_cast<float>(total));
    }
  });
}

Tensor sinkhorn_pass(Tensor scores, double scale, std::optional<Tensor> bias) {
  const Scores p(scores, scale, bias);
  Tensor out = torch::stable::new_empty(scores, {p.K}, ScalarType::Float);
  float* data = static_cast<float*>(out.mutable_data_ptr());
  if (bias) share_sums(p, data);
  else column_lse(p, data);
  return out;
}

Tensor sinkhorn_codes(Tensor scores, double scale, Tensor bias) {
  const Scores p(scores, scale, bias);
  Tensor out = torch::stable::new_empty(scores, {p.B, p.K}, ScalarType::Float);
  float* data = static_cast<float*>(out.mutable_data_ptr());
  p.each_task([&](int64_t, int64_t begin, int64_t end) {
    std::vector<float> x(p.K);
    for (int64_t b = begin; b < end; ++b) {
      const float max = p.row(b, 0, p.K, x.data());
      const double total = exponentials(x.data(), p.K, max);
      write_scaled(data + b * p.K, x.data(), p.K, static_cast<float>(1.0 / total));
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("sinkhorn_pass", TORCH_BOX(&sinkhorn_pass));
  m.impl("sinkhorn_codes", TORCH_BOX(&sinkhorn_codes));
}

}  // namespace fastssl
