// Shared by the CPU kernels: instruction-set dispatch, a vectorisable exp, bf16 and fp16 conversion.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

// Plain loops marked FASTSSL_CLONES are compiled once per instruction set; the dynamic linker picks
// the widest one that the machine runs. Only GCC and Clang on x86-64 Linux can do that.
#if defined(__x86_64__) && defined(__GNUC__)
#define FASTSSL_X86 1
#else
#define FASTSSL_X86 0
#endif
#if FASTSSL_X86 && defined(__GLIBC__) && \
    (defined(__clang__) ? __clang_major__ >= 18 : __GNUC__ >= 12)
#define FASTSSL_CLONES \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FASTSSL_CLONES
#endif
#define FASTSSL_INLINE __attribute__((always_inline))

namespace fastssl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float kNegInf = -std::numeric_limits<float>::infinity();
constexpr float kFloor = std::numeric_limits<float>::lowest();  // the maximum of nothing
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// What the running machine offers, probed once; see cpu_features() in module.cpp for the bits.
struct Cpu {
  bool avx2, avx512, avx512_bf16, amx_bf16, amd, mkl_bf16, avx512_vbmi;
};
const Cpu& cpu();

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// e^t 2^shift for results below 2^128, relative error 2e-7 near t = 0; 0 below 2^-126; NaN stays NaN.
// The shift goes into the exponent, so it costs no accuracy. No branches: loops over it vectorise.
// The polynomial interpolates 2^f at Chebyshev nodes of [-1/2, 1/2].
inline float exp_poly(float t, int shift = 0) {
  // 1.5 * 2^23: the low mantissa bits of the sum hold round(t log2 e) + shift + the exponent's bias.
  const float magic = 12582912.0f + static_cast<float>(shift + 127);
  const float shifted = t * kLog2e + magic;
  const float f = t * kLog2e - (shifted - magic);
  float p = 0.00015461444854736328f;
  p = p * f + 0.0013400427997112274f;
  p = p * f + 0.009618056938052177f;
  p = p * f + 0.05550327152013779f;
  p = p * f + 0.24022650718688965f;
  p = p * f + 0.6931471824645996f;
  p = p * f + 1.0f;
  const float power = bit_cast<float>(bit_cast<uint32_t>(shifted) << 23);
  return t < static_cast<float>(-126 - shift) * kLn2 ? 0.0f : p * power;
}

inline uint32_t bf16_bits(float x) {  // round to nearest even; NaN stays NaN
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return x != x ? 0x7fc0u : rounded;
}

inline float bf16_float(uint16_t b) { return bit_cast<float>(static_cast<uint32_t>(b) << 16); }

inline float half_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  // Exponents are rebased by a product with 2^112, which also normalises the subnormals.
  const float scaled = bit_cast<float>(magnitude << 13) * bit_cast<float>(0x77800000u);
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u | (magnitude << 13) : 0u;
  return bit_cast<float>(sign | (special ? special : bit_cast<uint32_t>(scaled)));
}

inline uint16_t half_bits(float x) {  // round to nearest even, overflow to infinity
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return sign | 0x7e00u;
  if (a >= 0x477ff000u) return sign | 0x7c00u;
  if (a < 0x38800000u) {  // subnormal result: adding 0.5 rounds at 2^-24
    const float shifted = bit_cast<float>(a) + 0.5f;
    return sign | static_cast<uint16_t>(bit_cast<uint32_t>(shifted) - 0x3f000000u);
  }
  return sign | static_cast<uint16_t>((a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13);
}

// Elements of 16 bits by their type, for loops that are templates of it.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};
FASTSSL_INLINE inline float load(float x) { return x; }
FASTSSL_INLINE inline float load(Bf16 x) { return bf16_float(x.bits); }
FASTSSL_INLINE inline float load(Fp16 x) { return half_float(x.bits); }
FASTSSL_INLINE inline void store(float x, float* to) { *to = x; }
FASTSSL_INLINE inline void store(float x, Bf16* to) { to->bits = uint16_t(bf16_bits(x)); }
FASTSSL_INLINE inline void store(float x, Fp16* to) { to->bits = half_bits(x); }

// Ten rounds of Philox4x32 in place. Paper: Salmon et al., SC 2011.
FASTSSL_INLINE inline void philox(uint32_t& w0, uint32_t& w1, uint32_t& w2, uint32_t& w3,
                                  uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(w0) * 0xD2511F53u, p1 = uint64_t(w2) * 0xCD9E8D57u;
    w0 = uint32_t(p1 >> 32) ^ w1 ^ k0, w1 = uint32_t(p1);
    w2 = uint32_t(p0 >> 32) ^ w3 ^ k1, w3 = uint32_t(p0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
}

// Rows [row0, row0 + rows) of a (., D) tensor with unit column stride, as fp32.
inline void load_float_rows(const Tensor& t, int64_t row0, int64_t rows, float* out, int64_t ld) {
  const int64_t D = t.size(1), stride = t.stride(0);
  if (t.scalar_type() == ScalarType::Float) {
    const float* src = static_cast<const float*>(t.const_data_ptr()) + row0 * stride;
    for (int64_t i = 0; i < rows; ++i) std::memcpy(out + i * ld, src + i * stride, D * 4);
    return;
  }
  const uint16_t* src = static_cast<const uint16_t*>(t.const_data_ptr()) + row0 * stride;
  const bool half = t.scalar_type() == ScalarType::Half;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < D; ++d) {
      const uint16_t v = src[i * stride + d];
      out[i * ld + d] = half ? half_float(v) : bf16_float(v);
    }
}

// One fp32 row into row `i` of a contiguous (., D) tensor, rounded once to its dtype.
inline void store_row(const Tensor& t, int64_t i, const float* row) {
  const int64_t D = t.size(1);
  if (t.scalar_type() == ScalarType::Float) {
    float* out = static_cast<float*>(t.mutable_data_ptr()) + i * D;
    if (out != row) std::memcpy(out, row, D * 4);
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(t.mutable_data_ptr()) + i * D;
  const bool half = t.scalar_type() == ScalarType::Half;
  for (int64_t d = 0; d < D; ++d)
    out[d] = half ? half_bits(row[d]) : static_cast<uint16_t>(bf16_bits(row[d]));
}

// f(task) for every task, on torch's threads. Tasks, not threads, own partial results, so sums do
// not depend on which thread ran what.
template <class F>
void parallel_tasks(int64_t tasks, const F& f) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) f(task);
  });
}

}  // namespace fastssl
