// Random parameters of views: row (v, b) of the result is a function of (seed, epoch, index_b, v),
// spec_v and the image's size; see fastssl/ops/view_parameters.py for the columns and the formulas.
//
// A sample takes ten blocks of Philox4x32-10, and of the ten tries for a crop those up to the first
// that fits. Scalar float64 throughout, rounded to fp32 once, and no bit depends on the batch.
// Philox: SC 2011.
#include "augment_math.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastssl {
namespace {

// As in ops/view_parameters.py.
enum Spec { CROP, AREA, RATIO = 3, PAD = 5, SHIFT, ROTATION, TURNS_P, FLIP_P, JITTER_P, FACTORS,
            GRAY_P = 19, BLUR_P, BLUR, SOLARIZE_P = 23, THRESHOLD, NOISE_STD, SPEC };
enum Number { U_CROP, U_POSITION = 20, U_ANGLE = 22, U_FLIP, U_JITTER, U_ORDER = 29, U_GRAY, U_BLUR,
              U_SOLARIZE = 33, U_TURNS, U_SHIFT = 36, NUMBERS = 38 };
constexpr int kTries = 10, kBlocks = (NUMBERS + 3) / 4;

// Numbers in (0, 1) of one sample and view.
void uniforms(uint64_t seed, uint32_t epoch, uint64_t index, uint32_t view, double* u) {
  for (uint32_t block = 0; block < kBlocks; ++block) {
    uint32_t w0 = uint32_t(index), w1 = epoch, w2 = view << 24 | block;
    uint32_t w3 = kAugment << 24 | uint32_t(index >> 32);
    philox(w0, w1, w2, w3, uint32_t(seed), uint32_t(seed >> 32));
    for (uint32_t word : {w0, w1, w2, w3}) *u++ = (word + 0.5) / 4294967296.0;
  }
}

double between(const double* range, double u) { return range[0] + (range[1] - range[0]) * u; }

// x0, y0, x1, y1 in pixels of an image of H x W.
void draw_box(const double* s, const double* u, double H, double W, double* box) {
  double x0 = 0, y0 = 0, w = W, h = H;
  if (s[CROP] != 0) {
    const bool whole = s[PAD] == 0;
    const double high = H * (1 + 2 * s[PAD]), wide = W * (1 + 2 * s[PAD]);
    const double log_ratio[2] = {std::log(s[RATIO]), std::log(s[RATIO + 1])};
    const auto pixels = [&](double x) { return whole ? std::nearbyint(x) : x; };
    bool fits = false;
    for (int t = 0; t < kTries && !fits; ++t) {
      const double area = between(s + AREA, u[U_CROP + 2 * t]) * (wide * high);
      const double ratio = std::exp(between(log_ratio, u[U_CROP + 2 * t + 1]));
      w = pixels(std::sqrt(area * ratio)), h = pixels(std::sqrt(area / ratio));
      fits = 0 < w && w <= wide && 0 < h && h <= high;
    }
    if (!fits) {  // the largest of an allowed ratio
      const double ratio = wide / high, least = whole ? 1 : 0;
      w = std::max(least, pixels(ratio > s[RATIO + 1] ? high * s[RATIO + 1] : wide));
      h = std::max(least, pixels(ratio < s[RATIO] ? wide / s[RATIO] : high));
    }
    const auto corner = [&](double free, double u) {
      if (!fits) return whole ? std::floor(free / 2) : free / 2;
      return whole ? std::floor(u * (free + 1)) : u * free;
    };
    x0 = corner(wide - w, u[U_POSITION]) - s[PAD] * W;
    y0 = corner(high - h, u[U_POSITION + 1]) - s[PAD] * H;
  }
  x0 = x0 + s[SHIFT] * (2 * u[U_SHIFT] - 1) * w;
  y0 = y0 + s[SHIFT] * (2 * u[U_SHIFT + 1] - 1) * h;
  box[0] = x0, box[1] = y0, box[2] = x0 + w, box[3] = y0 + h;
}

// The number-th of the 24 orders of four things, as itertools.permutations counts them.
void permutation(int number, int* order) {
  int left[4] = {0, 1, 2, 3};
  for (int i = 0, ways = 6; i < 4; ++i) {
    int* taken = left + number / ways;
    order[i] = *taken;
    std::copy(taken + 1, left + 4, taken);
    number %= ways, ways /= std::max(1, 3 - i);
  }
}

void draw_row(const double* s, const double* u, double H, double W, float* out) {
  double p[kParams] = {};
  draw_box(s, u, H, W, p + kX0);
  p[kAngle] = s[ROTATION] * (2 * u[U_ANGLE] - 1);
  if (u[U_TURNS] < s[TURNS_P]) p[kTurns] = std::floor(4 * u[U_TURNS + 1]);
  p[kFlip] = u[U_FLIP] < s[FLIP_P];
  int order[4];
  permutation(static_cast<int>(24 * u[U_ORDER]), order);
  for (int i = 0; i < 4; ++i) {
    p[kBrightness + i] = between(s + FACTORS + 2 * i, u[U_JITTER + 1 + i]);
    const double neutral = order[i] == 3 ? 0 : 1, *range = s + FACTORS + 2 * order[i];
    const bool used = range[0] != neutral || range[1] != neutral;
    p[kFirst + i] = used && u[U_JITTER] < s[JITTER_P] ? order[i] : -1;
  }
  p[kGray] = u[U_GRAY] < s[GRAY_P];
  if (u[U_BLUR] < s[BLUR_P]) p[kSigma] = between(s + BLUR, u[U_BLUR + 1]);
  constexpr double kNever = std::numeric_limits<double>::infinity();
  p[kSolarize] = u[U_SOLARIZE] < s[SOLARIZE_P] ? s[THRESHOLD] : kNever;
  p[kNoise] = s[NOISE_STD];
  for (int i = 0; i < kParams; ++i) out[i] = static_cast<float>(p[i]);
}

// index (B,) int64; sizes (B, 2) int64; spec (V, SPEC) float64; all contiguous.
Tensor view_parameters(Tensor index, Tensor sizes, Tensor spec, int64_t seed, int64_t epoch) {
  const int64_t B = index.size(0), V = spec.size(0);
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long && index.is_contiguous() &&
                      sizes.scalar_type() == ScalarType::Long && sizes.is_contiguous() &&
                      sizes.numel() == 2 * B && spec.scalar_type() == ScalarType::Double &&
                      spec.is_contiguous() && spec.size(1) == SPEC,
                  "view_parameters: index (B,) and sizes (B, 2) must be contiguous int64, spec (V, ",
                  int64_t(SPEC), ") float64.");
  Tensor out = torch::stable::new_empty(index, {V, B, kParams}, ScalarType::Float);
  float* data = static_cast<float*>(out.mutable_data_ptr());
  const int64_t* number = static_cast<const int64_t*>(index.const_data_ptr());
  const int64_t* size = static_cast<const int64_t*>(sizes.const_data_ptr());
  const double* specs = static_cast<const double*>(spec.const_data_ptr());
  torch::stable::parallel_for(0, V * B, 64, [&](int64_t begin, int64_t end) {
    double u[4 * kBlocks];
    for (int64_t row = begin; row < end; ++row) {
      const int64_t v = row / B, b = row % B;
      uniforms(seed, epoch, number[b], v, u);
      draw_row(specs + v * SPEC, u, size[2 * b], size[2 * b + 1], data + row * kParams);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("view_parameters", TORCH_BOX(&view_parameters));
}

}  // namespace fastssl
