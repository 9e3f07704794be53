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
  // A place is linear in the magnitude within a decade: slope and offset of each, lifted by so much
  // that truncation gives the nearest place or the next, counted from place 1. Magnitudes that share
  // an exponent see one decade end at most: by the exponent's low 5 bits, where; the last 3 bits of
  // that are the decade's number.
  alignas(64) float slope[16] = {}, offset[16] = {}, end[32];

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
      const double first = cells - 1.0 - !kSigned;  // the decade's first place, from place 1
      slope[i] = static_cast<float>(cells / 0.9 / powers[i]);
      offset[i] = static_cast<float>(first - cells * 0.1 / 0.9 + (i < 6 ? 0.01 : 0.3));
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
      const float least = std::ldexp(1.f, e - 31);
      int i = 0;
      const auto end_of = [&](int d) {  // before the middle between its last code and the next
        return d == 6 ? 2.f : powers[d] * (1.f + 0.5f / static_cast<float>(1 << (d + !kSigned)));
      };
      while (end_of(i) <= least) ++i;
      end[e] = bit_cast<float>((bit_cast<uint32_t>(end_of(i)) & ~7u) | i);
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

FASTSSL_VBMI FASTSSL_INLINE inline __m512i packed(const __m512i* x) {
  return _mm512_packus_epi16(_mm512_packus_epi32(x[0], x[1]), _mm512_packus_epi32(x[2], x[3]));
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

// Of values whose products with `inverse` are at most 1 but for rounding; the place of NaN is that of 0.
template <bool kSigned>
FASTSSL_VBMI void encode_vbmi(const float* x, int64_t n, float inverse, uint8_t* codes) {
  const Book<kSigned>& b = book<kSigned>();
  const __m512 slope = _mm512_load_ps(b.slope), offset = _mm512_load_ps(b.offset);
  const __m512 end0 = _mm512_load_ps(b.end), end1 = _mm512_load_ps(b.end + 16);
  const __m512 least = _mm512_set1_ps(1.2e-7f), scale = _mm512_set1_ps(inverse);
  const __m512i unit = _mm512_set1_epi32(1), seven = _mm512_set1_epi32(7);
  const __m512i zero_place = _mm512_set1_epi32(127);
  for (int64_t i = 0; i < n; i += 64) {
    __m512i place[4], bits[4], above[4];
    __mmask16 negative[4];
    for (int r = 0; r < 4; ++r) {
      const __m512 whole = _mm512_mul_ps(_mm512_loadu_ps(x + i + 16 * r), scale);
      if (kSigned) negative[r] = _mm512_movepi32_mask(_mm512_castps_si512(whole));
      // max takes its second operand where the first is NaN; below `least` all is 0.
      const __m512 t = _mm512_max_ps(_mm512_abs_ps(whole), least);
      bits[r] = _mm512_castps_si512(t);
      const __m512i exponent = _mm512_srli_epi32(bits[r], 23);
      const __m512 end = _mm512_permutex2var_ps(end0, exponent, end1);
      __m512i decade = _mm512_and_si512(_mm512_castps_si512(end), seven);
      decade = _mm512_mask_add_epi32(decade, _mm512_cmp_ps_mask(t, end, _CMP_GE_OQ), decade, unit);
      place[r] = _mm512_cvttps_epi32(_mm512_fmadd_ps(t, _mm512_permutexvar_ps(decade, slope),
                                                     _mm512_permutexvar_ps(decade, offset)));
    }
    look_up<!kSigned>(b.above, packed(place), above);
    for (int r = 0; r < 4; ++r) {
      const __mmask16 next = _mm512_cmpge_epi32_mask(bits[r], above[r]);
      place[r] = _mm512_mask_add_epi32(place[r], next, place[r], unit);
      if (kSigned)  // -1, which there is none of, is packed as 0, and so becomes the least
        place[r] = _mm512_mask_sub_epi32(_mm512_add_epi32(place[r], zero_place), negative[r],
                                         zero_place, place[r]);
    }
    _mm512_storeu_si512(codes + i, transposed(packed(place)));
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
