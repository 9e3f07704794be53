// Sigmoid loss of all pairs: with x_ij = scale <q_i, k_j> + bias and the positive at j = target_i,
// loss_i = softplus(-x_{i, target_i}) + sum_{j != target_i} softplus(x_ij), and the gradients of
// sum_i weight_i loss_i.
//
// No normaliser, so a tile's G_ij = weight_i (sigmoid(x_ij) - [j = target_i]) is known as soon as its
// products are: loss and gradients take one pass of 3U operations for U = 2 N M D, with one
// exponential and one division a pair. softplus(x) = max(x, 0) + log1p(e^-|x|), the logarithm by a
// polynomial that keeps its relative accuracy where e^-|x| is tiny. Memory O((N + M) D).
// Deterministic for a given number of threads.
// Paper: SigLIP arXiv:2303.15343.
#include "tiles.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace fastssl {
namespace {

struct Sigmoid {
  float softplus, sigmoid;
};

// Relative error of both 3e-7. No branches: loops over it vectorise.
FASTSSL_INLINE inline Sigmoid sigmoid_loss(float x) {
  const float e = exp_poly(x < 0.f ? x : -x);  // NaN stays NaN
  // log1p(e) / e on [0, 1], fitted at weighted Chebyshev nodes.
  float p = -0.003243980696424842f;
  p = p * e + 0.019851261749863625f;
  p = p * e - 0.056959159672260284f;
  p = p * e + 0.10603617131710052f;
  p = p * e - 0.15305569767951965f;
  p = p * e + 0.19675931334495544f;
  p = p * e - 0.24954132735729218f;
  p = p * e + 0.3332996368408203f;
  p = p * e - 0.4999990165233612f;
  p = p * e + 1.0f;
  const float inverse = 1.f / (1.f + e);
  return {(x > 0.f ? x : 0.f) + p * e, x < 0.f ? e * inverse : inverse};
}

// Raw products of negatives to G in place; the positive's column and padding count nothing here.
FASTSSL_CLONES void siglip_strip(float* x, int64_t ld, int64_t rows, const StripInput in,
                                 const int32_t* target, int64_t col0, const float* weight,
                                 float* loss, float* total) {
  for (int64_t i = 0; i < rows; ++i) {
    float* v = x + i * ld;
    float *losses = loss + i * kStrip, *totals = total + i * kStrip;
    const float w = weight[i];
    const int64_t positive = target[i] - col0;
    each_logit(v, in, i, [&](int64_t c, float logit) FASTSSL_INLINE {
      const Sigmoid s = sigmoid_loss(c == positive ? kNegInf : logit);
      losses[c] += s.softplus;
      v[c] = w * s.sigmoid;
      totals[c] += v[c];
    });
  }
}

struct TileGradient {
  const Problem& p;
  float bias;
  const float* weight;
  float* loss;
  double dbias = 0.0;
  TileColumns columns;
  std::vector<float> lanes, totals, sums, raw;

  TileGradient(const Problem& p, float bias, const float* weight, float* loss)
      : p(p), bias(bias), weight(weight), loss(loss), lanes(kMaxRows * kStrip),
        totals(kMaxRows * kStrip), sums(kMaxRows), raw(kMaxRows) {}

  void operator()(const Tile& g, const Block& b) {
    columns.load(p, b);
    for (int64_t j = 0; j < b.cols; ++j) columns.bias[j] = bias;
    for (int64_t i = 0; i < b.rows; ++i) {
      const int64_t j = p.target[b.row0 + i] - b.col0;
      if (j >= 0 && j < b.cols) raw[i] = g(i, j);
    }
    std::fill_n(lanes.begin(), b.rows * kStrip, 0.f);
    std::fill_n(totals.begin(), b.rows * kStrip, 0.f);
    for (int64_t s = 0; s < b.strips(); ++s)
      siglip_strip(g.at(s), g.row, b.rows, columns.strip(p, b, s), p.target + b.row0,
                   b.col0 + s * kStrip, weight + b.row0, lanes.data(), totals.data());
    reduce_lanes(lanes, b.rows, sums.data());
    for (int64_t i = 0; i < b.rows; ++i) loss[b.row0 + i] += sums[i];
    reduce_lanes(totals, b.rows, sums.data());
    for (int64_t i = 0; i < b.rows; ++i) dbias += sums[i];
    for (int64_t i = 0; i < b.rows; ++i) {
      const int64_t j = p.target[b.row0 + i] - b.col0;
      if (j < 0 || j >= b.cols) continue;
      const Sigmoid s = sigmoid_loss(-(raw[i] * p.scale + bias));
      loss[b.row0 + i] += s.softplus;
      g(i, j) = -weight[b.row0 + i] * s.sigmoid;  // sigmoid(x) - 1 = -sigmoid(-x)
      dbias += g(i, j);
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> siglip_fwd(
    Tensor q, Tensor k, Tensor scale, Tensor bias, OptTensor q_ids, OptTensor k_ids, Tensor target,
    Tensor weight, bool need_dq, bool need_dk) {
  Problem p(q, k, scale);
  p.masks(q_ids, k_ids, false, std::nullopt, std::nullopt);
  p.targets(target, false);
  check_vector("bias", bias, 1, ScalarType::Float);
  check_vector("weight", weight, p.N, ScalarType::Float);
  Tensor loss = torch::stable::new_zeros(scale, {p.N});
  Tensor dq = torch::stable::new_empty(scale, {need_dq ? p.N : 0, p.D});
  Tensor dk = torch::stable::new_empty(scale, {need_dk ? p.M : 0, p.D});
  Tensor dscale = torch::stable::new_empty(scale, {});
  Tensor dbias = torch::stable::new_zeros(scale, {});
  const Plan plan(p.N, p.M, p.D);
  std::vector<TileGradient> tasks(
      plan.tasks, TileGradient(p, floats(bias)[0], floats(weight), fill_floats(loss)));
  const double total = with_products(q.scalar_type(), [&]<class Products>() {
    return gradients<Products>(
        p, plan, need_dq, dq, need_dk, dk, false,
        [&](int64_t task, const Tile& g, const Block& b) { tasks[task](g, b); });
  });
  *fill_floats(dscale) = static_cast<float>(total);
  double sum = 0.0;
  for (const auto& task : tasks) sum += task.dbias;
  if (need_dq || need_dk) *fill_floats(dbias) = static_cast<float>(sum);
  return {loss, dq, dk, dscale, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) { m.impl("siglip_fwd", TORCH_BOX(&siglip_fwd)); }

}  // namespace fastssl
