// The three matrix products of a blockwise similarity kernel, over one chunk of columns:
//   scores  S  = Q K^T      (rows x cols)
//   dq     += G K           (rows x D)
//   dk^T   += Q^T G         (D x cols), or its transpose
// in fp32 accumulation, never rounding a partial result. Two implementations share one interface:
//   Library: the products of torch's own BLAS (MKL sgemm; MKL bf16 x bf16 -> fp32, which uses AMX).
//   Micro:   an AVX-512 register-blocked kernel of ours, for machines where that library runs
//            narrower code than the processor has (MKL on AMD) or has no fp32 output (oneDNN bf16).
// A "unit" is 32 bits along the contracted dimension: one fp32 or a pair of bf16.
#pragma once

#include "common.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#if FASTSSL_X86
#include <immintrin.h>

#include <algorithm>
#define FASTSSL_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define FASTSSL_AVX512_BF16 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16")))
// Exported by the MKL inside libtorch; absent with another BLAS, hence weak.
extern "C" __attribute__((weak)) void cblas_gemm_bf16bf16f32(
    int layout, int transa, int transb, int m, int n, int k, float alpha, const uint16_t* a,
    int lda, const uint16_t* b, int ldb, float beta, float* c, int ldc);
#endif

namespace fastssl {

constexpr int64_t kStrip = 32;  // columns of a strip: two AVX-512 registers

inline int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

// A tile of S or G in fp32: element (i, c) of strip s lies at data[s * strip + i * row + c].
struct Tile {
  float* data;
  int64_t strip, row;
  float* at(int64_t s) const { return data + s * strip; }
  float& operator()(int64_t i, int64_t j) const {
    return data[j / kStrip * strip + i * row + j % kStrip];
  }
};

// C = op(A) op(B) + beta * C in fp32 by the library, row-major, C (m x n), contracted over k.
inline void float_product(bool ta, bool tb, int64_t m, int64_t n, int64_t k, const float* a,
                          int64_t lda, const float* b, int64_t ldb, float beta, float* c,
                          int64_t ldc) {
  const auto view = [](const float* p, int64_t rows, int64_t cols, int64_t ld, bool transpose) {
    const int64_t size[2] = {rows, cols};
    const int64_t stride[2] = {transpose ? 1 : ld, transpose ? ld : 1};
    return torch::stable::from_blob(const_cast<float*>(p), {size, 2}, {stride, 2},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                    ScalarType::Float);
  };
  Tensor out = view(c, m, n, ldc, false);
  const Tensor left = view(a, m, k, lda, ta), right = view(b, k, n, ldb, tb);
  const auto status = beta == 0.f
      ? aoti_torch_cpu_mm_out(out.get(), left.get(), right.get())
      : aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), beta, 1.0);
  STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS, "the library's matrix product failed");
}

// ------------------------------------------------------------------------------------- Library

template <bool kBf16>
class LibraryProducts {
 public:
  using T = std::conditional_t<kBf16, uint16_t, float>;
  struct Scratch {
    std::vector<T> q, g;
    std::vector<float> s;
    int64_t rows;
  };

  LibraryProducts(int64_t D, int64_t chunk, int64_t max_rows, int64_t max_cols, bool)
      : D_(D), ld_(round_up(max_cols, kStrip)), max_rows_(max_rows), k_(chunk * D) {}

  Scratch scratch(bool backward) const {
    return {std::vector<T>(max_rows_ * D_), std::vector<T>(backward && kBf16 ? max_rows_ * ld_ : 0),
            std::vector<float>(max_rows_ * ld_), 0};
  }
  int64_t dk_size(int64_t chunk) const { return chunk * D_; }

  void pack_keys(const Tensor& k, int64_t col0, int64_t begin, int64_t end, bool) {
    load(k, col0 + begin, end - begin, k_.data() + begin * D_);
  }
  void pack_queries(const Tensor& q, int64_t row0, int64_t rows, bool, Scratch& w) const {
    w.rows = rows;
    load(q, row0, rows, w.q.data());
  }
  // The tile that scores() fills, for whoever knows its values already.
  Tile tile(Scratch& w) const { return {w.s.data(), kStrip, ld_}; }
  Tile scores(int64_t begin, int64_t cols, Scratch& w) const {
    // Columns past the end of a strip are read by the epilogue: they must hold a finite number.
    if (cols % kStrip)
      for (int64_t i = 0; i < w.rows; ++i)
        std::fill(w.s.begin() + i * ld_ + cols, w.s.begin() + i * ld_ + round_up(cols, kStrip), 0.f);
    gemm(false, true, w.rows, cols, D_, w.q.data(), D_, k_.data() + begin * D_, D_, 0.f, w.s.data(),
         ld_);
    return tile(w);
  }
  void round_gradient(const Tile& g, int64_t cols, Scratch& w) const {
    if constexpr (kBf16)
      for (int64_t i = 0; i < w.rows; ++i)
        for (int64_t j = 0; j < cols; ++j)
          w.g[i * ld_ + j] = static_cast<uint16_t>(bf16_bits(g.data[i * ld_ + j]));
  }
  void add_dq(int64_t begin, int64_t cols, Scratch& w, float* dq, int64_t ld) const {
    gemm(false, false, w.rows, D_, cols, gradient(w), ld_, k_.data() + begin * D_, D_, 1.f, dq, ld);
  }
  void add_dk(int64_t begin, int64_t cols, Scratch& w, float* dk) const {
    gemm(true, false, cols, D_, w.rows, gradient(w), ld_, w.q.data(), D_, 1.f, dk + begin * D_, D_);
  }
  // rows [kStrip][D] += dk of columns [j, j + count), j a multiple of 32.
  void gather_dk(const float* dk, int64_t j, int64_t count, float* rows) const {
    for (int64_t n = 0; n < count * D_; ++n) rows[n] += dk[j * D_ + n];
  }

 private:
  const T* gradient(const Scratch& w) const {
    if constexpr (kBf16) return w.g.data();
    else return w.s.data();
  }
  void load(const Tensor& t, int64_t row0, int64_t rows, T* out) const {
    if constexpr (kBf16) {
      const auto* src = static_cast<const uint16_t*>(t.const_data_ptr()) + row0 * t.stride(0);
      for (int64_t i = 0; i < rows; ++i) std::memcpy(out + i * D_, src + i * t.stride(0), D_ * 2);
    } else {
      load_float_rows(t, row0, rows, out, D_);
    }
  }
  // As float_product, in T.
  static void gemm(bool ta, bool tb, int64_t m, int64_t n, int64_t k, const T* a, int64_t lda,
                   const T* b, int64_t ldb, float beta, float* c, int64_t ldc) {
    if constexpr (kBf16) {
#if FASTSSL_X86
      cblas_gemm_bf16bf16f32(101, ta ? 112 : 111, tb ? 112 : 111, m, n, k, 1.f, a, lda, b, ldb, beta,
                             c, ldc);
#endif
    } else {
      float_product(ta, tb, m, n, k, a, lda, b, ldb, beta, c, ldc);
    }
  }

  int64_t D_, ld_, max_rows_;
  std::vector<T> k_;
};

// --------------------------------------------------------------------------------------- Micro

#if FASTSSL_X86

// C[R x 32] (+)= A[R x units] B[units x 32]. Unit p of row r of A lies at a[r * lda + p * step]; A is
// read in `segments` runs of `seg` units, `jump` apart: the strips of G, or a single run.
struct MicroArgs {
  const uint32_t* a;
  int64_t lda, step, seg, segments, jump;
  const uint32_t* b;  // contiguous rows of 32 units
  float* c;
  int64_t ldc;
  bool add;
};

#define FASTSSL_MICRO(name, target, dot)                                                       \
  template <int R>                                                                             \
  target void name(const MicroArgs& m) {                                                       \
    __m512 acc[R][2];                                                                          \
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_ps();                   \
    const uint32_t* b = m.b;                                                                   \
    for (int64_t s = 0; s < m.segments; ++s) {                                                 \
      const uint32_t* a = m.a + s * m.jump;                                                    \
      for (int64_t p = 0; p < m.seg; ++p, b += kStrip) {                                       \
        const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 16);             \
        for (int r = 0; r < R; ++r) {                                                          \
          const __m512i x = _mm512_set1_epi32(static_cast<int>(a[r * m.lda + p * m.step]));             \
          acc[r][0] = dot(x, b0, acc[r][0]);                                                   \
          acc[r][1] = dot(x, b1, acc[r][1]);                                                   \
        }                                                                                      \
      }                                                                                        \
    }                                                                                          \
    /* Added at the end, not carried along: sums over many tiles then round in two levels. */   \
    _Pragma("GCC unroll 12") for (int r = 0; r < R; ++r) {                                     \
      float* c = m.c + r * m.ldc;                                                              \
      if (m.add) {                                                                             \
        acc[r][0] = _mm512_add_ps(acc[r][0], _mm512_loadu_ps(c));                              \
        acc[r][1] = _mm512_add_ps(acc[r][1], _mm512_loadu_ps(c + 16));                         \
      }                                                                                        \
      _mm512_storeu_ps(c, acc[r][0]);                                                          \
      _mm512_storeu_ps(c + 16, acc[r][1]);                                                     \
    }                                                                                          \
  }
#define FASTSSL_DOT_F32(x, y, acc) \
  _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), acc)
#define FASTSSL_DOT_BF16(x, y, acc) \
  _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y))
FASTSSL_MICRO(micro_f32, FASTSSL_AVX512, FASTSSL_DOT_F32)
FASTSSL_MICRO(micro_bf16, FASTSSL_AVX512_BF16, FASTSSL_DOT_BF16)

// r[i][j] and r[j][i] change places.
FASTSSL_AVX512 inline void transpose_16x16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int h = 0; h < 2; ++h) {
      r[i + 2 * h] = _mm512_unpacklo_epi64(t[i + h], t[i + h + 2]);
      r[i + 2 * h + 1] = _mm512_unpackhi_epi64(t[i + h], t[i + h + 2]);
    }
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 2; ++i) {
      t[8 * i + j] = _mm512_shuffle_i32x4(r[8 * i + j], r[8 * i + j + 4], 0x88);
      t[8 * i + j + 4] = _mm512_shuffle_i32x4(r[8 * i + j], r[8 * i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

// The lanes of the 16 from `at` on that lie below `end`.
inline __mmask16 lanes_below(int64_t at, int64_t end) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(end - at, 0, 16)) - 1);
}

// out[p][c] = in[c][p] of 32 rows of `units` units.
FASTSSL_AVX512 inline void transpose_units(const uint32_t* in, int64_t ld, int64_t units,
                                           uint32_t* out) {
  for (int64_t p = 0; p < units; p += 16)
    for (int64_t c = 0; c < kStrip; c += 16) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i)
        r[i] = _mm512_maskz_loadu_epi32(lanes_below(p, units), in + (c + i) * ld + p);
      transpose_16x16(r);
      for (int64_t i = 0; i < std::min<int64_t>(16, units - p); ++i)
        _mm512_storeu_si512(out + (p + i) * kStrip + c, r[i]);
    }
}

// out[c][d] += in[d][c] for c < count and d < D, rows of 32 in.
FASTSSL_AVX512 inline void add_transposed(const float* in, int64_t D, int64_t count, float* out) {
  for (int64_t d = 0; d < D; d += 16)
    for (int64_t c = 0; c < count; c += 16) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i)
        r[i] = d + i < D ? _mm512_loadu_si512(in + (d + i) * kStrip + c) : _mm512_setzero_si512();
      transpose_16x16(r);
      const __mmask16 inside = lanes_below(d, D);
      for (int64_t i = 0; i < std::min<int64_t>(16, count - c); ++i) {
        float* row = out + (c + i) * D + d;
        const __m512 sum = _mm512_maskz_loadu_ps(inside, row) + _mm512_castsi512_ps(r[i]);
        _mm512_mask_storeu_ps(row, inside, sum);
      }
    }
}

// G of one strip as the two bf16 operands: `a` [rows][16 units] pairs along columns, `b`
// [ceil(rows / 2)][32 units] pairs along rows.
FASTSSL_CLONES inline void round_strip(const float* g, int64_t ld, int64_t rows, uint16_t* a,
                                       uint32_t* b) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < kStrip; ++c)
      a[i * kStrip + c] = static_cast<uint16_t>(bf16_bits(g[i * ld + c]));
  for (int64_t p = 0; p < (rows + 1) / 2; ++p) {
    const uint16_t* lo = a + 2 * p * kStrip;
    for (int64_t c = 0; c < kStrip; ++c)
      b[p * kStrip + c] = lo[c] | (2 * p + 1 < rows ? uint32_t(lo[kStrip + c]) << 16 : 0u);
  }
}

template <bool kBf16>
class MicroProducts {
 public:
  static constexpr int64_t kPair = kBf16 ? 2 : 1;  // elements of a unit
  static constexpr int64_t kRun = 64;
  using T = std::conditional_t<kBf16, uint16_t, float>;
  struct Scratch {
    std::vector<T> q;           // [rows][Dp]
    std::vector<uint32_t> qt;   // bf16 pairs along rows [row units][D]: left operand of dk^T
    std::vector<float> s, dq;   // tile, and the last strip of dq where D is no multiple of 32
    std::vector<uint16_t> ga;   // bf16 G, pairs along columns
    std::vector<uint32_t> gb;   // bf16 G, pairs along rows
    int64_t rows, row_units;
  };

  MicroProducts(int64_t D, int64_t chunk, int64_t max_rows, int64_t max_cols, bool dq)
      : D_(D), units_(round_up(D, kPair) / kPair), strips_(round_up(D, kStrip) / kStrip),
        chunk_(round_up(chunk, kStrip)), max_rows_(max_rows), max_cols_(round_up(max_cols, kStrip)),
        kt_(chunk_ * units_), k_(dq ? strips_ * kStrip * (chunk_ / kPair) : 0) {}

  Scratch scratch(bool backward) const {
    Scratch w;
    w.q.assign(round_up(max_rows_, kPair) * units_ * kPair, 0);
    w.s.resize(max_rows_ * max_cols_);
    if (backward) {
      if (kBf16) w.qt.resize(D_ * ((max_rows_ + 1) / 2));
      w.dq.resize(max_rows_ * kStrip);
      if (kBf16) w.ga.resize(max_rows_ * max_cols_), w.gb.resize((max_rows_ + 1) / 2 * max_cols_);
    }
    return w;
  }
  int64_t dk_size(int64_t chunk) const { return round_up(chunk, kStrip) * D_; }

  // Columns [begin, end) of the chunk, begin a multiple of 32: K^T by strips of columns for the
  // scores and, for dq, K by strips of D with (pairs of) columns contracted.
  void pack_keys(const Tensor& k, int64_t col0, int64_t begin, int64_t end, bool for_dq) {
    std::vector<T> rows(kStrip * units_ * kPair, 0);
    for (int64_t j = begin; j < end; j += kStrip) {
      const int64_t count = std::min(kStrip, end - j);
      if (count < kStrip) std::fill(rows.begin(), rows.end(), T(0));
      load(k, col0 + j, count, rows.data());
      const auto* in = reinterpret_cast<const uint32_t*>(rows.data());
      transpose_units(in, units_, units_, kt_.data() + j * units_);
      if (!for_dq) continue;
      for (int64_t s = 0; s < strips_; ++s) {
        uint32_t* out = k_.data() + (s * (chunk_ / kPair) + j / kPair) * kStrip;
        const int64_t width = std::min(kStrip, D_ - s * kStrip);  // the rest stays zero
        for (int64_t p = 0; p < kStrip / kPair; ++p)
          pair_rows(rows.data() + p * kPair * units_ * kPair + s * kStrip, width, out + p * kStrip);
      }
    }
  }

  void pack_queries(const Tensor& q, int64_t row0, int64_t rows, bool for_dk, Scratch& w) const {
    w.rows = rows;
    w.row_units = round_up(rows, kPair) / kPair;
    load(q, row0, rows, w.q.data());
    if (!for_dk) return;
    if constexpr (kBf16) {
      // An odd number of rows leaves half a pair, which would hold a row of the panel before.
      if (rows % 2) std::fill_n(w.q.begin() + rows * units_ * 2, units_ * 2, T(0));
      for (int64_t p = 0; p < w.row_units; ++p)
        pair_rows(w.q.data() + 2 * p * units_ * 2, D_, w.qt.data() + p * D_);
    }
  }
  Tile tile(Scratch& w) const { return {w.s.data(), w.rows * kStrip, kStrip}; }
  Tile scores(int64_t begin, int64_t cols, Scratch& w) const {
    const int64_t strip = w.rows * kStrip;
    const auto* q = reinterpret_cast<const uint32_t*>(w.q.data());
    // fp32 sums over D in two levels: one long chain of additions would lose a digit to the library.
    const int64_t run = kBf16 ? units_ : kRun;
    for (int64_t s = 0; s * kStrip < cols; ++s)
      for (int64_t p = 0; p < units_; p += run)
        product(w.rows, {q + p, units_, 1, std::min(run, units_ - p), 1, 0,
                         kt_.data() + (begin + s * kStrip) * units_ + p * kStrip,
                         w.s.data() + s * strip, kStrip, p > 0});
    return tile(w);
  }
  void round_gradient(const Tile& g, int64_t cols, Scratch& w) const {
    if constexpr (kBf16)
      for (int64_t s = 0; s * kStrip < cols; ++s)
        round_strip(g.at(s), g.row, w.rows, w.ga.data() + s * w.rows * kStrip,
                    w.gb.data() + s * w.row_units * kStrip);
  }
  void add_dq(int64_t begin, int64_t cols, Scratch& w, float* dq, int64_t ld) const {
    const int64_t segments = round_up(cols, kStrip) / kStrip, seg = kStrip / kPair;
    const uint32_t* a = kBf16 ? reinterpret_cast<const uint32_t*>(w.ga.data())
                              : reinterpret_cast<const uint32_t*>(w.s.data());
    const bool whole = D_ % kStrip == 0;  // otherwise the last strip would write past the row
    for (int64_t s = 0; s < strips_; ++s) {
      const bool direct = whole || s + 1 < strips_;
      float* c = direct ? dq + s * kStrip : w.dq.data();
      product(w.rows, {a, seg, 1, seg, segments, w.rows * seg,
                       k_.data() + (s * (chunk_ / kPair) + begin / kPair) * kStrip, c,
                       direct ? ld : kStrip, direct});
      if (direct) continue;
      for (int64_t i = 0; i < w.rows; ++i)
        for (int64_t d = s * kStrip; d < D_; ++d) dq[i * ld + d] += c[i * kStrip + d - s * kStrip];
    }
  }
  void add_dk(int64_t begin, int64_t cols, Scratch& w, float* dk) const {
    for (int64_t s = 0; s * kStrip < cols; ++s) {
      const uint32_t* g = kBf16 ? w.gb.data() + s * w.row_units * kStrip
                                : reinterpret_cast<const uint32_t*>(w.s.data()) + s * w.rows * kStrip;
      const uint32_t* qt =
          kBf16 ? w.qt.data() : reinterpret_cast<const uint32_t*>(w.q.data());
      product(D_, {qt, 1, D_, w.row_units, 1, 0, g, dk + (begin + s * kStrip) * D_, kStrip, true});
    }
  }
  void gather_dk(const float* dk, int64_t j, int64_t count, float* rows) const {
    add_transposed(dk + j * D_, D_, count, rows);
  }

 private:
  void load(const Tensor& t, int64_t row0, int64_t rows, T* out) const {
    if constexpr (kBf16) {
      const auto* src = static_cast<const uint16_t*>(t.const_data_ptr()) + row0 * t.stride(0);
      for (int64_t i = 0; i < rows; ++i)
        std::memcpy(out + i * units_ * 2, src + i * t.stride(0), D_ * 2);
    } else {
      load_float_rows(t, row0, rows, out, units_);
    }
  }
  // One unit a column from the next kPair rows, units_ * kPair elements apart.
  void pair_rows(const T* rows, int64_t n, uint32_t* out) const {
    if constexpr (kBf16)
      for (int64_t d = 0; d < n; ++d)
        out[d] = rows[d] | static_cast<uint32_t>(rows[units_ * 2 + d]) << 16;
    else
      std::memcpy(out, rows, n * sizeof(uint32_t));
  }
  template <int R>
  static void run(const MicroArgs& m) {
    if constexpr (kBf16) micro_bf16<R>(m);
    else micro_f32<R>(m);
  }
  // C (m x 32), twelve rows at a time: 24 accumulators and the three operands fill 32 registers.
  static void product(int64_t m, MicroArgs args) {
    constexpr void (*kTail[12])(const MicroArgs&) = {nullptr, run<1>, run<2>, run<3>, run<4>,  run<5>,
                                                     run<6>,  run<7>, run<8>, run<9>, run<10>, run<11>};
    for (; m >= 12; m -= 12) {
      run<12>(args);
      args.a += 12 * args.lda;
      args.c += 12 * args.ldc;
    }
    if (m) kTail[m](args);
  }

  int64_t D_, units_, strips_, chunk_, max_rows_, max_cols_;
  std::vector<uint32_t> kt_, k_;
};
#endif  // FASTSSL_X86

}  // namespace fastssl
