// The 8-bit dynamic code and the arithmetic of optimizer steps, for host and device.
//
// The code nearest a magnitude x in [0, 1] takes one look into a table, by the sign-free upper half of
// x's bits: no two codes' midpoints share one, so an entry has the code below and the lower half from
// which on it is the next. Midpoints are those of fp32; between two codes the even place is taken.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTSSL_HD __host__ __device__ __forceinline__
#else
#define FASTSSL_HD inline __attribute__((always_inline))
#endif

namespace fastssl {

enum Rule {
  kAdam, kAdamW, kSGD, kNesterov, kLion, kRMSprop, kAdagrad, kLARS, kLAMB, kAdEMAMix
};

// A row of `hyper`. Complements are 1 - beta. Loops take the inverses of the corrections.
struct Hyper {
  float lr, momentum, complement1, complement2, complement3, eps, decay, correction1, correction2,
      extra, scale, adapt, most;
};
constexpr int64_t kHyper = sizeof(Hyper) / sizeof(float);

// The entries are for upper halves from that of 2^-23, below all midpoints, to that of 1.
constexpr uint32_t kFirstHalf = 0x3400, kLastHalf = 0x3f80, kHalves = kLastHalf - kFirstHalf + 1;
constexpr int kSplit = 17;  // an entry: the place of the code, and 17 bits of the lower half

// Which entry the bits of a magnitude look up; NaN that of 0.
FASTSSL_HD int32_t entry_of(int32_t bits) {
  const int32_t first = kFirstHalf, last = kLastHalf, half = bits >> 16;
  const int32_t at = half < last ? half : last;
  return (at > first && bits <= 0x7f800000 ? at : first) - first;
}
// The place of the nearest code, counted from that of 0.
FASTSSL_HD int32_t nearest_code(int32_t bits, int32_t entry) {
  return (entry >> kSplit) + ((bits & 0xffff) >= (entry & ((1 << kSplit) - 1)) ? 1 : 0);
}

// Taken before anything else: g in the units of the loss, with p's decay where that is a part of it.
template <Rule kRule>
FASTSSL_HD float whole_gradient(float p, float g, const Hyper& h) {
  const bool apart =
      kRule == kAdamW || kRule == kLion || kRule == kLAMB || kRule == kAdEMAMix;
  return apart ? g * h.scale : g * h.scale + h.decay * p;
}

// What lr times is taken from p; m and v are the state before and after. Of LAMB before, of LARS with
// the trust ratio, which g has by then.
template <Rule kRule>
FASTSSL_HD float direction(float p, float g, const Hyper& h, float& m, float& v) {
  if (kRule == kAdam || kRule == kAdamW || kRule == kLAMB) {
    m += h.complement1 * (g - m);
    v += h.complement2 * (g * g - v);
    const float u = m * h.correction1 / (sqrtf(v * h.correction2) + h.eps);
    return kRule == kLAMB ? u + h.decay * p : u;
  }
  if (kRule == kLion) {
    const float u = m + h.complement1 * (g - m);
    m += h.complement2 * (g - m);
    return u > 0.0f ? 1.0f : u < 0.0f ? -1.0f : u;
  }
  if (kRule == kRMSprop) {
    v += h.complement2 * (g * g - v);
    return m = h.momentum * m + g / (sqrtf(v) + h.eps);
  }
  if (kRule == kAdagrad) {
    v = v + g * g;
    return g / (sqrtf(v) + h.eps);
  }
  if (kRule == kLARS) return m = h.momentum * m + g;
  m = h.momentum * m + h.complement1 * g;
  return kRule == kNesterov ? g + h.momentum * m : m;
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

// p after a step of AdEMAMix, which has two momenta.
FASTSSL_HD float stepped_ademamix(float p, float g, const Hyper& h, float& fast, float& slow,
                                  float& v) {
  g = whole_gradient<kAdEMAMix>(p, g, h);
  fast += h.complement1 * (g - fast);
  slow += h.complement3 * (g - slow);
  v += h.complement2 * (g * g - v);
  const float mixed = fast * h.correction1 + h.extra * slow;
  return p - h.lr * (mixed / (sqrtf(v * h.correction2) + h.eps) + h.decay * p);
}

// Its square's sum is that of the trust ratio's denominator.
template <Rule kRule>
FASTSSL_HD float trusted(float p, float g, const Hyper& h, float m, float v) {
  g = whole_gradient<kRule>(p, g, h);
  return kRule == kLAMB ? direction<kLAMB>(p, g, h, m, v) : g;
}

}  // namespace fastssl
