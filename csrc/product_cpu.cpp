// C = A B or C += A B in fp32, for ops that are made of whole matrix products; A and B in fp32, or
// in bf16, whose products are exact in fp32. By the register-blocked kernels of products.h where
// they are wider than the library's (MKL on AMD) or it has none; where it has AMX, or too little is
// multiplied for packing to pay, by the library.
//
// A task owns a tile of C. It packs B by strips of 32 columns and A by panels of rows that stay in
// the second-level cache, kDepth deep. An element of C is summed in an order that only k decides, so
// the result does not depend on the number of threads. 2 m n k operations, 1 MiB a task.
#include "products.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <memory>
#include <utility>

namespace fastssl {
namespace {

// A matrix whose elements lie together by rows or by columns: as given, or a copy.
struct Matrix {
  Tensor t;
  int64_t rows, cols, ld;
  bool by_columns;

  explicit Matrix(const Tensor& x)
      : t(std::min(x.size(0), x.size(1)) < 2 || x.stride(0) == 1 || x.stride(1) == 1
              ? x
              : torch::stable::contiguous(x)),
        rows(t.size(0)), cols(t.size(1)) {
    by_columns = t.stride(1) != 1 && cols > 1;
    ld = t.stride(by_columns ? 1 : 0);
  }
  Matrix transposed() const {
    Matrix x = *this;
    std::swap(x.rows, x.cols);
    x.by_columns = !by_columns;
    return x;
  }
  template <class T>
  const T* at(int64_t i, int64_t j) const {
    return static_cast<const T*>(t.const_data_ptr()) + (by_columns ? j * ld + i : i * ld + j);
  }
};

#if FASTSSL_X86

constexpr int64_t kTileRows = 768, kTileColumns = 512, kRows = 96, kGroup = 12;
constexpr int64_t kDepth = 384;  // units of 32 bits
constexpr int64_t kRun = 64;     // sums in two levels: one long chain of additions loses a digit

template <class T, int... R>
constexpr auto micro_kernels(std::integer_sequence<int, R...>) {
  using Kernel = void (*)(const MicroArgs&);
  if constexpr (sizeof(T) == 4) return std::array<Kernel, sizeof...(R)>{micro_f32<R + 1>...};
  else return std::array<Kernel, sizeof...(R)>{micro_bf16<R + 1>...};
}

// Columns [j, j + count) of rows [p, p + deep) of B as rows of 32 units, those past the end zero.
template <class T>
void pack_strip(const Matrix& b, int64_t p, int64_t deep, int64_t j, int64_t count, uint32_t* out,
                uint32_t* columns) {
  constexpr int64_t kPair = 4 / sizeof(T);
  if (!b.by_columns) {  // fp32
    for (int64_t i = 0; i < deep; ++i, out += kStrip) {
      std::memcpy(out, b.at<T>(p + i, j), count * sizeof(T));
      std::fill(out + count, out + kStrip, 0u);
    }
    return;
  }
  const int64_t units = round_up(deep, kPair) / kPair;
  std::fill_n(columns, kStrip * units, 0u);
  for (int64_t c = 0; c < count; ++c)
    std::memcpy(columns + c * units, b.at<T>(p, j + c), deep * sizeof(T));
  transpose_units(columns, units, units, out);
}

// How C is cut: into as many tiles as threads, if that leaves them more than a few groups of rows.
struct Tiles {
  int64_t rows, cols, down, across;
  Tiles(int64_t m, int64_t n) {
    const int64_t threads = torch::stable::get_num_threads();
    down = (m + kTileRows - 1) / kTileRows, across = (n + kTileColumns - 1) / kTileColumns;
    while (down * across < 4 * threads && down * across % threads && m / down > 4 * kGroup) ++down;
    while (down * across < threads && n / across > 2 * kStrip) ++across;
    rows = round_up((m + down - 1) / down, kGroup), cols = round_up((n + across - 1) / across, kStrip);
    down = (m + rows - 1) / rows, across = (n + cols - 1) / cols;
  }
};

// Rows of A in fp32 by columns of B in bf16: few rows, so that each column is read once.
FASTSSL_CLONES void dots(const float* a, int64_t rows, int64_t k, const uint16_t* b, float* wide,
                         float* out, int64_t ld, bool add) {
  for (int64_t p = 0; p < k; ++p) wide[p] = bf16_float(b[p]);
  for (int64_t i = 0; i < rows; ++i, a += k) {
    float lanes[64] = {};
    int64_t p = 0;
    for (; p + 64 <= k; p += 64)
      for (int64_t c = 0; c < 64; ++c) lanes[c] += a[p + c] * wide[p + c];
    for (; p < k; ++p) lanes[p % 64] += a[p] * wide[p];
    for (int64_t half = 32; half; half /= 2)
      for (int64_t c = 0; c < half; ++c) lanes[c] += lanes[c + half];
    out[i * ld] = lanes[0] + (add ? out[i * ld] : 0.f);
  }
}

void few_rows(const Matrix& a, const Matrix& b, float* c, int64_t ldc, bool add) {
  std::vector<float> rows(a.rows * a.cols);
  load_float_rows(a.t, 0, a.rows, rows.data(), a.cols);
  torch::stable::parallel_for(0, b.cols, 128, [&](int64_t begin, int64_t end) {
    std::vector<float> wide(a.cols);
    for (int64_t j = begin; j < end; ++j)
      dots(rows.data(), a.rows, a.cols, b.at<uint16_t>(0, j), wide.data(), c + j, ldc, add);
  });
}

template <class T>
void own_product(const Matrix& a, const Matrix& b, float* c, int64_t ldc, bool add) {
  constexpr auto kMicro = micro_kernels<T>(std::make_integer_sequence<int, kGroup>());
  constexpr int64_t kPair = 4 / sizeof(T);
  const int64_t m = a.rows, n = b.cols, k = a.cols;
  const Tiles tiles(m, n);
  const int64_t depth = std::min(kDepth, round_up(k, kPair) / kPair);
  const int64_t panel = std::min(kRows, tiles.rows);
  // A little more than is used: rows a power of two apart would meet in one set of the cache.
  const int64_t row = a.by_columns ? panel : depth + 16;

  parallel_tasks(tiles.down * tiles.across, [&](int64_t task) {
    const auto left = std::make_unique_for_overwrite<uint32_t[]>(panel * (depth + 16));
    const auto right = std::make_unique_for_overwrite<uint32_t[]>(tiles.cols * depth);
    const auto columns = std::make_unique_for_overwrite<uint32_t[]>(kStrip * depth);
    float edge[kGroup * kStrip];
    const int64_t first_row = task % tiles.down * tiles.rows, j0 = task / tiles.down * tiles.cols;
    const int64_t last_row = std::min(m, first_row + tiles.rows), cols = std::min(tiles.cols, n - j0);
    for (int64_t p0 = 0; p0 < k; p0 += kDepth * kPair) {
      const int64_t deep = std::min(kDepth * kPair, k - p0), units = round_up(deep, kPair) / kPair;
      const bool more = add || p0 > 0;
      for (int64_t j = 0; j < cols; j += kStrip)
        pack_strip<T>(b, p0, deep, j0 + j, std::min(kStrip, cols - j), right.get() + j * depth,
                      columns.get());
      for (int64_t i0 = first_row; i0 < last_row; i0 += panel) {
        const int64_t rows = std::min(panel, last_row - i0);
        for (int64_t i = 0; i < (a.by_columns ? deep : rows); ++i) {
          uint32_t* line = left.get() + i * row;
          if (a.by_columns) {  // fp32
            std::memcpy(line, a.at<T>(i0, p0 + i), rows * sizeof(T));
            continue;
          }
          line[units - 1] = 0;  // half a pair may be missing
          std::memcpy(line, a.at<T>(i0 + i, p0), deep * sizeof(T));
        }
        for (int64_t j = 0; j < cols; j += kStrip) {
          const int64_t width = std::min(kStrip, cols - j);
          const bool whole = width == kStrip;
          for (int64_t i = 0; i < rows; i += kGroup) {
            const int64_t group = std::min(kGroup, rows - i);
            float* out = c + (i0 + i) * ldc + j0 + j;
            for (int64_t p = 0; p < units; p += kRun)
              kMicro[group - 1]({left.get() + (a.by_columns ? i + p * row : i * row + p),
                                 a.by_columns ? 1 : row, a.by_columns ? row : 1,
                                 std::min(kRun, units - p), 1, 0,
                                 right.get() + j * depth + p * kStrip, whole ? out : edge,
                                 whole ? ldc : kStrip, p > 0 || (whole && more)});
            for (int64_t r = 0; r < (whole ? 0 : group); ++r)
              for (int64_t e = 0; e < width; ++e)
                out[r * ldc + e] = edge[r * kStrip + e] + (more ? out[r * ldc + e] : 0.f);
          }
        }
      }
    }
  });
}

#endif

// bf16 as fp32, in the layout it has.
std::vector<float> widened(const Matrix& x) {
  const Tensor rows = x.by_columns ? torch::stable::transpose(x.t, 0, 1) : x.t;
  std::vector<float> out(x.rows * x.cols);
  load_float_rows(rows, 0, rows.size(0), out.data(), rows.size(1));
  return out;
}

void product(Tensor out, Tensor a, Tensor b, bool add) {
  const Matrix x(a), y(b);
  const int64_t ldc = out.stride(0);
  const bool half = a.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(x.cols == y.rows && out.size(0) == x.rows && out.size(1) == y.cols &&
                      (out.stride(1) == 1 || y.cols < 2) &&
                      (half || a.scalar_type() == ScalarType::Float) &&
                      a.scalar_type() == b.scalar_type() && out.scalar_type() == ScalarType::Float,
                  "product: out (m, n) float32 of contiguous rows, a (m, k), b (k, n) both float32 "
                  "or bfloat16");
  float* c = static_cast<float*>(out.mutable_data_ptr());
#if FASTSSL_X86
  const bool large = x.rows >= 2 * kGroup && y.cols >= kStrip && x.cols >= 16 &&
                     x.rows * y.cols * x.cols >= 1 << 18;
  const bool along = half && x.cols && !x.by_columns && y.by_columns;  // pairs lie together
  const bool flat = x.rows < 2 * kGroup;
  if (along && (x.rows < 4 || (flat && !cpu().avx512_bf16))) return few_rows(x, y, c, ldc, add);
  if (along && flat) {  // as B^T A^T, so that B, the larger, need not be transposed
    std::vector<float> turned(x.rows * y.cols);
    own_product<uint16_t>(y.transposed(), x.transposed(), turned.data(), x.rows, false);
    for (int64_t i = 0; i < x.rows; ++i)
      for (int64_t j = 0; j < y.cols; ++j)
        c[i * ldc + j] = turned[j * x.rows + i] + (add ? c[i * ldc + j] : 0.f);
    return;
  }
  if (along && cpu().amx_bf16 && cpu().mkl_bf16 && x.ld >= x.cols && y.ld >= x.cols)
    return cblas_gemm_bf16bf16f32(101, 111, 112, x.rows, y.cols, x.cols, 1.f, x.at<uint16_t>(0, 0),
                                  x.ld, y.at<uint16_t>(0, 0), y.ld, add, c, ldc);
  if (along && cpu().avx512_bf16) return own_product<uint16_t>(x, y, c, ldc, add);
  if (!half && cpu().avx512 && cpu().amd && large) return own_product<float>(x, y, c, ldc, add);
#endif
  const auto library = [&](const float* left, int64_t lda, const float* right, int64_t ldb) {
    float_product(x.by_columns, y.by_columns, x.rows, y.cols, x.cols, left, lda, right, ldb,
                  add ? 1.f : 0.f, c, ldc);
  };
  if (half)
    library(widened(x).data(), x.by_columns ? x.rows : x.cols, widened(y).data(),
            y.by_columns ? y.rows : y.cols);
  else
    library(x.at<float>(0, 0), x.ld, y.at<float>(0, 0), y.ld);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) { m.impl("product_", TORCH_BOX(&product)); }

}  // namespace fastssl
