// The 8-bit dynamic code on CPUs: tables, and loops that decode and encode a block.
//
// Portable loops look codes and midpoints up by gathers, 16 loads of one word each. With AVX-512 VBMI
// tables of 256 bytes lie in four registers and are looked up 64 places at a time, so floats are
// looked up in four planes of bytes and put together by shuffles: an eighth of the time.
#pragma once

#include "blockwise_math.h"
#include "common.h"

#include <algorithm>
#include <vector>
#if FASTSSL_X86
#include <immintrin.h>
#endif

namespace fastssl {

constexpr int64_t kMost = 4096;  // of a block

// 256 words of 4 bytes, as four tables of one byte each.
struct Planes {
  alignas(64) uint8_t bytes[4][256];

  void set(int at, uint32_t word) {
    for (int i = 0; i < 4; ++i) bytes[i][at] = static_cast<uint8_t>(word >> 8 * i);
  }
};

// The codes, ascending, and what finds the nearest. The construction is that of
// fastssl/ops/blockwise.py, which checks it against the published one.
template <bool kSigned>
struct Book {
  float code[256];
  int32_t entries[kHalves];  // of nearest_code
  Planes codes, above;  // above[j]: the least bits whose nearest place is j + 1 or more
  // A place, counted from that of 0, is linear in the magnitude within a decade, so also in the 7 bits
  // of a bf16's mantissa: slope and base in 256ths by the exponent's low 5 bits, from 32 on below the
  // power of ten that some exponents meet (`end`, a bf16's bits), before that above. Taken 0.3 lower
  // a place is never too high, and too low by one only where no midpoint has the same bf16.
  alignas(64) uint16_t end[32], slope[64], base[64];

  Book() {
    std::vector<float> values = {0.f, 1.f};
    const float powers[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.f};
    for (int i = 0; i < 7; ++i) {
      const int cells = 1 << (i + !kSigned);
      const float low = 0.1f, step = static_cast<float>((1.0 - low) / cells);
      const auto edge = [&](int k) {
        return static_cast<float>(k < (cells + 1) / 2 ? double(low) + double(step) * k
                                                      : 1.0 - double(step) * (cells - k));
      };
      for (int k = 0; k < cells; ++k) {
        const float center = static_cast<float>((double(edge(k)) + edge(k + 1)) / 2);
        values.push_back(powers[i] * center);
        if (kSigned) values.push_back(-values.back());
      }
    }
    std::sort(values.begin(), values.end());
    std::copy(values.begin(), values.end(), code);
    const int zero = kSigned ? 127 : 0;
    for (int j = 0; j < 256; ++j) {
      codes.set(j, bit_cast<uint32_t>(code[j]));
      above.set(j, 0x7fffffffu);
    }
    int place = 0;
    for (uint32_t half = kFirstHalf; half <= kLastHalf; ++half) {
      const int below = zero + place;
      const uint32_t middle =
          below < 255 ? bit_cast<uint32_t>((code[below] + code[below + 1]) * 0.5f) : 0;
      const bool crossed = middle >> 16 == half;
      const int32_t from = crossed ? int32_t(middle & 0xffffu) + (below % 2 == 0) : 1 << 16;
      entries[half - kFirstHalf] = place << kSplit | from;
      if (crossed) above.set(place, (half << 16) + from);
      place += crossed;
    }
    for (int e = 0; e < 32; ++e) {  // exponents 2^-31 to 1, in the order of their low 5 bits
      const double least = std::ldexp(1.0, e - 31);
      int decade = 0;
      while (decade < 6 && powers[decade] <= least) ++decade;
      end[e] = static_cast<uint16_t>((bit_cast<uint32_t>(powers[decade]) + 0xffffu) >> 16);
      for (const bool above_end : {false, true}) {
        const int i = std::min(6, decade + above_end), cells = 1 << (i + !kSigned);
        const double cell = 0.9 * powers[i] / cells, first = 1 + cells - (1 << !kSigned);
        slope[32 * !above_end + e] = static_cast<uint16_t>(std::lround(256 * least / cell));
        base[32 * !above_end + e] = static_cast<uint16_t>(
            std::lround(256 * (first - 0.3 + (least - 0.1 * powers[i]) / cell)));
      }
    }
  }
};
template <bool kSigned>
const Book<kSigned>& book() {
  static const Book<kSigned> only;
  return only;
}

// ------------------------------------------------------------------------------------ AVX-512 VBMI

#if FASTSSL_X86
#define FASTSSL_VBMI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")))

// To and from the order in which packing four vectors of words leaves 64 bytes.
FASTSSL_VBMI FASTSSL_INLINE inline __m512i transposed(__m512i x) {
  const __m512i order =
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, x);
}

// words[at] for 64 places in packed order; `kAll`: they may exceed 127.
template <bool kAll>
FASTSSL_VBMI FASTSSL_INLINE inline void look_up(const Planes& words, __m512i at, __m512i* out) {
  __m512i plane[4];
  const __mmask64 upper = _mm512_movepi8_mask(at);
  for (int i = 0; i < 4; ++i) {
    const uint8_t* t = words.bytes[i];
    plane[i] = _mm512_permutex2var_epi8(_mm512_load_si512(t), at, _mm512_load_si512(t + 64));
    if (kAll)
      plane[i] = _mm512_mask_blend_epi8(
          upper, plane[i],
          _mm512_permutex2var_epi8(_mm512_load_si512(t + 128), at, _mm512_load_si512(t + 192)));
  }
  const __m512i low01 = _mm512_unpacklo_epi8(plane[0], plane[1]);
  const __m512i high01 = _mm512_unpackhi_epi8(plane[0], plane[1]);
  const __m512i low23 = _mm512_unpacklo_epi8(plane[2], plane[3]);
  const __m512i high23 = _mm512_unpackhi_epi8(plane[2], plane[3]);
  out[0] = _mm512_unpacklo_epi16(low01, low23), out[1] = _mm512_unpackhi_epi16(low01, low23);
  out[2] = _mm512_unpacklo_epi16(high01, high23), out[3] = _mm512_unpackhi_epi16(high01, high23);
}

template <bool kSigned>
FASTSSL_VBMI void decode_vbmi(const uint8_t* codes, int64_t n, float absmax, float* out) {
  const Planes& words = book<kSigned>().codes;
  const __m512 scale = _mm512_set1_ps(absmax);
  for (int64_t i = 0; i < n; i += 64) {
    __m512i value[4];
    look_up<true>(words, transposed(_mm512_loadu_si512(codes + i)), value);
    for (int r = 0; r < 4; ++r)
      _mm512_storeu_ps(out + i + 16 * r, _mm512_mul_ps(_mm512_castsi512_ps(value[r]), scale));
  }
}

// Bytes of two vectors of 32 words: the upper ones, as they lie or as `look_up` wants them; and words
// of two vectors of 16: the upper ones.
struct Orders {
  alignas(64) uint8_t upper[64], packed[64];
  alignas(64) uint16_t words[32];

  Orders() {
    for (int i = 0; i < 64; ++i) {
      upper[i] = static_cast<uint8_t>(2 * i + 1);
      packed[i] = static_cast<uint8_t>(2 * (i % 4 + i / 16 * 4 + i / 4 % 4 * 16) + 1);
    }
    for (int i = 0; i < 32; ++i) words[i] = static_cast<uint16_t>(2 * i + 1);
  }
};

// Of values whose products with `inverse` are at most 1 but for rounding; the place of NaN is that of 0.
template <bool kSigned>
FASTSSL_VBMI void encode_vbmi(const float* x, int64_t n, float inverse, uint8_t* codes) {
  static const Orders orders;
  const Book<kSigned>& b = book<kSigned>();
  const __m512i end = _mm512_load_si512(b.end);
  const __m512i slope0 = _mm512_load_si512(b.slope), slope1 = _mm512_load_si512(b.slope + 32);
  const __m512i base0 = _mm512_load_si512(b.base), base1 = _mm512_load_si512(b.base + 32);
  const __m512i words = _mm512_load_si512(orders.words), upper = _mm512_load_si512(orders.upper);
  const __m512i order = _mm512_load_si512(orders.packed);
  const __m512 least = _mm512_set1_ps(1.2e-7f), scale = _mm512_set1_ps(inverse);
  const __m512i half = _mm512_set1_epi16(32), unit = _mm512_set1_epi8(1);
  const __m512i zero_place = _mm512_set1_epi8(127);
  for (int64_t i = 0; i < n; i += 64) {
    __m512i bits[4], fixed[2], above[4];
    uint64_t negative = 0, next = 0;
    for (int r = 0; r < 4; ++r) {
      const __m512 whole = _mm512_mul_ps(_mm512_loadu_ps(x + i + 16 * r), scale);
      if (kSigned) negative |= uint64_t(_mm512_movepi32_mask(_mm512_castps_si512(whole))) << 16 * r;
      // The larger magnitude, and what is not NaN; below `least` all is 0.
      bits[r] = _mm512_castps_si512(_mm512_range_ps(whole, least, 0b1011));
    }
    for (int r = 0; r < 2; ++r) {
      const __m512i t = _mm512_permutex2var_epi16(bits[2 * r], words, bits[2 * r + 1]);
      __m512i exponent = _mm512_srli_epi16(t, 7);
      const __mmask32 beyond = _mm512_cmpge_epi16_mask(t, _mm512_permutexvar_epi16(exponent, end));
      exponent = _mm512_mask_sub_epi16(exponent, beyond, exponent, half);
      fixed[r] = _mm512_add_epi16(
          _mm512_permutex2var_epi16(base0, exponent, base1),
          _mm512_mulhi_epu16(_mm512_slli_epi16(t, 9),
                             _mm512_permutex2var_epi16(slope0, exponent, slope1)));
    }
    look_up<!kSigned>(b.above, _mm512_permutex2var_epi8(fixed[0], order, fixed[1]), above);
    for (int r = 0; r < 4; ++r)
      next |= uint64_t(_mm512_cmpge_epi32_mask(bits[r], above[r])) << 16 * r;
    __m512i place = _mm512_permutex2var_epi8(fixed[0], upper, fixed[1]);
    place = _mm512_mask_add_epi8(place, next, place, unit);
    if (kSigned)  // there is no -1: what would have its place gets the least
      place = _mm512_mask_subs_epu8(_mm512_add_epi8(place, zero_place), negative, zero_place, place);
    _mm512_storeu_si512(codes + i, place);
  }
}
#endif

// --------------------------------------------------------------------------------- portable loops

// Places are widened first: compilers gather by 32-bit places alone.
FASTSSL_CLONES inline void decode_any(const uint8_t* codes, int64_t n, const float* code,
                                      float absmax, float* __restrict out) {
  int32_t place[kMost];
  for (int64_t i = 0; i < n; ++i) place[i] = codes[i];
  for (int64_t i = 0; i < n; ++i) out[i] = code[place[i]] * absmax;
}
template <bool kSigned>
FASTSSL_HD void encode_any(const float* x, int64_t n, float lift, float inverse,
                           const int32_t* entries, uint8_t* __restrict codes) {
  int32_t bits[kMost], entry[kMost], found[kMost];
  for (int64_t i = 0; i < n; ++i) {
    bits[i] = bit_cast<int32_t>(x[i] * lift * inverse);
    entry[i] = entry_of(bits[i] & 0x7fffffff);
  }
  for (int64_t i = 0; i < n; ++i) entry[i] = entries[entry[i]];
  for (int64_t i = 0; i < n; ++i) {
    const int32_t j = nearest_code(bits[i] & 0x7fffffff, entry[i]);
    const int32_t at_most = j < 127 ? j : 127;  // there is no -1
    found[i] = !kSigned ? j : bits[i] < 0 ? 127 - at_most : 127 + j;
  }
  for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(found[i]);
}
FASTSSL_CLONES inline void encode_signed(const float* x, int64_t n, float lift, float inverse,
                                         const int32_t* entries, uint8_t* codes) {
  encode_any<true>(x, n, lift, inverse, entries, codes);
}
FASTSSL_CLONES inline void encode_unsigned(const float* x, int64_t n, float lift, float inverse,
                                           const int32_t* entries, uint8_t* codes) {
  encode_any<false>(x, n, lift, inverse, entries, codes);
}

// ------------------------------------------------------------------------------------- of a block

template <bool kSigned>
void decode(const uint8_t* codes, int64_t n, float absmax, float* out) {
  int64_t done = 0;
#if FASTSSL_X86
  if (cpu().avx512_vbmi) decode_vbmi<kSigned>(codes, done = n / 64 * 64, absmax, out);
#endif
  if (done < n) decode_any(codes + done, n - done, book<kSigned>().code, absmax, out + done);
}

template <bool kSigned>
void encode(const float* x, int64_t n, float absmax, uint8_t* codes) {
  const float lift = absmax < 0x1p-64f ? 0x1p64f : 1.0f;  // so that the inverse is finite
  const float inverse = absmax == 0.0f ? 0.0f : 1.0f / (absmax * lift);
  int64_t done = 0;
#if FASTSSL_X86
  if (cpu().avx512_vbmi && lift == 1.0f)
    encode_vbmi<kSigned>(x, done = n / 64 * 64, inverse, codes);
#endif
  if (done == n) return;
  (kSigned ? encode_signed : encode_unsigned)(x + done, n - done, lift, inverse,
                                              book<kSigned>().entries, codes + done);
}

}  // namespace fastssl
