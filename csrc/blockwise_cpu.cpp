// Optimizer steps over many tensors with states of 8 bits in blocks, or of fp32, in one call.
//
// A task owns some blocks of one tensor; a block stays in the first cache while its parameters,
// gradients and codes are read once, stepped and written once. LARS and LAMB take a pass before, that
// writes nothing, for the norms of tensors: partial sums of tasks in fp64, added in fixed order.
// No result depends on the number of threads.
// Papers: 8-bit optimizers arXiv:2110.02861; LARS arXiv:1708.03888; LAMB arXiv:1904.00962; AdEMAMix
// arXiv:2409.03137.
#include "blockwise_codec.h"
#include "common.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <tuple>

namespace fastssl {
namespace {

constexpr int64_t kElements = 1 << 14;  // of a task, at least one block
constexpr int64_t kAhead = 512;  // elements between what is stepped and what is asked for

// ---------------------------------------------------------------------------- loops over a block

FASTSSL_CLONES void load_bf16(const uint16_t* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = bf16_float(x[i]);
}
FASTSSL_CLONES void load_fp16(const uint16_t* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = half_float(x[i]);
}
FASTSSL_CLONES void store_bf16(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<uint16_t>(bf16_bits(x[i]));
}
FASTSSL_CLONES void store_fp16(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = half_bits(x[i]);
}
FASTSSL_CLONES void square(int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] *= x[i];
}
FASTSSL_CLONES void square_root(int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = std::sqrt(x[i]);
}
// As integers, which compilers vectorise; NaN is the largest.
inline int32_t magnitude(float x) { return bit_cast<int32_t>(x) & 0x7fffffff; }
FASTSSL_CLONES float absolute_maximum(const float* x, int64_t n) {
  int32_t top = 0;
  for (int64_t i = 0; i < n; ++i) top = std::max(top, magnitude(x[i]));
  return bit_cast<float>(top);
}
Hyper with_inverses(Hyper h) {
  h.correction1 = 1.0f / h.correction1, h.correction2 = 1.0f / h.correction2;
  return h;
}

inline bool is_finite(float x) { return (bit_cast<uint32_t>(x) & 0x7f800000u) != 0x7f800000u; }

// Every rule as two loops over a block: the step, which leaves the largest |m| and |v| in `most`, and
// sums of squares of p and of what LARS and LAMB compare it with. Elements whose gradient is not
// finite stay as they are if `finite_only`.
#define RULE(NAME, kRule)                                                                         \
  FASTSSL_CLONES void step_##NAME(int64_t n, const float* __restrict g, const Hyper& given,       \
                                  float trust, bool finite_only, float* __restrict p,             \
                                  float* __restrict m, float* __restrict v, float* most) {        \
    const Hyper h = with_inverses(given);                                                         \
    int32_t most_m = 0, most_v = 0;                                                               \
    for (int64_t i = 0; i < n; ++i) {                                                             \
      float next_m = m[i], next_v = v[i];                                                         \
      const float next = stepped<kRule>(p[i], g[i], h, trust, next_m, next_v);                    \
      const bool keep = finite_only && !is_finite(g[i]);                                          \
      p[i] = keep ? p[i] : next, m[i] = keep ? m[i] : next_m, v[i] = keep ? v[i] : next_v;        \
      most_m = std::max(most_m, magnitude(m[i])), most_v = std::max(most_v, magnitude(v[i]));     \
    }                                                                                             \
    most[0] = bit_cast<float>(most_m), most[1] = bit_cast<float>(most_v);                         \
  }                                                                                               \
  FASTSSL_CLONES void norm_##NAME(int64_t n, const float* g, const Hyper& given, bool finite_only,\
                                  const float* p, const float* m, const float* v, double* sums) { \
    const Hyper h = with_inverses(given);                                                         \
    float p_sum[16] = {}, d_sum[16] = {}, d[kMost];                                               \
    for (int64_t i = 0; i < n; ++i) {                                                             \
      const float each = trusted<kRule>(p[i], g[i], h, m[i], v[i]);                               \
      d[i] = finite_only && !is_finite(g[i]) ? 0.f : each;                                        \
    }                                                                                             \
    const int64_t whole = n / 16 * 16;                                                            \
    for (int64_t i = 0; i < whole; i += 16)                                                       \
      for (int64_t c = 0; c < 16; ++c)                                                            \
        p_sum[c] += p[i + c] * p[i + c], d_sum[c] += d[i + c] * d[i + c];                         \
    for (int64_t i = whole; i < n; ++i) p_sum[0] += p[i] * p[i], d_sum[0] += d[i] * d[i];         \
    for (int64_t c = 0; c < 16; ++c) sums[0] += p_sum[c], sums[1] += d_sum[c];                    \
  }
RULE(adam, kAdam)
RULE(adamw, kAdamW)
RULE(sgd, kSGD)
RULE(nesterov, kNesterov)
RULE(lion, kLion)
RULE(rmsprop, kRMSprop)
RULE(adagrad, kAdagrad)
RULE(lars, kLARS)
RULE(lamb, kLAMB)
#undef RULE

// Of m the first kMost elements are the fast momentum, the others the slow one.
FASTSSL_CLONES void step_ademamix(int64_t n, const float* __restrict g, const Hyper& given, float,
                                  bool finite_only, float* __restrict p, float* __restrict m,
                                  float* __restrict v, float* most) {
  const Hyper h = with_inverses(given);
  float* __restrict slow = m + kMost;
  int32_t most_m = 0, most_v = 0, most_slow = 0;
  for (int64_t i = 0; i < n; ++i) {
    float next_m = m[i], next_slow = slow[i], next_v = v[i];
    const float next = stepped_ademamix(p[i], g[i], h, next_m, next_slow, next_v);
    const bool keep = finite_only && !is_finite(g[i]);
    p[i] = keep ? p[i] : next, m[i] = keep ? m[i] : next_m;
    slow[i] = keep ? slow[i] : next_slow, v[i] = keep ? v[i] : next_v;
    most_m = std::max(most_m, magnitude(m[i])), most_v = std::max(most_v, magnitude(v[i]));
    most_slow = std::max(most_slow, magnitude(slow[i]));
  }
  most[0] = bit_cast<float>(most_m), most[1] = bit_cast<float>(most_v);
  most[2] = bit_cast<float>(most_slow);
}

struct Loops {
  decltype(&step_ademamix) step;
  decltype(&norm_adam) norm;
};
constexpr Loops kLoops[] = {  // in the order of Rule
    {step_adam, norm_adam}, {step_adamw, norm_adamw}, {step_sgd, norm_sgd},
    {step_nesterov, norm_nesterov}, {step_lion, norm_lion}, {step_rmsprop, norm_rmsprop},
    {step_adagrad, norm_adagrad}, {step_lars, norm_lars}, {step_lamb, norm_lamb},
    {step_ademamix, nullptr},
};

// Rounds to bf16 up or down with the probabilities that make the mean exact: element e of tensor `id`
// at `step` by a 16-bit half of a word of Philox4x32-10, which has eight of them.
FASTSSL_CLONES void store_bf16_stochastic(const float* x, int64_t n, int64_t first, int64_t step,
                                          int64_t id, int64_t seed, uint16_t* out) {
  uint32_t random[kMost + 8];
  const int64_t groups = (n + 7) / 8;
  for (int64_t e = 0; e < groups; ++e) {
    const uint64_t group = uint64_t(first) / 8 + e;
    uint32_t w0 = uint32_t(group), w1 = uint32_t(group >> 32), w2 = uint32_t(step),
             w3 = uint32_t(id);
    philox(w0, w1, w2, w3, uint32_t(seed), uint32_t(uint64_t(seed) >> 32));
    random[e * 8] = w0 & 0xffffu, random[e * 8 + 1] = w0 >> 16;
    random[e * 8 + 2] = w1 & 0xffffu, random[e * 8 + 3] = w1 >> 16;
    random[e * 8 + 4] = w2 & 0xffffu, random[e * 8 + 5] = w2 >> 16;
    random[e * 8 + 6] = w3 & 0xffffu, random[e * 8 + 7] = w3 >> 16;
  }
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t u = bit_cast<uint32_t>(x[i]);
    out[i] = static_cast<uint16_t>(x[i] != x[i] ? 0x7fc0u : (u + random[i]) >> 16);
  }
}

void ask_for(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

// A parameter or gradient; its address and dtype are asked for once.
struct Values {
  void* data;
  ScalarType dtype;

  Values(const Tensor& t, void* data) : data(data), dtype(t.scalar_type()) {
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                        dtype == ScalarType::Half,
                    "blockwise_step_: parameters and gradients must be float32, bfloat16 or float16");
  }
  const float* read(int64_t at, int64_t n, float* out) const {
    if (dtype == ScalarType::Float) return static_cast<const float*>(data) + at;
    const uint16_t* x = static_cast<const uint16_t*>(data) + at;
    dtype == ScalarType::Half ? load_fp16(x, n, out) : load_bf16(x, n, out);
    return out;
  }
  void prefetch(int64_t at, int64_t n) const {
    const int64_t size = dtype == ScalarType::Float ? 4 : 2;
    ask_for(static_cast<const char*>(data) + at * size, n * size);
  }
};

// A state of a tensor: codes with absmax by blocks, or fp32, or none; part `part` of `parts` alike.
struct State {
  uint8_t* codes = nullptr;
  float *absmax = nullptr, *values = nullptr;
  bool is_signed, root;  // root: the codes are those of square roots

  State(const Tensor& t, const Tensor& scale, int64_t n, int64_t block, bool is_signed, bool root,
        int64_t parts = 1, int64_t part = 0)
      : is_signed(is_signed), root(root) {
    if (!t.numel()) return;
    const bool small = t.scalar_type() == ScalarType::Byte;
    const int64_t blocks = (n + block - 1) / block;
    STD_TORCH_CHECK(t.numel() == parts * n && (small || t.scalar_type() == ScalarType::Float) &&
                        (!small || (scale.numel() == parts * blocks &&
                                    scale.scalar_type() == ScalarType::Float)),
                    "blockwise_step_: a state of ", parts * n, " elements has ", t.numel(), " and ",
                    scale.numel(), " block maxima for blocks of ", block);
    if (small) codes = static_cast<uint8_t*>(t.mutable_data_ptr()) + part * n;
    else values = static_cast<float*>(t.mutable_data_ptr()) + part * n;
    if (small) absmax = static_cast<float*>(scale.mutable_data_ptr()) + part * blocks;
  }
  void prefetch(int64_t at, int64_t n) const {
    if (codes) ask_for(codes + at, n);
    else if (values) ask_for(values + at, 4 * n);
  }
  void read(int64_t b, int64_t at, int64_t n, float* out) const {
    if (values) std::copy_n(values + at, n, out);
    else if (!codes) std::fill_n(out, n, 0.f);
    else {
      is_signed ? decode<true>(codes + at, n, absmax[b], out) : decode<false>(codes + at, n, absmax[b], out);
      if (root) square(n, out);
    }
  }
  void write(int64_t b, int64_t at, int64_t n, float* x, float most) const {
    if (values) std::copy_n(x, n, values + at);
    if (!codes) return;
    if (root) square_root(n, x);
    absmax[b] = root ? std::sqrt(most) : most;
    is_signed ? encode<true>(x, n, absmax[b], codes + at) : encode<false>(x, n, absmax[b], codes + at);
  }
};

struct Item {
  Values p, g;
  int64_t n;
  State m, slow, v;
  Hyper h;
  const int64_t* counter;
  double sums[2] = {0.0, 0.0};
  float trust = 1.f;
};

struct alignas(64) Buffers {
  float p[kMost], g[kMost], m[2 * kMost], v[kMost];
};

}  // namespace

Tensor flat(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

std::tuple<Tensor, Tensor> quantize_blockwise(Tensor x, int64_t block_size, bool is_signed) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && block_size >= 1 && block_size <= kMost,
                  "quantize_blockwise: x must be float32 and block_size 1 to ", kMost);
  x = flat(x);
  const int64_t n = x.numel(), blocks = (n + block_size - 1) / block_size;
  Tensor codes = torch::stable::new_empty(x, {n}, ScalarType::Byte);
  Tensor absmax = torch::stable::new_empty(x, {blocks}, ScalarType::Float);
  const float* from = static_cast<const float*>(x.const_data_ptr());
  uint8_t* to = static_cast<uint8_t*>(codes.mutable_data_ptr());
  float* most = static_cast<float*>(absmax.mutable_data_ptr());
  torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, kElements / block_size),
                              [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t at = b * block_size, some = std::min(block_size, n - at);
      most[b] = absolute_maximum(from + at, some);
      if (is_signed) encode<true>(from + at, some, most[b], to + at);
      else encode<false>(from + at, some, most[b], to + at);
    }
  });
  return {codes, absmax};
}

Tensor dequantize_blockwise(Tensor codes, Tensor absmax, int64_t block_size, bool is_signed) {
  STD_TORCH_CHECK(block_size >= 1 && block_size <= kMost,
                  "dequantize_blockwise: block_size must be 1 to ", kMost, ", got ", block_size);
  codes = flat(codes), absmax = flat(absmax);
  const int64_t n = codes.numel(), blocks = (n + block_size - 1) / block_size;
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && absmax.numel() == blocks &&
                      absmax.scalar_type() == ScalarType::Float,
                  "dequantize_blockwise: codes must be uint8, absmax float32 with ", blocks,
                  " elements");
  Tensor out = torch::stable::new_empty(absmax, {n});
  torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, kElements / block_size),
                              [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t at = b * block_size;
      const uint8_t* from = static_cast<const uint8_t*>(codes.const_data_ptr()) + at;
      const float most = static_cast<const float*>(absmax.const_data_ptr())[b];
      float* to = static_cast<float*>(out.mutable_data_ptr()) + at;
      const int64_t some = std::min(block_size, n - at);
      is_signed ? decode<true>(from, some, most, to) : decode<false>(from, some, most, to);
    }
  });
  return out;
}

void blockwise_step(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> first,
                    std::vector<Tensor> first_scale, std::vector<Tensor> second,
                    std::vector<Tensor> second_scale, Tensor hyper, Tensor counters,
                    std::optional<Tensor> found_inf, int64_t rule, int64_t block_size, bool root,
                    bool finite_only, bool stochastic, int64_t seed) {
  if (found_inf && *static_cast<const float*>(found_inf->const_data_ptr()) != 0.f) return;
  const int64_t T = static_cast<int64_t>(params.size());
  STD_TORCH_CHECK(rule >= 0 && rule <= kAdEMAMix && block_size >= 8 && block_size <= kMost &&
                      block_size % 8 == 0,
                  "blockwise_step_: unknown rule ", rule, " or block size ", block_size);
  STD_TORCH_CHECK(hyper.numel() == T * kHyper && hyper.scalar_type() == ScalarType::Float &&
                      hyper.is_contiguous() && counters.numel() == 2 * T &&
                      counters.scalar_type() == ScalarType::Long && counters.is_contiguous(),
                  "blockwise_step_: hyper must be float32 (T, ", kHyper, "), counters int64 (T, 2)");
  for (const auto* list : {&grads, &first, &first_scale, &second, &second_scale})
    STD_TORCH_CHECK(static_cast<int64_t>(list->size()) == T, "blockwise_step_: needs gradients and "
                    "states for each of ", T, " parameters, got ", list->size());
  const Loops loops = kLoops[rule];
  const bool adapts = rule == kLARS || rule == kLAMB, two = rule == kAdEMAMix;
  std::vector<Item> items;
  std::vector<std::pair<int64_t, int64_t>> tasks;  // a tensor and its first block
  const int64_t blocks = std::max<int64_t>(1, kElements / block_size);
  for (int64_t t = 0; t < T; ++t) {
    const int64_t n = params[t].numel();
    STD_TORCH_CHECK(grads[t].numel() == n, "blockwise_step_: a gradient of ", grads[t].numel(),
                    " elements for a parameter of ", n);
    items.push_back({Values(params[t], params[t].mutable_data_ptr()),
                     Values(grads[t], const_cast<void*>(grads[t].const_data_ptr())), n,
                     State(first[t], first_scale[t], n, block_size, true, false, 1 + two),
                     State(first[t], first_scale[t], n, block_size, true, false, 1 + two, two),
                     State(second[t], second_scale[t], n, block_size, false, root),
                     static_cast<const Hyper*>(hyper.const_data_ptr())[t],
                     static_cast<const int64_t*>(counters.const_data_ptr()) + 2 * t});
    for (int64_t b = 0; b * block_size < n; b += blocks) tasks.emplace_back(t, b);
  }
  // f(item, block, first element, elements) over a task's blocks, with states in the buffers.
  const auto each_block = [&](int64_t task, Buffers& w, const auto& f) {
    const auto [t, begin] = tasks[task];
    Item& item = items[t];
    for (int64_t b = begin; b < begin + blocks && b * block_size < item.n; ++b) {
      const int64_t at = b * block_size, n = std::min(block_size, item.n - at);
      item.g.prefetch(at + kAhead, block_size);
      item.p.prefetch(at + kAhead, block_size);
      item.m.prefetch(at + kAhead, block_size);
      if (two) item.slow.prefetch(at + kAhead, block_size);
      item.v.prefetch(at + kAhead, block_size);
      item.m.read(b, at, n, w.m);
      if (two) item.slow.read(b, at, n, w.m + kMost);
      item.v.read(b, at, n, w.v);
      f(item, b, at, n);
    }
  };
  const int64_t count = static_cast<int64_t>(tasks.size());
  if (adapts) {
    std::vector<double> sums(2 * count, 0.0);
    parallel_tasks(count, [&](int64_t task) {
      const std::unique_ptr<Buffers> own(new Buffers);
      Buffers& w = *own;
      each_block(task, w, [&](Item& item, int64_t, int64_t at, int64_t n) {
        loops.norm(n, item.g.read(at, n, w.g), item.h, finite_only, item.p.read(at, n, w.p), w.m,
                   w.v, &sums[2 * task]);
      });
    });
    for (int64_t task = 0; task < count; ++task)
      for (int i = 0; i < 2; ++i) items[tasks[task].first].sums[i] += sums[2 * task + i];
    for (Item& item : items) {
      const double of_p = std::sqrt(item.sums[0]), of_d = std::sqrt(item.sums[1]);
      if (item.h.adapt == 0.f || of_p == 0.0 || of_d == 0.0) continue;
      const double factor = rule == kLARS ? item.h.extra : 1.0;
      item.trust = std::min(static_cast<float>(factor * of_p / of_d), item.h.most);
    }
  }
  parallel_tasks(count, [&](int64_t task) {
    const std::unique_ptr<Buffers> own(new Buffers);
    Buffers& w = *own;
    each_block(task, w, [&](Item& item, int64_t b, int64_t at, int64_t n) {
      const auto [out, dtype] = item.p;
      uint16_t* half = static_cast<uint16_t*>(out) + at;
      float* next = const_cast<float*>(item.p.read(at, n, w.p));  // fp32 in place
      float most[3];
      loops.step(n, item.g.read(at, n, w.g), item.h, item.trust, finite_only, next, w.m, w.v, most);
      if (dtype == ScalarType::Half) store_fp16(next, n, half);
      else if (dtype == ScalarType::BFloat16 && stochastic)
        store_bf16_stochastic(next, n, at, item.counter[0], item.counter[1], seed, half);
      else if (dtype == ScalarType::BFloat16) store_bf16(next, n, half);
      item.m.write(b, at, n, w.m, most[0]);
      if (two) item.slow.write(b, at, n, w.m + kMost, most[2]);
      item.v.write(b, at, n, w.v, most[1]);
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("quantize_blockwise", TORCH_BOX(&quantize_blockwise));
  m.impl("dequantize_blockwise", TORCH_BOX(&dequantize_blockwise));
  m.impl("blockwise_step_", TORCH_BOX(&blockwise_step));
}

}  // namespace fastssl
