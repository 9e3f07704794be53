// Moving averages of many tensors in one call: a = a + w (v - a), in fp32, rounded once.
//
// The elements of all pairs form one line that is cut into equal shares, one for each thread: many
// small tensors are as one large one, two values read and one written for each element. For w of
// 1/2 and more it is a = v - (1 - w) (v - a), which gives v exactly for w = 1; equal a and v stay
// as they are. No result depends on the number of threads.
#include "common.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

namespace fastssl {
namespace {

constexpr int64_t kShare = 1 << 15;  // elements that are worth a thread

// a = base + by (v - a), where base is a or v.
template <bool kFromValue, class A, class V>
FASTSSL_INLINE inline void mix_one(A* a, const V* v, float by) {
  const float old = load(*a), value = load(*v);
  store((kFromValue ? value : old) + by * (value - old), a);
}
template <class A, class V>
FASTSSL_INLINE inline void mix(void* averages, const void* values, int64_t at, int64_t n, float w) {
  A* a = static_cast<A*>(averages) + at;
  const V* v = static_cast<const V*>(values) + at;
  if (w < 0.5f) {
    for (int64_t i = 0; i < n; ++i) mix_one<false>(a + i, v + i, w);
  } else {
    for (int64_t i = 0; i < n; ++i) mix_one<true>(a + i, v + i, w - 1.0f);
  }
}

// A pair of unlike strides, dimension by dimension.
struct Shape {
  const int64_t *size, *a_stride, *v_stride;
  int64_t dims;
};
template <class A, class V>
void mix_strided(void* averages, const void* values, const Shape& s, int64_t d, float w) {
  if (d == s.dims) return mix<A, V>(averages, values, 0, 1, w);
  for (int64_t i = 0; i < s.size[d]; ++i)
    mix_strided<A, V>(static_cast<A*>(averages) + i * s.a_stride[d],
                      static_cast<const V*>(values) + i * s.v_stride[d], s, d + 1, w);
}

struct Loops {
  void (*flat)(void*, const void*, int64_t, int64_t, float);
  void (*strided)(void*, const void*, const Shape&, int64_t, float);
};
#define PAIR(NAME, A, V)                                                                          \
  FASTSSL_CLONES void NAME(void* a, const void* v, int64_t at, int64_t n, float w) {              \
    mix<A, V>(a, v, at, n, w);                                                                    \
  }                                                                                               \
  constexpr Loops NAME##_loops = {NAME, mix_strided<A, V>};
PAIR(fp32_fp32, float, float)
PAIR(fp32_bf16, float, Bf16)
PAIR(fp32_fp16, float, Fp16)
PAIR(bf16_fp32, Bf16, float)
PAIR(bf16_bf16, Bf16, Bf16)
PAIR(bf16_fp16, Bf16, Fp16)
PAIR(fp16_fp32, Fp16, float)
PAIR(fp16_bf16, Fp16, Bf16)
PAIR(fp16_fp16, Fp16, Fp16)
#undef PAIR
constexpr const Loops* kLoops[3][3] = {
    {&fp32_fp32_loops, &fp32_bf16_loops, &fp32_fp16_loops},
    {&bf16_fp32_loops, &bf16_bf16_loops, &bf16_fp16_loops},
    {&fp16_fp32_loops, &fp16_bf16_loops, &fp16_fp16_loops},
};
int place(ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  "ema_: averages and values must be float32, bfloat16 or float16");
  return dtype == ScalarType::Float ? 0 : dtype == ScalarType::BFloat16 ? 1 : 2;
}

// Whether both fill their stretch of memory, of n > 0 elements, in one order.
bool alike(const Shape& s, int64_t n) {
  for (int64_t d = 0; d < s.dims; ++d)
    if (s.size[d] > 1 && s.a_stride[d] != s.v_stride[d]) return false;
  // Of a dense tensor some dimension's stride is the product of the sizes of those within it.
  for (int64_t within = 1; within < n;) {
    int64_t d = s.dims - 1;
    while (d >= 0 && (s.size[d] == 1 || s.a_stride[d] != within)) --d;
    if (d < 0) return false;
    within *= s.size[d];
  }
  return true;
}

struct Pair {
  void* a;
  const void* v;
  int64_t first;  // of its elements, on the line
  const Loops* loops;
};

}  // namespace

void ema(std::vector<Tensor> averages, std::vector<Tensor> values, Tensor weight) {
  STD_TORCH_CHECK(averages.size() == values.size(), "ema_: ", averages.size(), " averages for ",
                  values.size(), " values");
  const bool wide = weight.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(weight.numel() == 1 && (wide || weight.scalar_type() == ScalarType::Float),
                  "ema_: weight must be one float32 or float64 number");
  const void* of_weight = weight.const_data_ptr();
  const float w = wide ? static_cast<float>(*static_cast<const double*>(of_weight))
                       : *static_cast<const float*>(of_weight);
  std::vector<Pair> line;
  line.reserve(averages.size());
  int64_t total = 0;
  for (size_t t = 0; t < averages.size(); ++t) {
    const Tensor &a = averages[t], &v = values[t];
    const auto size = a.sizes(), other = v.sizes();
    STD_TORCH_CHECK(std::equal(size.begin(), size.end(), other.begin(), other.end()),
                    "ema_: average ", t, " and its value must have one shape");
    int64_t n = 1;
    for (const int64_t s : size) n *= s;
    if (n == 0) continue;
    const Loops* loops = kLoops[place(a.scalar_type())][place(v.scalar_type())];
    const Shape shape = {size.data(), a.strides().data(), v.strides().data(),
                         static_cast<int64_t>(size.size())};
    if (alike(shape, n)) {
      line.push_back({a.mutable_data_ptr(), v.const_data_ptr(), total, loops});
      total += n;
    } else {
      loops->strided(a.mutable_data_ptr(), v.const_data_ptr(), shape, 0, w);
    }
  }
  torch::stable::parallel_for(0, total, kShare, [&](int64_t begin, int64_t end) {
    auto pair = std::upper_bound(line.begin(), line.end(), begin,
                                 [](int64_t at, const Pair& p) { return at < p.first; }) - 1;
    for (int64_t at = begin; at < end; ++pair) {
      const int64_t past = pair + 1 == line.end() ? end : std::min(end, (pair + 1)->first);
      pair->loops->flat(pair->a, pair->v, at - pair->first, past - at, w);
      at = past;
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) { m.impl("ema_", TORCH_BOX(&ema)); }

}  // namespace fastssl
