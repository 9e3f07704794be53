// The passes over features around the products of `gram`, each reading them once in their own dtype:
// of every column the sums of x and x^2, x = z - mean, or of x y, in fp64; and x scale + shift.
//
// Sums are fp32 over at most 64 rows, fp64 across these, merged in order over blocks that only the
// size of the matrix decides: the result does not depend on the number of threads.
#include "common.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

namespace fastssl {
namespace {

constexpr int64_t kRows = 256, kFlush = 64, kColumns = 256;
using OptTensor = std::optional<Tensor>;

const float* floats(const OptTensor& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

// A matrix whose rows lie together, and where its element (i, j) is.
struct Rows {
  Tensor t;
  int64_t N, D;

  explicit Rows(const Tensor& x)
      : t(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1) ? x : torch::stable::contiguous(x)),
        N(t.size(0)), D(t.size(1)) {
    const auto dtype = t.scalar_type();
    STD_TORCH_CHECK(t.dim() == 2 && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                                     dtype == ScalarType::Half),
                    "gram: features must be float32, bfloat16 or float16 matrices");
  }
  // f(pointer to its elements from (i, j) on, conversion of one to fp32).
  template <class F>
  void from(int64_t i, int64_t j, const F& f) const {
    const int64_t at = i * t.stride(0) + j;
    const void* data = t.const_data_ptr();
    if (t.scalar_type() == ScalarType::Float) f(static_cast<const float*>(data) + at);
    else if (t.scalar_type() == ScalarType::Half) f(static_cast<const Fp16*>(data) + at);
    else f(static_cast<const Bf16*>(data) + at);
  }
  void check(const OptTensor& x) const {
    STD_TORCH_CHECK(!x || (x->numel() == D && x->scalar_type() == ScalarType::Float &&
                           x->is_contiguous()),
                    "gram: a vector must be contiguous float32 of ", D, " elements");
  }
};

// Of at most kFlush rows and kColumns columns.
template <class T>
FASTSSL_INLINE inline void moments_body(const T* z, int64_t ld, int64_t rows, int64_t n,
                                        const float* mean, double* sum, double* square) {
  float s[kColumns] = {}, q[kColumns] = {};
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < n; ++c) {
      const float x = load(z[i * ld + c]) - (mean ? mean[c] : 0.f);
      s[c] += x;
      q[c] += x * x;
    }
  for (int64_t c = 0; c < n; ++c) sum[c] += s[c], square[c] += q[c];
}
FASTSSL_CLONES void moments_of(const float* z, int64_t ld, int64_t rows, int64_t n,
                               const float* mean, double* sum, double* square) {
  moments_body(z, ld, rows, n, mean, sum, square);
}
FASTSSL_CLONES void moments_of(const Fp16* z, int64_t ld, int64_t rows, int64_t n,
                               const float* mean, double* sum, double* square) {
  moments_body(z, ld, rows, n, mean, sum, square);
}
FASTSSL_CLONES void moments_of(const Bf16* z, int64_t ld, int64_t rows, int64_t n,
                               const float* mean, double* sum, double* square) {
  moments_body(z, ld, rows, n, mean, sum, square);
}
FASTSSL_CLONES void dots_of(const float* x, int64_t ldx, const float* y, int64_t ldy, int64_t rows,
                            int64_t n, double* sum) {
  float s[kColumns] = {};
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < n; ++c) s[c] += x[i * ldx + c] * y[i * ldy + c];
  for (int64_t c = 0; c < n; ++c) sum[c] += s[c];
}

template <class T>
FASTSSL_INLINE inline void standardise_body(const T* z, int64_t n, const float* mean,
                                            const float* scale, const float* shift, float* out) {
  for (int64_t c = 0; c < n; ++c) out[c] = (load(z[c]) - mean[c]) * scale[c] + shift[c];
}
FASTSSL_CLONES void standardise_of(const float* z, int64_t n, const float* mean, const float* scale,
                                   const float* shift, float* out) {
  standardise_body(z, n, mean, scale, shift, out);
}
FASTSSL_CLONES void standardise_of(const Fp16* z, int64_t n, const float* mean,
                                   const float* scale, const float* shift, float* out) {
  standardise_body(z, n, mean, scale, shift, out);
}
FASTSSL_CLONES void standardise_of(const Bf16* z, int64_t n, const float* mean,
                                   const float* scale, const float* shift, float* out) {
  standardise_body(z, n, mean, scale, shift, out);
}

// (sums, D) in fp64: f(first row, rows, first column, columns, sums) adds up to kFlush rows.
template <class F>
Tensor column_sums(const Rows& x, int64_t sums, const F& f) {
  Tensor out = torch::stable::new_zeros(x.t, {sums, x.D}, ScalarType::Double);
  double* total = static_cast<double*>(out.mutable_data_ptr());
  const int64_t blocks = (x.N + kRows - 1) / kRows, strips = (x.D + kColumns - 1) / kColumns;
  std::vector<double> parts(blocks > 1 ? blocks * sums * x.D : 0);
  const auto run = [&](int64_t t) {
    const int64_t b = t / strips, j = t % strips * kColumns;
    double* own = blocks > 1 ? parts.data() + b * sums * x.D : total;
    for (int64_t i = b * kRows; i < std::min(x.N, (b + 1) * kRows); i += kFlush)
      f(i, std::min(kFlush, x.N - i), j, std::min(kColumns, x.D - j), own + j);
  };
  if (x.N * x.D < (1 << 15))  // less than threads cost
    for (int64_t t = 0; t < blocks * strips; ++t) run(t);
  else
    parallel_tasks(blocks * strips, run);
  for (int64_t b = 0; b < blocks && blocks > 1; ++b)
    for (int64_t c = 0; c < sums * x.D; ++c) total[c] += parts[b * sums * x.D + c];
  return out;
}

Tensor column_moments(Tensor z, OptTensor mean) {
  const Rows x(z);
  x.check(mean);
  return column_sums(x, 2, [&](int64_t i, int64_t rows, int64_t j, int64_t n, double* sums) {
    x.from(i, j, [&](const auto* at) {
      moments_of(at, x.t.stride(0), rows, n, mean ? floats(mean) + j : nullptr, sums, sums + x.D);
    });
  });
}

Tensor column_dots(Tensor a, Tensor b) {
  const Rows x(a), y(b);
  STD_TORCH_CHECK(x.N == y.N && x.D == y.D && x.t.scalar_type() == ScalarType::Float &&
                      y.t.scalar_type() == ScalarType::Float,
                  "gram: two float32 matrices of one size");
  return column_sums(x, 1, [&](int64_t i, int64_t rows, int64_t j, int64_t n, double* sums) {
    const auto at = [&](const Rows& r) {
      return static_cast<const float*>(r.t.const_data_ptr()) + i * r.t.stride(0) + j;
    };
    dots_of(at(x), x.t.stride(0), at(y), y.t.stride(0), rows, n, sums);
  });
}

Tensor standardise(Tensor z, Tensor mean, Tensor scale, Tensor shift) {
  const Rows x(z);
  for (const Tensor& v : {mean, scale, shift}) x.check(v);
  Tensor out = torch::stable::new_empty(z, {x.N, x.D}, ScalarType::Float);
  float* data = static_cast<float*>(out.mutable_data_ptr());
  const auto run = [&](int64_t i) {
    x.from(i, 0, [&](const auto* at) {
      standardise_of(at, x.D, floats(mean), floats(scale), floats(shift), data + i * x.D);
    });
  };
  const int64_t share = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(x.D, 1));
  torch::stable::parallel_for(0, x.N, share, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("column_moments", TORCH_BOX(&column_moments));
  m.impl("column_dots", TORCH_BOX(&column_dots));
  m.impl("standardise", TORCH_BOX(&standardise));
}

}  // namespace fastssl
