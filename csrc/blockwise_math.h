// The 8-bit dynamic code and the arithmetic of optimizer steps, for host and device.
//
// Magnitudes x in [0, 1] lie in seven decades; decade d begins at 10^(d-7) and has 2^d cells (signed)
// or 2^(d+1) (unsigned), each with its code in the middle. A code is found without a search: the
// decade by six comparisons, the nearest edge between two codes by one product, and which side of it
// by comparing with their fp32 midpoint, which alone decides, so rounding before it does not matter.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTSSL_HD __host__ __device__ __forceinline__
#else
#define FASTSSL_HD inline __attribute__((always_inline))
#endif

namespace fastssl {

enum Rule { kAdam, kAdamW, kSGD, kNesterov, kLion, kRMSprop, kAdagrad, kLARS, kLAMB };

// A row of `hyper`.
struct Hyper {
  float lr, beta1, beta2, eps, decay, correction1, correction2, extra, scale, adapt, most;
};
constexpr int64_t kHyper = sizeof(Hyper) / sizeof(float);

// The place j, counted from 0, of the code below the edge that is nearest x >= 0; NaN gives some j.
template <bool kSigned>
FASTSSL_HD int32_t code_below(float x) {
  float power = 1e6f;
  int32_t cells = kSigned ? 1 : 2;
  power = x >= 1e-6f ? 1e5f : power, cells = x >= 1e-6f ? cells + cells : cells;
  power = x >= 1e-5f ? 1e4f : power, cells = x >= 1e-5f ? cells + cells : cells;
  power = x >= 1e-4f ? 1e3f : power, cells = x >= 1e-4f ? cells + cells : cells;
  power = x >= 1e-3f ? 1e2f : power, cells = x >= 1e-3f ? cells + cells : cells;
  power = x >= 1e-2f ? 1e1f : power, cells = x >= 1e-2f ? cells + cells : cells;
  power = x >= 1e-1f ? 1.0f : power, cells = x >= 1e-1f ? cells + cells : cells;
  const float place = (x * power * (1.0f / 0.9f) - 1.0f / 9.0f) * static_cast<float>(cells);
  const float in_reach = place < 254.0f ? place : 254.0f;  // also of NaN
  const int32_t edge = static_cast<int32_t>((in_reach > 0.0f ? in_reach : 0.0f) + 0.5f);
  const int32_t below = cells + edge - (kSigned ? 1 : 2), last = kSigned ? 127 : 254;
  return below < last ? below : last;
}

// The place of the code nearest x >= 0, given code_below and the fp32 midpoint between that one and
// the next: between two codes the even place in the whole table, where the signed one has 127 places
// below 0. NaN gives 0.
template <bool kSigned>
FASTSSL_HD int32_t nearest_code(float x, int32_t below, float edge) {
  const int32_t tie_up = (below & 1) ^ (kSigned ? 1 : 0);
  const int32_t up = (x > edge ? 1 : 0) + (x == edge ? tie_up : 0);
  return x == x ? below + up : 0;
}

// Taken before anything else: g in the units of the loss, with p's decay where that is a part of it.
template <Rule kRule>
FASTSSL_HD float whole_gradient(float p, float g, const Hyper& h) {
  const bool apart = kRule == kAdamW || kRule == kLion || kRule == kLAMB;
  return apart ? g * h.scale : g * h.scale + h.decay * p;
}

// What lr times is taken from p; m and v are the state before and after. Of LAMB before, of LARS with
// the trust ratio, which g has by then.
template <Rule kRule>
FASTSSL_HD float direction(float p, float g, const Hyper& h, float& m, float& v) {
  if (kRule == kAdam || kRule == kAdamW || kRule == kLAMB) {
    m = h.beta1 * m + (1.0f - h.beta1) * g;
    v = h.beta2 * v + (1.0f - h.beta2) * (g * g);
    const float u = m / h.correction1 / (sqrtf(v / h.correction2) + h.eps);
    return kRule == kLAMB ? u + h.decay * p : u;
  }
  if (kRule == kLion) {
    const float u = h.beta1 * m + (1.0f - h.beta1) * g;
    m = h.beta2 * m + (1.0f - h.beta2) * g;
    return u > 0.0f ? 1.0f : u < 0.0f ? -1.0f : u;
  }
  if (kRule == kRMSprop) {
    v = h.beta2 * v + (1.0f - h.beta2) * (g * g);
    return m = h.beta1 * m + g / (sqrtf(v) + h.eps);
  }
  if (kRule == kAdagrad) {
    v = v + g * g;
    return g / (sqrtf(v) + h.eps);
  }
  if (kRule == kLARS) return m = h.beta1 * m + g;
  m = h.beta1 * m + (1.0f - h.extra) * g;
  return kRule == kNesterov ? g + h.beta1 * m : m;
}

// p after a step of which the trust ratio is known; 1 but for LARS and LAMB.
template <Rule kRule>
FASTSSL_HD float stepped(float p, float g, const Hyper& h, float trust, float& m, float& v) {
  g = whole_gradient<kRule>(p, g, h);
  if (kRule == kAdamW || kRule == kLion) p -= h.lr * h.decay * p;
  if (kRule == kLARS) g *= trust;
  const float u = direction<kRule>(p, g, h, m, v);
  return p - h.lr * (kRule == kLAMB ? trust * u : u);
}

// Its square's sum is that of the trust ratio's denominator.
template <Rule kRule>
FASTSSL_HD float trusted(float p, float g, const Hyper& h, float m, float v) {
  g = whole_gradient<kRule>(p, g, h);
  return kRule == kLAMB ? direction<kLAMB>(p, g, h, m, v) : g;
}

}  // namespace fastssl
