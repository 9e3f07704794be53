// SIGReg: sums over rows of cos(k h p) - e^(-(k h)^2 / 2) and sin(k h p), k = 1 .. knots, p = z A,
// and dz = dp A^T of dp = sum_k a_k cos(k h p) + b_k sin(k h p).
//
// Projections are made in blocks of rows by one product, which all threads share; then a task owns
// 16 slices and goes down the block. An element costs one reduction of its angle x = h p, one sine
// and cosine, rotations to 2 x, 5 x and the anchors 10 x, 15 x, ..., and one fused multiply-add for
// each knot and function: from sums of products like cos(10 x) cos(2 x) follow both knots 8 and 12.
// Rotations are complex, so errors grow like k; recurrences in cosines alone would give k^2.
// Nothing of rows x slices x knots is stored. On the number of threads depends only how the library
// rounds its products.
// Sums are fp32 within 128 rows, fp64 across: near a Gaussian what is left of them is small.
// Papers: LeJEPA arXiv:2511.08544; Philox, SC 2011.
#include "products.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <optional>

// Vectors are passed between inlined functions alone.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace fastssl {
namespace {

constexpr int64_t kStripe = 16;              // slices of a task
constexpr int64_t kFew = 32, kFlush = 128;  // rows whose rotations are in the cache; of a fp32 sum
constexpr int64_t kDirect = 2, kStep = 5;   // knots 1, 2 by themselves; an anchor has 2 on each side
constexpr int64_t kTerms = 2 * kStep;       // sums of an anchor
constexpr float kMagic = 12582912.0f;       // 1.5 * 2^23: adding it rounds to an integer
constexpr int64_t kBlock = 1 << 18;         // projections at a time: 1 MiB, for the second cache


template <int L>
struct Vector {
  typedef float F __attribute__((vector_size(4 * L)));
  typedef int32_t I __attribute__((vector_size(4 * L)));
  FASTSSL_INLINE static inline F load(const float* x) {
    F v;
    std::memcpy(&v, x, sizeof(v));
    return v;
  }
  FASTSSL_INLINE static inline void store(float* x, F v) { std::memcpy(x, &v, sizeof(v)); }
};

// How an angle h p is brought to [-pi/2, pi/2]: n pi / h is taken from p in three parts, of which the
// first two are exact products for n below 2^12.
struct Angle {
  float h, per_pi, part[3];

  explicit Angle(double spacing)
      : h(static_cast<float>(spacing)), per_pi(static_cast<float>(spacing / std::numbers::pi)) {
    double rest = std::numbers::pi / spacing;
    for (float& some : part) {
      some = &some == &part[2] ? static_cast<float>(rest)
                               : bit_cast<float>(bit_cast<uint32_t>(float(rest)) & 0xfffff000u);
      rest -= some;
    }
  }
};

// Of x in [-pi/2, pi/2], interpolated at Chebyshev nodes: absolute errors of 1.5e-7.
template <class F>
FASTSSL_INLINE inline void sine_cosine(F x, F* s, F* c) {
  const F y = x * x;
  F p = y * 2.6051077384181553e-06f - 0.0001980901724891737f;
  p = p * y + 0.008333049714565277f;
  p = p * y - 0.16666658222675323f;
  *s = x + x * (y * p);
  F q = y * -2.6050656742881984e-07f + 2.4760109226917848e-05f;
  q = q * y - 0.0013888360699638724f;
  q = q * y + 0.04166663438081741f;
  q = q * y - 0.5f;
  *c = q * y + 1.0f;
}

template <class F>
FASTSSL_INLINE inline void rotate(F* c, F* s, F by_c, F by_s) {
  const F next = *c * by_c - *s * by_s;
  *s = *s * by_c + *c * by_s;
  *c = next;
}

template <int L>
struct Rotations {
  using V = Vector<L>;
  typename V::F c1, s1, c2, s2, c5, s5;

  FASTSSL_INLINE inline Rotations(const float* projections, const Angle& angle) {
    using I = typename V::I;
    const auto p = V::load(projections);
    const auto shifted = p * angle.per_pi + kMagic;
    const auto n = shifted - kMagic;
    auto x = (((p - n * angle.part[0]) - n * angle.part[1]) - n * angle.part[2]) * angle.h;
    const float most = std::numbers::pi_v<float> / 2;  // where p is too large to have an angle
    x = x > most ? x * 0 + most : x;
    x = x < -most ? x * 0 - most : x;
    sine_cosine(x, &s1, &c1);
    const I sign = (I)shifted << 31;  // of (-1)^n
    s1 = (typename V::F)((I)s1 ^ sign);
    c1 = (typename V::F)((I)c1 ^ sign);
    c2 = c1, s2 = s1;
    rotate(&c2, &s2, c1, s1);
    c5 = c2, s5 = s2;
    rotate(&c5, &s5, c2, s2);
    rotate(&c5, &s5, c1, s1);
  }
};

// The sums of up to kFew rows x L slices are added to sums[term * kStripe]: of c1, s1, c2, s2, then for
// each anchor b of cb, sb, cb c1, cb c2, cb s1, cb s2, sb c1, sb c2, sb s1, sb s2.
template <int L>
FASTSSL_INLINE inline void add_few(const float* p, int64_t ld, int64_t rows, const Angle& angle,
                           int64_t anchors, float* sums) {
  using V = Vector<L>;
  using F = typename V::F;
  float kept[kFew * 8 * L];
  const auto put = [&](int64_t term, F value) FASTSSL_INLINE {
    V::store(sums + term * kStripe, V::load(sums + term * kStripe) + value);
  };
  {
    F c1{}, s1{}, c2{}, s2{};
    for (int64_t i = 0; i < rows; ++i) {
      const Rotations<L> r(p + i * ld, angle);
      c1 += r.c1, s1 += r.s1, c2 += r.c2, s2 += r.s2;
      const F all[8] = {r.c1, r.s1, r.c2, r.s2, r.c5, r.s5, r.c5, r.s5};
      for (int v = 0; v < 8; ++v) V::store(kept + (i * 8 + v) * L, all[v]);
    }
    put(0, c1), put(1, s1), put(2, c2), put(3, s2);
  }
  for (int64_t a = 0; a < anchors; ++a) {
    F c{}, s{}, cc1{}, cc2{}, cs1{}, cs2{}, sc1{}, sc2{}, ss1{}, ss2{};
    for (int64_t i = 0; i < rows; ++i) {
      float* row = kept + i * 8 * L;
      const F c1 = V::load(row), s1 = V::load(row + L), c2 = V::load(row + 2 * L),
              s2 = V::load(row + 3 * L);
      F cb = V::load(row + 6 * L), sb = V::load(row + 7 * L);
      c += cb, s += sb;
      cc1 += cb * c1, cc2 += cb * c2, cs1 += cb * s1, cs2 += cb * s2;
      sc1 += sb * c1, sc2 += sb * c2, ss1 += sb * s1, ss2 += sb * s2;
      rotate(&cb, &sb, V::load(row + 4 * L), V::load(row + 5 * L));
      V::store(row + 6 * L, cb), V::store(row + 7 * L, sb);
    }
    const F all[kTerms] = {c, s, cc1, cc2, cs1, cs2, sc1, sc2, ss1, ss2};
    for (int64_t t = 0; t < kTerms; ++t) put(2 * kDirect + a * kTerms + t, all[t]);
  }
}

// dp takes the place of p, for rows x L slices. `table` has for each term of add_few what that term,
// of this row alone, is multiplied by.
template <int L>
FASTSSL_INLINE inline void turn_rows(float* p, int64_t ld, int64_t rows, const Angle& angle,
                             int64_t anchors, const float* table) {
  using V = Vector<L>;
  using F = typename V::F;
  const auto of = [=](int64_t term) FASTSSL_INLINE { return V::load(table + term * kStripe); };
  for (int64_t i = 0; i < rows; ++i) {
    const Rotations<L> r(p + i * ld, angle);
    F dp = of(0) * r.c1 + of(1) * r.s1;
    dp += of(2) * r.c2 + of(3) * r.s2;
    F cb = r.c5, sb = r.s5;
    for (int64_t a = 0; a < anchors; ++a) {
      const int64_t t = 2 * kDirect + a * kTerms;
      const F by_c = of(t) + of(t + 2) * r.c1 + of(t + 3) * r.c2 + of(t + 4) * r.s1 +
                     of(t + 5) * r.s2;
      const F by_s = of(t + 1) + of(t + 6) * r.c1 + of(t + 7) * r.c2 + of(t + 8) * r.s1 +
                     of(t + 9) * r.s2;
      dp += cb * by_c + sb * by_s;
      rotate(&cb, &sb, r.c5, r.s5);
    }
    V::store(p + i * ld, dp);
  }
}

// A whole strip by the widest vectors that the machine has.
#define STRIPS(SUFFIX, TARGET, L)                                                                 \
  TARGET void add_few_##SUFFIX(const float* p, int64_t ld, int64_t rows, const Angle& angle,      \
                               int64_t anchors, float* sums) {                                    \
    for (int64_t c = 0; c < kStripe; c += L)                                                      \
      add_few<L>(p + c, ld, rows, angle, anchors, sums + c);                                      \
  }                                                                                               \
  TARGET void turn_rows_##SUFFIX(float* p, int64_t ld, int64_t rows, const Angle& angle,          \
                                 int64_t anchors, const float* table) {                           \
    for (int64_t c = 0; c < kStripe; c += L)                                                      \
      turn_rows<L>(p + c, ld, rows, angle, anchors, table + c);                                   \
  }
STRIPS(plain, , 4)
#if FASTSSL_X86
STRIPS(avx2, __attribute__((target("avx2,fma"))), 8)
STRIPS(avx512, FASTSSL_AVX512, 16)
#endif
#undef STRIPS

decltype(&add_few_plain) best_add_few() {
#if FASTSSL_X86
  if (cpu().avx512) return add_few_avx512;
  if (cpu().avx2) return add_few_avx2;
#endif
  return add_few_plain;
}
decltype(&turn_rows_plain) best_turn_rows() {
#if FASTSSL_X86
  if (cpu().avx512) return turn_rows_avx512;
  if (cpu().avx2) return turn_rows_avx2;
#endif
  return turn_rows_plain;
}

// The terms whose sum or difference is cos(k x), and sin(k x): first + sign * second.
struct Knot {
  int64_t cosine[2], sine[2];
  int sign;  // 1 where knot k lies above its anchor; 0 where there is but one term

  explicit Knot(int64_t k) {
    if (k <= kDirect) {
      cosine[0] = cosine[1] = 2 * k - 2, sine[0] = sine[1] = 2 * k - 1, sign = 0;
      return;
    }
    const int64_t b = (k + kDirect) / kStep, j = k - b * kStep, side = std::abs(j) - 1;
    const int64_t t = 2 * kDirect + (b - 1) * kTerms;
    sign = j > 0 ? 1 : j < 0 ? -1 : 0;
    cosine[0] = j ? t + 2 + side : t, cosine[1] = j ? t + 8 + side : t;
    sine[0] = j ? t + 6 + side : t + 1, sine[1] = j ? t + 4 + side : t + 1;
  }
};

// z (G, N, D) and directions (D, S), in blocks of rows.
struct Slices {
  Tensor z, directions;
  ScalarType dtype;
  int64_t G, N, D, S, knots, ld, rows;
  Angle angle;
  std::vector<float> features, projections;

  Slices(const Tensor& given, const Tensor& directions, double spacing, int64_t knots)
      : z(given.is_contiguous() ? given : torch::stable::contiguous(given)),
        directions(directions.is_contiguous() ? directions
                                              : torch::stable::contiguous(directions)),
        dtype(z.scalar_type()), G(z.size(0)), N(z.size(1)), D(z.size(2)), S(directions.size(1)),
        // Rows of a power of two of bytes would all lie in a few places of the cache.
        knots(knots), ld(round_up(S, kStripe) + kStripe),
        rows(std::clamp<int64_t>(kBlock / ld, 64, 4096)), angle(spacing) {
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                        dtype == ScalarType::Half,
                    "sigreg: z must be float32, bfloat16 or float16");
    STD_TORCH_CHECK(directions.scalar_type() == ScalarType::Float && directions.size(0) == D &&
                        knots >= 1 && D >= 1 && S >= 1 && spacing > 0,
                    "sigreg: directions must be float32 with ", D, " rows");
    rows = std::min(rows, std::max<int64_t>(G * N, 1));
    features.resize(dtype == ScalarType::Float ? 0 : rows * D);
    projections.resize(rows * ld);
  }
  int64_t anchors() const { return knots > kDirect ? (knots + kDirect) / kStep : 0; }
  int64_t terms() const { return 2 * kDirect + anchors() * kTerms; }
  int64_t strips() const { return (S + kStripe - 1) / kStripe; }
  const float* a() const { return static_cast<const float*>(directions.const_data_ptr()); }

  // The rows (of all groups one under the other) as (G N, D).
  static Tensor flat(const Tensor& t, void* data) {
    const int64_t size[2] = {t.size(0) * t.size(1), t.size(2)}, stride[2] = {t.size(2), 1};
    return torch::stable::from_blob(data, {size, 2}, {stride, 2},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                    t.scalar_type());
  }
  // f(first row, rows) with their projections made.
  template <class F>
  void each_block(const F& f) {
    const Tensor all = flat(z, const_cast<void*>(z.const_data_ptr()));
    for (int64_t begin = 0; begin < G * N; begin += rows) {
      const int64_t n = std::min(rows, G * N - begin);
      const float* x = static_cast<const float*>(z.const_data_ptr()) + begin * D;
      if (dtype != ScalarType::Float) {
        load_float_rows(all, begin, n, features.data(), D);
        x = features.data();
      }
      float_product(false, false, n, S, D, x, D, a(), S, 0.f, projections.data(), ld);
      f(begin, n);
    }
  }
  // f(group, first row of the block, rows) over the groups that a block has rows of.
  template <class F>
  void each_group(int64_t begin, int64_t n, const F& f) const {
    for (int64_t i = 0; i < n;) {
      const int64_t g = (begin + i) / N, some = std::min(n - i, (g + 1) * N - begin - i);
      f(g, i, some);
      i += some;
    }
  }
};

Tensor sigreg_fwd(Tensor z, Tensor directions, double spacing, int64_t knots,
                  std::optional<Tensor> left_out) {
  Slices p(z, directions, spacing, knots);
  Tensor out = torch::stable::new_empty(z, {p.G, 2, knots, p.S}, ScalarType::Float);
  float* sums = static_cast<float*>(out.mutable_data_ptr());
  if (!p.N) std::fill_n(sums, out.numel(), 0.f);
  const int64_t terms = p.terms();
  STD_TORCH_CHECK(!left_out || (left_out->numel() == p.G && left_out->is_contiguous() &&
                                left_out->scalar_type() == ScalarType::Long),
                  "sigreg_fwd: left_out must be int64 with ", p.G, " elements");
  const int64_t* zeros =
      left_out ? static_cast<const int64_t*>(left_out->const_data_ptr()) : nullptr;
  // Of the group whose rows are under way: groups come one after the other.
  std::vector<double> totals(p.strips() * terms * kStripe, 0.0);
  const auto add_few = best_add_few();
  const auto finish = [&](int64_t g, int64_t strip, double* total) {
    const int64_t width = std::min(kStripe, p.S - strip * kStripe);
    for (int64_t k = 1; k <= knots; ++k) {
      const Knot at(k);
      const double phi = std::exp(-0.5 * (k * spacing) * (k * spacing));
      // Rows of zeros have added 1 each.
      const double expected = p.N * phi + (zeros ? zeros[g] * (1.0 - phi) : 0.0);
      float* cosine = sums + ((g * 2 * knots) + k - 1) * p.S + strip * kStripe;
      float* sine = cosine + knots * p.S;
      for (int64_t c = 0; c < width; ++c) {
        const auto of = [&](int64_t term) { return total[term * kStripe + c]; };
        cosine[c] = static_cast<float>(of(at.cosine[0]) - at.sign * of(at.cosine[1]) - expected);
        sine[c] = static_cast<float>(of(at.sine[0]) + at.sign * of(at.sine[1]));
      }
    }
    std::fill_n(total, terms * kStripe, 0.0);
  };
  p.each_block([&](int64_t begin, int64_t n) {
    parallel_tasks(p.strips(), [&](int64_t strip) {
      double* total = &totals[strip * terms * kStripe];
      std::vector<float> some(terms * kStripe);
      p.each_group(begin, n, [&](int64_t g, int64_t first, int64_t count) {
        for (int64_t i = first; i < first + count; i += kFlush) {
          std::fill(some.begin(), some.end(), 0.f);
          const int64_t end = std::min(first + count, i + kFlush);
          for (int64_t j = i; j < end; j += kFew)
            add_few(&p.projections[j * p.ld + strip * kStripe], p.ld, std::min(kFew, end - j),
                    p.angle, p.anchors(), some.data());
          for (int64_t t = 0; t < terms * kStripe; ++t) total[t] += some[t];
        }
        if (begin + first + count == (g + 1) * p.N) finish(g, strip, total);
      });
    });
  });
  return out;
}

Tensor sigreg_bwd(Tensor z, Tensor directions, Tensor series, double spacing) {
  const int64_t knots = series.size(2);
  Slices p(z, directions, spacing, knots);
  if (!series.is_contiguous()) series = torch::stable::contiguous(series);
  STD_TORCH_CHECK(series.scalar_type() == ScalarType::Float &&
                      series.numel() == p.G * 2 * knots * p.S,
                  "sigreg_bwd: series must be float32 of shape (G, 2, knots, S)");
  const float* given = static_cast<const float*>(series.const_data_ptr());
  Tensor dz = torch::stable::new_empty(p.z, {p.G, p.N, p.D});
  const Tensor all = Slices::flat(dz, dz.mutable_data_ptr());
  const int64_t terms = p.terms();
  const auto turn_rows = best_turn_rows();
  std::vector<float> rounded(p.dtype == ScalarType::Float ? 0 : p.rows * p.D);
  p.each_block([&](int64_t begin, int64_t n) {
    parallel_tasks(p.strips(), [&](int64_t strip) {
      std::vector<float> table(terms * kStripe);
      const int64_t width = std::min(kStripe, p.S - strip * kStripe);
      p.each_group(begin, n, [&](int64_t g, int64_t first, int64_t count) {
        std::fill(table.begin(), table.end(), 0.f);
        for (int64_t k = 1; k <= knots; ++k) {
          const Knot at(k);
          const float* a = given + (g * 2 * knots + k - 1) * p.S + strip * kStripe;
          const float* b = a + knots * p.S;
          const float sign = static_cast<float>(at.sign);
          for (int64_t c = 0; c < width; ++c) {
            table[at.cosine[0] * kStripe + c] += a[c];
            table[at.cosine[1] * kStripe + c] -= sign * a[c];
            table[at.sine[0] * kStripe + c] += b[c];
            table[at.sine[1] * kStripe + c] += sign * b[c];
          }
        }
        turn_rows(&p.projections[first * p.ld + strip * kStripe], p.ld, count, p.angle, p.anchors(),
                  table.data());
      });
    });
    const bool direct = p.dtype == ScalarType::Float;
    float* out = direct ? static_cast<float*>(dz.mutable_data_ptr()) + begin * p.D : rounded.data();
    float_product(false, true, n, p.D, p.S, p.projections.data(), p.ld, p.a(), p.S, 0.f, out, p.D);
    for (int64_t i = 0; !direct && i < n; ++i) store_row(all, begin + i, out + i * p.D);
  });
  return dz;
}

// ---------------------------------------------------------------------------------- directions

struct Counter {
  uint32_t block, low, high, key[2];
};

// Four rows of normal numbers of kStripe slices from `slice` on, by Philox4x32-10 and Box-Muller.
FASTSSL_CLONES void fill_normal(uint32_t slice, const Counter& counter, float* out) {
  uint32_t word[4][kStripe];
  for (uint32_t c = 0; c < kStripe; ++c) {
    uint32_t w0 = slice + c, w1 = counter.block, w2 = counter.low, w3 = counter.high;
    philox(w0, w1, w2, w3, counter.key[0], counter.key[1]);
    word[0][c] = w0, word[1][c] = w1, word[2][c] = w2, word[3][c] = w3;
  }
  for (int pair = 0; pair < 2; ++pair)
    for (int64_t c = 0; c < kStripe; ++c) {
      const auto uniform = [&](int i) FASTSSL_INLINE {  // in (0, 1), exact
        return (static_cast<float>(static_cast<int32_t>(word[2 * pair + i][c] >> 9)) + 0.5f) *
               0x1p-23f;
      };
      // log u = exponent log 2 + log(1 + f), f in [sqrt(1/2) - 1, sqrt(2) - 1).
      const uint32_t bits = bit_cast<uint32_t>(uniform(0)) - 0x3f3504f3u;
      const float exponent = static_cast<float>(static_cast<int32_t>(bits) >> 23);
      const float f = bit_cast<float>((bits & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
      float q = 0.08533313125371933f;
      for (float a : {-0.14269258081912994f, 0.14977401494979858f, -0.1657799333333969f,
                      0.19955933094024658f, -0.250013530254364f, 0.33334192633628845f,
                      -0.4999999701976776f, 1.0f})
        q = q * f + a;
      const float radius = std::sqrt(-2.0f * (exponent * kLn2 + f * q));
      const float turn = 2.0f * uniform(1), half = turn + kMagic, n = half - kMagic;
      float s, co;
      sine_cosine((turn - n) * std::numbers::pi_v<float>, &s, &co);
      const float signed_radius = bit_cast<float>(bit_cast<uint32_t>(radius) ^
                                                  bit_cast<uint32_t>(half) << 31);
      out[2 * pair * kStripe + c] = signed_radius * co;
      out[(2 * pair + 1) * kStripe + c] = signed_radius * s;
    }
}

FASTSSL_CLONES void unit_columns(float* x, int64_t rows) {
  float squares[kStripe] = {};
  for (int64_t d = 0; d < rows; ++d)
    for (int64_t c = 0; c < kStripe; ++c) squares[c] += x[d * kStripe + c] * x[d * kStripe + c];
  for (int64_t c = 0; c < kStripe; ++c) squares[c] = 1.0f / std::sqrt(squares[c]);
  for (int64_t d = 0; d < rows; ++d)
    for (int64_t c = 0; c < kStripe; ++c) x[d * kStripe + c] *= squares[c];
}

Tensor sigreg_directions(Tensor step, int64_t seed, int64_t S, int64_t D) {
  constexpr uint32_t kSlices = 4;  // in random.py
  const uint64_t at = static_cast<uint64_t>(*static_cast<const int64_t*>(step.const_data_ptr()));
  Tensor out = torch::stable::new_empty(step, {D, S}, ScalarType::Float);
  float* data = static_cast<float*>(out.mutable_data_ptr());
  parallel_tasks((S + kStripe - 1) / kStripe, [&](int64_t strip) {
    std::vector<float> x((D + 3) / 4 * 4 * kStripe);
    for (int64_t d = 0; d < D; d += 4)
      fill_normal(static_cast<uint32_t>(strip * kStripe),
                  {uint32_t(d / 4), uint32_t(at), (uint32_t(at >> 32) & 0xffffffu) | kSlices << 24,
                   {uint32_t(seed), uint32_t(uint64_t(seed) >> 32)}},
                  &x[d * kStripe]);
    unit_columns(x.data(), D);
    const int64_t width = std::min(kStripe, S - strip * kStripe);
    for (int64_t d = 0; d < D; ++d)
      std::copy_n(&x[d * kStripe], width, data + d * S + strip * kStripe);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("sigreg_directions", TORCH_BOX(&sigreg_directions));
  m.impl("sigreg_fwd", TORCH_BOX(&sigreg_fwd));
  m.impl("sigreg_bwd", TORCH_BOX(&sigreg_bwd));
}

}  // namespace fastssl
