// The arithmetic of a view's pixels, one at a time and without branches: loops over it vectorise.
#pragma once

#include "common.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace fastssl {

// Columns of `params` and the stream of random numbers, as in ops/augment.py and random.py.
enum Column {
  kX0, kY0, kX1, kY1, kAngle, kTurns, kFlip, kBrightness, kFirst = 11, kGray = 15, kSigma,
  kSolarize, kNoise, kParams = 20
};
constexpr uint32_t kAugment = 0;

// The filter of a resize at distance t >= 0 in its own units: a triangle, or Keys' cubic.
inline double filter(double t, bool bicubic, double a) {
  if (!bicubic) return std::max(0.0, 1.0 - t);
  if (t < 1.0) return ((a + 2.0) * t - (a + 3.0)) * t * t + 1.0;
  return t < 2.0 ? a * (((t - 5.0) * t + 8.0) * t - 4.0) : 0.0;
}

// Clamped to [0, 1] by the bits: compilers do not make a minimum of a comparison that a NaN may meet.
FASTSSL_INLINE inline float clip(float x) {
  const int32_t bits = std::max(bit_cast<int32_t>(x), 0);
  return bit_cast<float>(std::min(bits, bit_cast<int32_t>(1.f)));
}
FASTSSL_INLINE inline float unit(float x) { return clip(x) + 0.f * x; }  // NaN stays NaN

FASTSSL_INLINE inline float luminance(float r, float g, float b) {
  return 0.2989f * r + 0.587f * g + 0.114f * b;
}

// Value and chroma are kept. With the hue h in sixths of a turn, each channel is value - chroma w,
// w in [0, 1] a trapezoid of h. `shift` is in [1, 7), so that one comparison brings h into [0, 6).
FASTSSL_INLINE inline void turn_hue(float* red, float* green, float* blue, float shift) {
  const float r = *red, g = *green, b = *blue;
  float high = r > g ? r : g, low = r > g ? g : r;
  high = high > b ? high : b, low = low > b ? b : low;
  const float chroma = high - low;
  const float over = high == r ? g - b : high == g ? b - r : r - g;
  const float base = high == r ? shift : high == g ? 2.f + shift : 4.f + shift;
  float h = base + over / (chroma == 0.f ? 1.f : chroma);
  h = h >= 6.f ? h - 6.f : h;
  const float value = high + 0.f * (r + g + b);  // the comparisons may have lost a NaN
  *red = unit(value - chroma * clip(2.f - std::abs(h - 3.f)));
  *green = unit(value - chroma * clip(std::abs(h - 2.f) - 1.f));
  *blue = unit(value - chroma * clip(std::abs(h - 4.f) - 1.f));
}

// Box and Muller: x, y = deviation sqrt(-2 log u) (cos, sin)(2 pi v) of the uniforms u, v that are
// (word + 1/2) 2^-32, to 3e-7 deviations.
FASTSSL_INLINE inline void normal_pair(uint32_t u_word, uint32_t v_word, float deviation, float* x,
                                       float* y) {
  // log u = exponent log 2 + log(1 + f), f in [sqrt(1/2) - 1, sqrt(2) - 1).
  const float u = (static_cast<float>(u_word) + 0.5f) * 0x1p-32f;
  const uint32_t bits = bit_cast<uint32_t>(u) - 0x3f3504f3u;
  const float exponent = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  const float mantissa = bit_cast<float>((bits & 0x7fffffu) + 0x3f3504f3u);
  const float to_one = (static_cast<float>(~u_word) + 0.5f) * 0x1p-32f;  // exact where u has rounded
  const float f = exponent == 0.f ? -to_one : mantissa - 1.f;
  float q = 0.08533313125371933f * f - 0.14269258081912994f;
  q = q * f + 0.14977401494979858f;
  q = q * f - 0.1657799333333969f;
  q = q * f + 0.19955933094024658f;
  q = q * f - 0.250013530254364f;
  q = q * f + 0.33334192633628845f;
  q = q * f - 0.4999999701976776f;
  q = q * f + 1.f;
  const float length = deviation * std::sqrt(-2.f * (exponent * kLn2 + f * q));
  // 2 v = n + r, n whole and r in [-1/2, 1/2]: (-1)^n times the cosine and sine of pi r.
  const float r = (static_cast<float>(static_cast<int32_t>(v_word << 1)) + 1.f) * 0x1p-32f;
  const uint32_t sign = (v_word + 0x40000000u) & 0x80000000u;
  const float t = r * std::numbers::pi_v<float>, tt = t * t;
  float s = 2.6051077384181553e-06f * tt - 0.0001980901724891737f;
  s = s * tt + 0.008333049714565277f;
  s = s * tt - 0.16666658222675323f;
  float c = -2.6050656742881984e-07f * tt + 2.4760109226917848e-05f;
  c = c * tt - 0.0013888360699638724f;
  c = c * tt + 0.04166663438081741f;
  c = c * tt - 0.5f;
  const float along = bit_cast<float>(bit_cast<uint32_t>(length) ^ sign);
  *x = along * (c * tt + 1.f);
  *y = along * (t + t * (s * tt));
}

}  // namespace fastssl
