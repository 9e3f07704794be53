// Sinkhorn-Knopp over prototypes in scaling form: with logits x_bk = scale s_bk + bias_k,
// out_k = log sum_b e^x_bk (the first pass, no bias yet) or log sum_b softmax_k(x_b)_k (the others),
// and softmax_k(x_b) itself, the codes.
//
// Each pass reads the scores once, in their own dtype, with about one exponential an element. In
// the first a task owns columns: (max, sum) of each, by blocks of 16 rows. In the others it owns
// rows: one row of exponentials and the sums of its rows, 16 bytes for each of the K columns.
// Exponents are differences to maxima, so nothing overflows; sums are fp32 inside a block of rows
// and fp64 across blocks, merged in task order: deterministic for a given number of threads.
// Paper: SwAV arXiv:2006.09882 for the problem, arXiv:1306.0895 for the iteration.
#include "rows.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

namespace fastssl {
namespace {

constexpr int64_t kRows = 16, kColumns = 256;  // of scores that stay in cache between two looks

// x_k = e^(x_k - max) for n columns, filled up to whole lanes; returns their sum.
FASTSSL_CLONES double exponentials(float* x, int64_t n, float max, const Ahead& next) {
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += 1024) {
    float lanes[kLanes] = {};
    for (int64_t k = begin; k < std::min(n, begin + 1024); k += kLanes) {
      next.fetch(k);
      for (int64_t c = 0; c < kLanes; ++c) lanes[c] += x[k + c] = exp_poly(x[k + c] - max);
    }
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

// (max, sum) of n columns takes in those of some rows of scores.
template <class T, class Load>
FASTSSL_INLINE inline void add_columns(const T* s, int64_t stride, int64_t rows, int64_t n,
                                       float scale, float* max, double* sum, const Load& load) {
  float top[kColumns], part[kColumns] = {};
  std::copy(max, max + n, top);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < n; ++k) {
      const float v = load(s[i * stride + k]) * scale;
      top[k] = v > top[k] ? v : top[k];
    }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < n; ++k)
      part[k] += exp_poly(load(s[i * stride + k]) * scale - top[k]);
  for (int64_t k = 0; k < n; ++k) {
    sum[k] = sum[k] * exp_poly(max[k] - top[k]) + part[k];
    max[k] = top[k];
  }
}
#define COLUMNS(NAME, TYPE, FLOAT)                                                             \
  FASTSSL_CLONES void NAME(const TYPE* s, int64_t stride, int64_t rows, int64_t n, float scale, \
                           float* max, double* sum) {                                          \
    add_columns(s, stride, rows, n, scale, max, sum,                                           \
                [](TYPE v) FASTSSL_INLINE { return FLOAT; });                                  \
  }
COLUMNS(columns_fp32, float, v)
COLUMNS(columns_bf16, uint16_t, bf16_float(v))
COLUMNS(columns_fp16, uint16_t, half_float(v))
#undef COLUMNS

struct Scores {
  Tensor t;
  int64_t stride, B, K, padded, tasks;
  float scale;
  const float* bias;

  Scores(const Tensor& scores, double scale, const std::optional<Tensor>& bias)
      : t(scores.stride(1) == 1 || scores.size(1) == 1 ? scores : torch::stable::contiguous(scores)),
        stride(t.stride(0)), B(t.size(0)), K(t.size(1)),
        padded((K + kLanes - 1) / kLanes * kLanes), scale(static_cast<float>(scale)),
        bias(bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr) {
    check_scores("sinkhorn: scores", t);
    STD_TORCH_CHECK(!bias || (bias->numel() == K && bias->scalar_type() == ScalarType::Float &&
                              bias->is_contiguous()),
                    "sinkhorn: bias must be a contiguous float32 tensor of ", K, " elements");
    // None of them tiny.
    tasks = std::min<int64_t>(torch::stable::get_num_threads(), (B * K >> 14) + 1);
  }
  // f(task, first row, last row) over shares of the rows.
  template <class F>
  void each_task(const F& f) const {
    parallel_tasks(row_tasks(), [&](int64_t task) {
      f(task, B * task / row_tasks(), B * (task + 1) / row_tasks());
    });
  }
  int64_t row_tasks() const { return std::max<int64_t>(1, std::min(tasks, B)); }
  // f(first column, last column) over shares of the columns, in whole lanes.
  template <class F>
  void each_columns(const F& f) const {
    const int64_t strips = padded / kLanes;
    parallel_tasks(tasks, [&](int64_t task) {
      f(strips * task / tasks * kLanes, std::min(K, strips * (task + 1) / tasks * kLanes));
    });
  }
  // x = e^(logits of row b - their maximum); returns the sum.
  double exponentials_of(int64_t b, float* x) const {
    const float max = logits_of(t, b * stride, K, scale, bias, x);
    return exponentials(x, padded, max, Ahead(t, std::min(b + 1, B - 1) * stride));
  }
  // (max, sum) of columns [k, k + n) takes in rows [b, b + rows).
  void add_to_columns(int64_t b, int64_t rows, int64_t k, int64_t n, float* max,
                      double* sum) const {
    const void* data = t.const_data_ptr();
    const int64_t at = b * stride + k;
    if (t.scalar_type() == ScalarType::Float)
      return columns_fp32(static_cast<const float*>(data) + at, stride, rows, n, scale, max, sum);
    const auto columns = t.scalar_type() == ScalarType::Half ? columns_fp16 : columns_bf16;
    columns(static_cast<const uint16_t*>(data) + at, stride, rows, n, scale, max, sum);
  }
};

// log sum_b e^x_bk of each column.
void column_lse(const Scores& p, float* out) {
  p.each_columns([&](int64_t begin, int64_t end) {
    std::vector<float> max(end - begin, kFloor);
    std::vector<double> sum(end - begin, 0.0);
    for (int64_t b = 0; b < p.B; b += kRows)
      for (int64_t k = begin; k < end; k += kColumns)
        p.add_to_columns(b, std::min(kRows, p.B - b), k, std::min(kColumns, end - k),
                         &max[k - begin], &sum[k - begin]);
    for (int64_t k = begin; k < end; ++k)
      out[k] = max[k - begin] + std::log(static_cast<float>(sum[k - begin]));
  });
}

// log sum_b softmax_k(x_b)_k of each column: rows are shared out, since a row's sum comes first.
void share_sums(const Scores& p, float* out) {
  std::vector<double> totals(p.row_tasks() * p.K, 0.0);
  p.each_task([&](int64_t task, int64_t begin, int64_t end) {
    std::vector<float> x(p.padded), sum(p.K, 0.f);
    for (int64_t b = begin; b < end; ++b) {
      const double total = p.exponentials_of(b, x.data());
      add_scaled(sum.data(), x.data(), p.K, static_cast<float>(1.0 / total));
      if ((b - begin) % 64 == 63 || b + 1 == end) flush(&totals[task * p.K], sum.data(), p.K);
    }
  });
  p.each_columns([&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      double total = 0.0;
      for (int64_t task = 0; task < p.row_tasks(); ++task) total += totals[task * p.K + k];
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
  Tensor out = new_result(scores, {p.B, p.K}, ScalarType::Float);
  float* data = static_cast<float*>(out.mutable_data_ptr());
  p.each_task([&](int64_t, int64_t begin, int64_t end) {
    std::vector<float> x(p.padded);
    for (int64_t b = begin; b < end; ++b) {
      const double total = p.exponentials_of(b, x.data());
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
