// What the blockwise similarity kernels share: the problem, how it is cut into tiles, the logits of a
// tile, and the pass that turns a tile's products into gradients of q and k.
#pragma once

#include "products.h"

#include <algorithm>
#include <cmath>
#include <optional>

namespace fastssl {

// Products run on panels of kPanelRows x kPanelCols, whose operands and results fit the second-level
// cache and are read from beyond it seldom; loops over logits on kMaxRows at a time, whose sums stay in
// the first. kMaxCols is the widest tile of any kernel.
constexpr int64_t kPanelRows = 384, kPanelCols = 256, kMaxRows = 96, kMaxCols = 512;

using OptTensor = std::optional<Tensor>;

inline const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
inline float* fill_floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
inline const int32_t* ids(const OptTensor& t) {
  return t ? static_cast<const int32_t*>(t->const_data_ptr()) : nullptr;
}

inline void check_vector(const char* name, const Tensor& t, int64_t n, ScalarType dtype) {
  STD_TORCH_CHECK(t.numel() == n && t.scalar_type() == dtype && t.is_contiguous(), "contrastive: ",
                  name, " must be a contiguous ", dtype == ScalarType::Int ? "int32" : "float32",
                  " tensor of ", n, " elements, got ", t.numel());
}

inline Tensor unit_stride(const Tensor& t) {
  return t.stride(1) == 1 || t.size(1) <= 1 ? t : torch::stable::contiguous(t);
}

// One group's problem: rows [q0, q0 + N) of q against rows [k0, k0 + M) of k. Vectors point at the
// group's first entry.
struct Problem {
  Tensor q, k;
  int64_t N, M, D, q0 = 0, k0 = 0;
  float scale;
  const int32_t *q_ids = nullptr, *k_ids = nullptr, *target = nullptr;
  bool keep_equal = false;
  const float *bias = nullptr, *limit = nullptr;
  bool symmetric = false;

  Problem(const Tensor& q, const Tensor& k, const Tensor& scale, int64_t groups = 1)
      : q(unit_stride(q)), k(unit_stride(k)), N(q.size(0) / std::max<int64_t>(groups, 1)),
        M(k.size(0) / std::max<int64_t>(groups, 1)), D(q.size(1)), scale(floats(scale)[0]) {
    const auto dtype = q.scalar_type();
    STD_TORCH_CHECK(dtype == k.scalar_type() &&
                        (dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                         dtype == ScalarType::Half),
                    "contrastive: q and k must share float32, bfloat16 or float16");
    STD_TORCH_CHECK(D == k.size(1), "contrastive: q and k must have one width, got ", D, " and ",
                    k.size(1));
    STD_TORCH_CHECK(groups >= 1 && N >= 1 && M >= 1 && D >= 1 && q.size(0) == N * groups &&
                        k.size(0) == M * groups,
                    "contrastive: q and k must hold ", groups, " groups of equal size, not empty");
    check_vector("scale", scale, 1, ScalarType::Float);
  }
  void masks(const OptTensor& q_ids_, const OptTensor& k_ids_, bool keep_equal_,
             const OptTensor& bias_, const OptTensor& limit_) {
    STD_TORCH_CHECK(bool(q_ids_) == bool(k_ids_), "contrastive: q_ids and k_ids go together");
    if (q_ids_) check_vector("q_ids", *q_ids_, q.size(0), ScalarType::Int);
    if (k_ids_) check_vector("k_ids", *k_ids_, k.size(0), ScalarType::Int);
    if (bias_) check_vector("bias", *bias_, k.size(0), ScalarType::Float);
    if (limit_) check_vector("limit", *limit_, q.size(0), ScalarType::Float);
    q_ids = ids(q_ids_), k_ids = ids(k_ids_), keep_equal = keep_equal_;
    bias = bias_ ? floats(*bias_) : nullptr;
    limit = limit_ ? floats(*limit_) : nullptr;
  }
  // Targets outside [0, M) are refused, or mean that the row has none.
  void targets(const OptTensor& t, bool refuse) {
    if (!t) return;
    check_vector("target", *t, q.size(0), ScalarType::Int);
    target = ids(t);
    for (int64_t i = 0; refuse && i < q.size(0); ++i)
      STD_TORCH_CHECK(target[i] >= 0 && target[i] < M, "contrastive: target must lie in [0, ", M,
                      "), got ", target[i], " at row ", i);
  }
  Problem group(int64_t g) const {
    Problem p = *this;
    p.q0 = g * N, p.k0 = g * M;
    for (auto* rows : {&p.q_ids, &p.target})
      if (*rows) *rows += p.q0;
    if (p.k_ids) p.k_ids += p.k0;
    if (p.bias) p.bias += p.k0;
    if (p.limit) p.limit += p.q0;
    return p;
  }
};

// f(group's problem, g) for every group: side by side where there are enough, else one by one, each
// on all threads.
template <class F>
void for_groups(const Problem& p, int64_t groups, const F& f) {
  if (groups == 1) f(p, 0);
  else if (groups < static_cast<int64_t>(torch::stable::get_num_threads()))
    for (int64_t g = 0; g < groups; ++g) f(p.group(g), g);
  else
    parallel_tasks(groups, [&](int64_t g) { f(p.group(g), g); });
}

// How rows are cut into panels for `tasks` tasks and columns into chunks that share packed keys.
struct Plan {
  int64_t tasks, panel, panels, chunk, tile;
  Plan(int64_t N, int64_t M, int64_t D) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t budget = int64_t{1} << 20;  // elements, 4 MiB: all tasks' dk of one chunk
    tasks = std::max<int64_t>(1, std::min(threads, (N * M * D + (1 << 20) - 1) >> 20));
    tasks = std::min({tasks, (N + 11) / 12, std::max<int64_t>(1, budget / (kStrip * D))});
    panels = round_up((N + kPanelRows - 1) / kPanelRows, tasks);
    panel = (N + panels - 1) / panels;
    if (panel > 12) panel = std::min(kPanelRows, round_up(panel, 12));
    panels = (N + panel - 1) / panel;
    const int64_t fit = std::max<int64_t>(1, budget / (D * tasks * kStrip)) * kStrip;
    tile = std::min({kPanelCols, round_up(M, kStrip), fit});
    chunk = std::min(round_up(M, kStrip), fit / tile * tile);
  }
};

// Where a tile lies: rows and columns counted inside the group.
struct Block {
  int64_t row0, rows, col0, cols;
  int64_t strips() const { return (cols + kStrip - 1) / kStrip; }
};

// f(part of the tile, its block) for kMaxRows rows at a time.
template <class F>
void each_part(const Tile& x, const Block& b, const F& f) {
  for (int64_t i = 0; i < b.rows; i += kMaxRows)
    f(Tile{x.data + i * x.row, x.strip, x.row},
      Block{b.row0 + i, std::min(kMaxRows, b.rows - i), b.col0, b.cols});
}

// ------------------------------------------------------------------------------ logits of a strip

// What a loop over one strip reads beside its raw products.
struct StripInput {
  float scale;
  const float* bias;     // [kStrip]
  const int32_t* k_ids;  // [kStrip]
  const int32_t* q_ids;  // [rows] or null
  const float* limit;    // [rows] or null
  bool keep_equal;
};

// f(c, logit of row i and column c of the strip), minus infinity for pairs that are left out.
template <class F>
FASTSSL_INLINE inline void each_logit(const float* v, const StripInput& in, int64_t i, const F& f) {
  // The logit is rounded alike wherever it is formed: where one term dominates, logit - lse is exact.
  if (!in.q_ids && !in.limit) {
    for (int64_t c = 0; c < kStrip; ++c) f(c, v[c] * in.scale + in.bias[c]);
    return;
  }
  const int32_t id = in.q_ids ? in.q_ids[i] : 0;
  const bool out_if_equal = in.q_ids && !in.keep_equal, out_if_not = in.q_ids && in.keep_equal;
  const float limit = in.limit ? in.limit[i] : -kNegInf;
  for (int64_t c = 0; c < kStrip; ++c) {
    const float logit = v[c] * in.scale + in.bias[c];
    const bool out = (in.k_ids[c] == id ? out_if_equal : out_if_not) | (v[c] > limit);
    f(c, out ? kNegInf : logit);
  }
}

// Bias and ids of one tile's columns, padded to whole strips: the padding's logits are -inf.
struct TileColumns {
  std::vector<float> bias;
  std::vector<int32_t> k_ids;
  TileColumns() : bias(kMaxCols), k_ids(kMaxCols) {}

  void load(const Problem& p, const Block& b) {
    const int64_t padded = round_up(b.cols, kStrip);
    if (p.bias) std::copy_n(p.bias + b.col0, b.cols, bias.begin());
    else std::fill_n(bias.begin(), b.cols, 0.f);
    std::fill(bias.begin() + b.cols, bias.begin() + padded, kNegInf);
    if (!p.k_ids) return;
    std::copy_n(p.k_ids + b.col0, b.cols, k_ids.begin());
    std::fill(k_ids.begin() + b.cols, k_ids.begin() + padded, 0);
  }
  StripInput strip(const Problem& p, const Block& b, int64_t s) const {
    return {p.scale, &bias[s * kStrip], &k_ids[s * kStrip], p.q_ids ? p.q_ids + b.row0 : nullptr,
            p.limit ? p.limit + b.row0 : nullptr, p.keep_equal};
  }
};

// Raw products to logits in place; per-lane maxima of the rows.
FASTSSL_CLONES static void logits_strip(float* x, int64_t ld, int64_t rows, const StripInput in,
                                        int64_t below, float* row_max) {
  for (int64_t i = 0; i < rows; ++i) {
    float* v = x + i * ld;
    float* m = row_max + i * kStrip;
    each_logit(v, in, i, [&](int64_t c, float logit) FASTSSL_INLINE { v[c] = logit; });
    // A symmetric problem counts each unordered pair once: columns up to the diagonal drop out.
    for (int64_t c = 0, end = std::min(kStrip, i + below); c < end; ++c) v[c] = kNegInf;
    for (int64_t c = 0; c < kStrip; ++c) m[c] = v[c] > m[c] ? v[c] : m[c];
  }
}

inline void reduce_lanes(const std::vector<float>& lanes, int64_t rows, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    float sum = 0.f;
    for (int64_t c = 0; c < kStrip; ++c) sum += lanes[i * kStrip + c];
    out[i] = sum;
  }
}

// --------------------------------------------------------------------------- gradients of q and k

FASTSSL_CLONES static float dot(const float* x, const float* y, int64_t n) {
  float lanes[kStrip] = {}, sum = 0.f;
  int64_t d = 0;
  for (; d + kStrip <= n; d += kStrip)
    for (int64_t c = 0; c < kStrip; ++c) lanes[c] += x[d + c] * y[d + c];
  for (; d < n; ++d) sum += x[d] * y[d];
  for (float lane : lanes) sum += lane;
  return sum;
}
FASTSSL_CLONES static void scale_row(float* x, int64_t n, float factor) {
  for (int64_t d = 0; d < n; ++d) x[d] *= factor;
}

// Row i of dx = scale * sum, rounded once; returns <x_i, sum>, its share of the scale's gradient.
inline double finish_row(const Tensor& dx, const Tensor& x, int64_t i, float* sum, float scale,
                         bool need_dscale, std::vector<float>& scratch) {
  const int64_t D = x.size(1);
  double share = 0.0;
  if (need_dscale) {
    load_float_rows(x, i, 1, scratch.data(), D);
    share = dot(scratch.data(), sum, D);
  }
  scale_row(sum, D, scale);
  store_row(dx, i, sum);
  return share;
}

// dq = scale G k and dk = scale G^T q where they are needed; returns sum_ij G_ij <q_i, k_j>, the
// scale's gradient (0 if neither is needed). `to_gradient(task, tile, block)` turns a tile's raw
// products into G; with `products_known` it fills the tile itself. A symmetric G counts its pairs twice.
template <class Products, class F>
double gradients(const Problem& p, const Plan& plan, bool need_dq, const Tensor& dq, bool need_dk,
                 const Tensor& dk, bool products_known, const F& to_gradient) {
  Products products(p.D, plan.chunk, plan.panel, plan.tile, need_dq);
  // A result in fp32 holds its own sums.
  const bool direct = dq.scalar_type() == ScalarType::Float;
  std::vector<float> dq_store(need_dq && !direct ? p.N * p.D : 0);
  float* dq_sums = direct ? fill_floats(dq) + (need_dq ? p.q0 * p.D : 0) : dq_store.data();
  std::fill_n(dq_sums, need_dq ? p.N * p.D : 0, 0.f);
  const int64_t dk_size = need_dk ? products.dk_size(plan.chunk) : 0;
  std::vector<float> dk_parts(plan.tasks * dk_size);
  std::vector<double> dscale(plan.tasks, 0.0);

  for (int64_t chunk = 0; chunk < p.M; chunk += plan.chunk) {
    const int64_t chunk_cols = std::min(plan.chunk, p.M - chunk);
    const int64_t tiles = (chunk_cols + plan.tile - 1) / plan.tile;
    parallel_tasks(tiles, [&](int64_t t) {
      products.pack_keys(p.k, p.k0 + chunk, t * plan.tile,
                         std::min(chunk_cols, (t + 1) * plan.tile), need_dq);
    });
    parallel_tasks(plan.tasks, [&](int64_t task) {
      float* dk_part = dk_parts.data() + task * dk_size;
      std::fill_n(dk_part, dk_size, 0.f);
      auto scratch = products.scratch(true);
      for (int64_t panel = task; panel < plan.panels; panel += plan.tasks) {
        const int64_t row0 = panel * plan.panel, rows = std::min(plan.panel, p.N - row0);
        products.pack_queries(p.q, p.q0 + row0, rows, need_dk, scratch);
        for (int64_t begin = 0; begin < chunk_cols; begin += plan.tile) {
          const int64_t cols = std::min(plan.tile, chunk_cols - begin);
          const Tile g = products_known ? products.tile(scratch)
                                        : products.scores(begin, cols, scratch);
          each_part(g, Block{row0, rows, chunk + begin, cols},
                    [&](const Tile& part, const Block& b) { to_gradient(task, part, b); });
          if (need_dq || need_dk) products.round_gradient(g, cols, scratch);
          if (need_dq) products.add_dq(begin, cols, scratch, &dq_sums[row0 * p.D], p.D);
          if (need_dk) products.add_dk(begin, cols, scratch, dk_part);
        }
      }
    });
    const int64_t strips = (chunk_cols + kStrip - 1) / kStrip;
    parallel_tasks(need_dk ? plan.tasks : 0, [&](int64_t task) {
      std::vector<float> sums(kStrip * p.D), key(p.D);
      for (int64_t s = task; s < strips; s += plan.tasks) {
        const int64_t begin = s * kStrip, count = std::min(kStrip, chunk_cols - begin);
        std::fill(sums.begin(), sums.end(), 0.f);
        for (int64_t part = 0; part < plan.tasks; ++part)
          products.gather_dk(&dk_parts[part * dk_size], begin, count, sums.data());
        for (int64_t j = 0; j < count; ++j)
          dscale[task] += finish_row(dk, p.k, p.k0 + chunk + begin + j, &sums[j * p.D], p.scale,
                                     !need_dq, key);
      }
    });
  }
  const int64_t block = 64, blocks = need_dq ? (p.N + block - 1) / block : 0;
  std::vector<double> by_block(blocks, 0.0);
  parallel_tasks(blocks, [&](int64_t b) {
    std::vector<float> query(p.D);
    for (int64_t i = b * block; i < std::min(p.N, (b + 1) * block); ++i)
      by_block[b] += finish_row(dq, p.q, p.q0 + i, &dq_sums[i * p.D], p.scale, true, query);
  });
  double total = 0.0;
  for (double part : dscale) total += part;
  for (double part : by_block) total += p.symmetric ? 0.5 * part : part;
  return total;
}

// --------------------------------------------------------------------------- choice of products

template <class F>
auto with_products(ScalarType dtype, const F& f) {
#if FASTSSL_X86
  if (dtype == ScalarType::BFloat16) {
    if (cpu().amx_bf16 && cpu().mkl_bf16) return f.template operator()<LibraryProducts<true>>();
    if (cpu().avx512_bf16) return f.template operator()<MicroProducts<true>>();
  }
  if (cpu().avx512 && cpu().amd) return f.template operator()<MicroProducts<false>>();
#endif
  return f.template operator()<LibraryProducts<false>>();
}

}  // namespace fastssl
