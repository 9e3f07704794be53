// Streaming log-sum-exp of x_ij = scale <q_i, k_j> + bias_j over rows and columns, and its gradient.
//
// Forward: per tile of at most 96 x 512 scores, one exponential per element serves both directions:
// E = 2^80 e^(x - tile maximum), so sums neither overflow nor lose anything that matters while they
// stay above 2^-86; a tile with a smaller sum is redone with each row's and column's own maximum. Backward: G_ij = drow_i e^(x_ij - row_lse_i) + dcol_j e^(x_ij - col_lse_j)
// from one exponential where the tile's lse values lie within 200 log 2 of each other, else from two;
// then dq = scale G k, dk = scale G^T q. 1U forward and 3U backward for U = 2 N M D operations; a
// symmetric problem (k is q) costs 0.5U and 2U. Memory O((N + M) D), never N x M.
// Deterministic for a given number of threads: tasks own fixed panels and merge in fixed order.
// Paper: SimCLR arXiv:2002.05709 and CLIP arXiv:2103.00020 for the loss; online softmax
// arXiv:1805.02867 for the merged sums.
#include "products.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

namespace fastssl {
namespace {

constexpr int64_t kMaxRows = 96, kMaxCols = 512;
constexpr int kHeadroom = 80;                // E <= 2^80: a sum over 2^47 columns still fits
constexpr float kSmallest = 1.2924697e-26f;  // 2^-86: what flushed below 2^-126 is then < 2^-30
constexpr float kFloor = std::numeric_limits<float>::lowest();  // the maximum of nothing
constexpr float kRange = 200.f * kLn2;       // lse values that one offset serves: 2^(+-100)

using OptTensor = std::optional<Tensor>;

const int32_t* ids(const OptTensor& t) {
  return t ? static_cast<const int32_t*>(t->const_data_ptr()) : nullptr;
}
const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

void check_vector(const char* name, const Tensor& t, int64_t n, ScalarType dtype) {
  STD_TORCH_CHECK(t.numel() == n && t.scalar_type() == dtype && t.is_contiguous(), "contrastive: ",
                  name, " must be a contiguous ", dtype == ScalarType::Int ? "int32" : "float32",
                  " tensor of ", n, " elements, got ", t.numel());
}

// The problem as the tile loops see it.
struct Problem {
  const Tensor &q, &k;
  int64_t N, M, D;
  float scale;
  const int32_t *q_ids, *k_ids, *target;
  const float* bias;
  bool symmetric;

  Problem(const Tensor& q, const Tensor& k, const Tensor& scale, const OptTensor& q_ids,
          const OptTensor& k_ids, const OptTensor& bias, const OptTensor& target, bool symmetric)
      : q(q), k(k), N(q.size(0)), M(k.size(0)), D(q.size(1)), scale(floats(scale)[0]),
        q_ids(ids(q_ids)), k_ids(ids(k_ids)), target(ids(target)),
        bias(bias ? floats(*bias) : nullptr), symmetric(symmetric) {
    const auto dtype = q.scalar_type();
    STD_TORCH_CHECK(dtype == k.scalar_type() &&
                        (dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                         dtype == ScalarType::Half),
                    "contrastive: q and k must share float32, bfloat16 or float16");
    STD_TORCH_CHECK(D == k.size(1), "contrastive: q and k must have one width, got ", D, " and ",
                    k.size(1));
    check_vector("scale", scale, 1, ScalarType::Float);
    if (bias) check_vector("bias", *bias, M, ScalarType::Float);
    if (q_ids) check_vector("q_ids", *q_ids, N, ScalarType::Int);
    if (k_ids) check_vector("k_ids", *k_ids, M, ScalarType::Int);
    if (target) check_vector("target", *target, N, ScalarType::Int);
    if (this->target)
      for (int64_t i = 0; i < N; ++i)
        STD_TORCH_CHECK(this->target[i] >= 0 && this->target[i] < M,
                        "contrastive: target must lie in [0, ", M, "), got ", this->target[i],
                        " at row ", i);
  }
};

// How rows are cut into panels for `tasks` tasks and columns into chunks that share packed keys.
struct Plan {
  int64_t tasks, panel, panels, chunk, tile;
  Plan(int64_t N, int64_t M, int64_t D) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t budget = int64_t{4} << 20;  // elements, 16 MiB: all tasks' dk of one chunk
    tasks = std::max<int64_t>(1, std::min(threads, (N * M * D + (1 << 20) - 1) >> 20));
    tasks = std::min({tasks, (N + 11) / 12, std::max<int64_t>(1, budget / (kStrip * D))});
    panels = round_up((N + kMaxRows - 1) / kMaxRows, tasks);
    panel = (N + panels - 1) / panels;
    if (panel > 12) panel = std::min(kMaxRows, round_up(panel, 12));
    panels = (N + panel - 1) / panel;
    const int64_t fit = std::max<int64_t>(1, budget / (D * tasks * kStrip)) * kStrip;
    tile = std::min({kMaxCols, round_up(M, kStrip), fit});
    chunk = std::min(round_up(M, kStrip), fit / tile * tile);
  }
};

// ---------------------------------------------------------------- loops over one strip of a tile

// What a loop reads beside the raw products of one strip.
struct StripInput {
  float scale;
  const float* bias;
  const int32_t *q_ids, *k_ids;
};

// Raw products to logits in place, left-out pairs to -inf; per-lane maxima of the rows.
FASTSSL_CLONES void logits_strip(float* x, int64_t ld, int64_t rows, const StripInput in,
                                 int64_t below, float* row_max) {
  for (int64_t i = 0; i < rows; ++i) {
    float* v = x + i * ld;
    float* m = row_max + i * kStrip;
    for (int64_t c = 0; c < kStrip; ++c) v[c] = v[c] * in.scale + in.bias[c];
    if (in.k_ids)
      for (int64_t c = 0; c < kStrip; ++c) v[c] = in.k_ids[c] == in.q_ids[i] ? kNegInf : v[c];
    // A symmetric problem counts each unordered pair once: columns up to the diagonal drop out.
    for (int64_t c = 0, end = std::min(kStrip, i + below); c < end; ++c) v[c] = kNegInf;
    for (int64_t c = 0; c < kStrip; ++c) m[c] = v[c] > m[c] ? v[c] : m[c];
  }
}

FASTSSL_CLONES void window_strip(const float* x, int64_t ld, int64_t rows, float tile_max,
                                 float* row_sum, float* col_sum) {
  float columns[kStrip] = {};
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < kStrip; ++c) {
      const float e = exp_poly(x[i * ld + c] - tile_max, kHeadroom);
      row_sum[i * kStrip + c] += e;
      columns[c] += e;
    }
  for (int64_t c = 0; c < kStrip; ++c) col_sum[c] = columns[c];
}

FASTSSL_CLONES void rows_strip(const float* x, int64_t ld, int64_t rows, const float* max,
                               float* row_sum) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < kStrip; ++c)
      row_sum[i * kStrip + c] += exp_poly(x[i * ld + c] - max[i], kHeadroom);
}

FASTSSL_CLONES void cols_strip(const float* x, int64_t ld, int64_t rows, float* max, float* sum) {
  for (int64_t c = 0; c < kStrip; ++c) max[c] = kFloor, sum[c] = 0.f;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < kStrip; ++c) {
      const float v = x[i * ld + c];
      max[c] = v > max[c] ? v : max[c];
    }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < kStrip; ++c) sum[c] += exp_poly(x[i * ld + c] - max[c], kHeadroom);
}

// (max, sum) += (max2, sum2), elementwise; a pair stands for max + log(2^-80 sum).
FASTSSL_CLONES void merge(float* max, float* sum, const float* max2, const float* sum2, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    const float m = max[c] > max2[c] ? max[c] : max2[c];
    // Half the exponent at a time: the factor alone may underflow where its product with 2^80 counts.
    const float f = exp_poly(0.5f * (max[c] - m)), f2 = exp_poly(0.5f * (max2[c] - m));
    sum[c] = sum[c] * f * f + sum2[c] * f2 * f2;
    max[c] = m;
  }
}

// Raw products to G: one exponential, offset by row, times the sum of both directions' weights.
FASTSSL_CLONES void gradient_strip(float* x, int64_t ld, int64_t rows, const StripInput in,
                                   const float* offset, const float* row_weight,
                                   const float* col_weight) {
  for (int64_t i = 0; i < rows; ++i) {
    float* v = x + i * ld;
    // The logit is rounded as in the forward: where one term dominates, logit - lse is then exact.
    for (int64_t c = 0; c < kStrip; ++c) {
      const float logit = v[c] * in.scale + in.bias[c];
      v[c] = exp_poly(logit - offset[i]) * (row_weight[i] + col_weight[c]);
    }
    if (in.k_ids)
      for (int64_t c = 0; c < kStrip; ++c) v[c] = in.k_ids[c] == in.q_ids[i] ? 0.f : v[c];
  }
}

FASTSSL_CLONES void gradient_strip_exact(float* x, int64_t ld, int64_t rows, const StripInput in,
                                         bool has_rows, const float* row_lse, const float* drow,
                                         const float* col_lse, const float* dcol) {
  for (int64_t i = 0; i < rows; ++i) {
    float* v = x + i * ld;
    // Where rows have no lse their exponential could overflow: it must not be formed at all.
    for (int64_t c = 0; c < kStrip; ++c) {
      const float logit = v[c] * in.scale + in.bias[c];
      const float by_row = has_rows ? exp_poly(logit - row_lse[i]) * drow[i] : 0.f;
      v[c] = by_row + exp_poly(logit - col_lse[c]) * dcol[c];
    }
    if (in.k_ids)
      for (int64_t c = 0; c < kStrip; ++c) v[c] = in.k_ids[c] == in.q_ids[i] ? 0.f : v[c];
  }
}

// ------------------------------------------------------------------------------ shared by both

// Bias and ids of one tile's columns, padded to whole strips: the padding's logits are -inf.
struct TileColumns {
  std::vector<float> bias;
  std::vector<int32_t> k_ids;
  TileColumns() : bias(kMaxCols), k_ids(kMaxCols) {}

  void load(const Problem& p, int64_t col0, int64_t cols) {
    const int64_t padded = round_up(cols, kStrip);
    if (p.bias) std::copy_n(p.bias + col0, cols, bias.begin());
    else std::fill_n(bias.begin(), cols, 0.f);
    std::fill(bias.begin() + cols, bias.begin() + padded, kNegInf);
    if (!p.k_ids) return;
    std::copy_n(p.k_ids + col0, cols, k_ids.begin());
    std::fill(k_ids.begin() + cols, k_ids.begin() + padded, 0);
  }
  StripInput strip(const Problem& p, int64_t row0, int64_t s) const {
    return {p.scale, &bias[s * kStrip], p.q_ids ? p.q_ids + row0 : nullptr,
            p.k_ids ? &k_ids[s * kStrip] : nullptr};
  }
};

float lse(float max, float sum) {
  return static_cast<float>(max + std::log(std::ldexp(double(sum), -kHeadroom)));
}

void reduce_lanes(const std::vector<float>& lanes, int64_t rows, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    float sum = 0.f;
    for (int64_t c = 0; c < kStrip; ++c) sum += lanes[i * kStrip + c];
    out[i] = sum;
  }
}

// ------------------------------------------------------------------------------------ forward

template <class Products>
void forward(const Problem& p, bool want_rows, bool want_cols, float* row_lse, float* col_lse,
             float* pos) {
  const Plan plan(p.N, p.M, p.D);
  const bool both = (want_rows && want_cols) || p.symmetric;
  Products products(p.D, plan.chunk, plan.panel, plan.tile, false);
  std::vector<float> row_max(p.N, kFloor), row_sum(p.N, 0.f);
  const int64_t col_state = both || want_cols ? p.M : 0;
  std::vector<float> col_max(plan.tasks * col_state, kFloor), col_sum(plan.tasks * col_state, 0.f);

  for (int64_t chunk = 0; chunk < p.M; chunk += plan.chunk) {
    const int64_t chunk_cols = std::min(plan.chunk, p.M - chunk);
    const int64_t tiles = (chunk_cols + plan.tile - 1) / plan.tile;
    parallel_tasks(tiles, [&](int64_t t) {
      products.pack_keys(p.k, chunk, t * plan.tile, std::min(chunk_cols, (t + 1) * plan.tile), false);
    });
    parallel_tasks(plan.tasks, [&](int64_t task) {
      auto scratch = products.scratch(false);
      TileColumns columns;
      std::vector<float> lanes(kMaxRows * kStrip), sums(kMaxRows), maxima(kMaxRows);
      std::vector<float> max2(kMaxCols), sum2(kMaxCols);
      for (int64_t panel = task; panel < plan.panels; panel += plan.tasks) {
        const int64_t row0 = panel * plan.panel, rows = std::min(plan.panel, p.N - row0);
        if (p.symmetric && chunk + chunk_cols <= row0) continue;
        products.pack_queries(p.q, row0, rows, false, scratch);
        for (int64_t begin = 0; begin < chunk_cols; begin += plan.tile) {
          const int64_t cols = std::min(plan.tile, chunk_cols - begin), col0 = chunk + begin;
          if (p.symmetric && col0 + cols <= row0) continue;
          const Tile x = products.scores(begin, cols, scratch);
          if (pos)
            for (int64_t i = 0; i < rows; ++i) {
              const int64_t j = p.target[row0 + i] - col0;
              if (j >= 0 && j < cols && !(p.symmetric && col0 + j < row0 + i))
                pos[row0 + i] = x(i, j) * p.scale + (p.bias ? p.bias[col0 + j] : 0.f);
            }
          if (pos && p.symmetric)  // the positive below the diagonal is the one above it
            for (int64_t j = 0; j < cols; ++j) {
              const int64_t i = p.target[col0 + j] - row0;
              if (i >= 0 && i < rows && row0 + i < col0 + j) pos[col0 + j] = x(i, j) * p.scale;
            }
          const bool triangle = p.symmetric && col0 < row0 + rows;
          const int64_t strips = (cols + kStrip - 1) / kStrip;
          columns.load(p, col0, cols);
          std::fill_n(lanes.begin(), rows * kStrip, kFloor);
          for (int64_t s = 0; s < strips; ++s)
            logits_strip(x.at(s), x.row, rows, columns.strip(p, row0, s),
                         triangle ? row0 + 1 - (col0 + s * kStrip) : -rows, lanes.data());
          float tile_max = kFloor;
          for (int64_t i = 0; i < rows; ++i) {
            maxima[i] = *std::max_element(&lanes[i * kStrip], &lanes[i * kStrip] + kStrip);
            tile_max = std::max(tile_max, maxima[i]);
          }
          const bool need_cols = both || want_cols;
          bool exact = !both;
          if (both) {
            std::fill_n(lanes.begin(), rows * kStrip, 0.f);
            for (int64_t s = 0; s < strips; ++s)
              window_strip(x.at(s), x.row, rows, tile_max, lanes.data(), &sum2[s * kStrip]);
            reduce_lanes(lanes, rows, sums.data());
            for (int64_t i = 0; i < rows; ++i) exact |= !(sums[i] >= kSmallest);
            for (int64_t j = 0; j < cols; ++j) exact |= !(sum2[j] >= kSmallest);
            if (!exact) {
              std::fill_n(maxima.begin(), rows, tile_max);
              std::fill_n(max2.begin(), cols, tile_max);
            }
          }
          if (exact) {
            if (both || want_rows) {
              std::fill_n(lanes.begin(), rows * kStrip, 0.f);
              for (int64_t s = 0; s < strips; ++s)
                rows_strip(x.at(s), x.row, rows, maxima.data(), lanes.data());
              reduce_lanes(lanes, rows, sums.data());
            }
            if (need_cols)
              for (int64_t s = 0; s < strips; ++s)
                cols_strip(x.at(s), x.row, rows, &max2[s * kStrip], &sum2[s * kStrip]);
          }
          if (both || want_rows)
            merge(&row_max[row0], &row_sum[row0], maxima.data(), sums.data(), rows);
          if (need_cols)
            merge(&col_max[task * p.M + col0], &col_sum[task * p.M + col0], max2.data(), sum2.data(),
                  cols);
        }
      }
    });
  }
  for (int64_t task = 1; task < plan.tasks && col_state; ++task)
    merge(col_max.data(), col_sum.data(), &col_max[task * p.M], &col_sum[task * p.M], p.M);
  if (p.symmetric) merge(row_max.data(), row_sum.data(), col_max.data(), col_sum.data(), p.N);
  if (want_rows)
    for (int64_t i = 0; i < p.N; ++i) row_lse[i] = lse(row_max[i], row_sum[i]);
  if (want_cols)
    for (int64_t j = 0; j < p.M; ++j) col_lse[j] = lse(col_max[j], col_sum[j]);
}

// ----------------------------------------------------------------------------------- backward

// lse and upstream gradient of one direction; rows without any pair weigh nothing.
struct Direction {
  std::vector<float> lse, weight;
  Direction(int64_t n, int64_t padded, const Tensor& saved, const Tensor& d)
        : lse(padded, 0.f), weight(padded, 0.f) {
    if (d.numel() == 0) return;
    for (int64_t i = 0; i < n; ++i)
      if (floats(saved)[i] != kNegInf) {
        lse[i] = floats(saved)[i];
        weight[i] = floats(d)[i];
      }
  }
  std::pair<float, float> range(int64_t begin, int64_t n) const {
    const auto [lo, hi] = std::minmax_element(lse.begin() + begin, lse.begin() + begin + n);
    return {*lo, *hi};
  }
};

// Row i of dx = scale * sum, rounded once; returns <x_i, sum>, its share of the scale's gradient.
double finish_row(const Tensor& dx, const Tensor& x, int64_t i, float* sum, float scale,
                  bool need_dscale, std::vector<float>& scratch) {
  const int64_t D = x.size(1);
  double dot = 0.0;
  if (need_dscale) {
    load_float_rows(x, i, 1, scratch.data(), D);
    float lanes[kStrip] = {};
    for (int64_t d = 0; d < D; ++d) lanes[d % kStrip] += scratch[d] * sum[d];
    for (float lane : lanes) dot += lane;
  }
  for (int64_t d = 0; d < D; ++d) sum[d] *= scale;
  store_row(dx, i, sum);
  return dot;
}

template <class Products>
void backward(const Problem& p, const Direction& row, const Direction& col, bool has_rows,
              bool has_cols, const float* dpos, bool need_dk, std::vector<float>& dq,
              const Tensor& dk, double& dscale, float* dbias) {
  const Plan plan(p.N, p.M, p.D);
  Products products(p.D, plan.chunk, plan.panel, plan.tile, !dq.empty());
  const bool need_dq = !dq.empty();
  const int64_t dk_size = need_dk ? products.dk_size(plan.chunk) : 0;
  std::vector<float> dk_parts(plan.tasks * dk_size), dbias_parts(dbias ? plan.tasks * plan.chunk : 0);
  std::vector<double> dscale_parts(plan.tasks, 0.0);

  for (int64_t chunk = 0; chunk < p.M; chunk += plan.chunk) {
    const int64_t chunk_cols = std::min(plan.chunk, p.M - chunk);
    const int64_t tiles = (chunk_cols + plan.tile - 1) / plan.tile;
    parallel_tasks(tiles, [&](int64_t t) {
      products.pack_keys(p.k, chunk, t * plan.tile, std::min(chunk_cols, (t + 1) * plan.tile), need_dq);
    });
    std::fill(dbias_parts.begin(), dbias_parts.end(), 0.f);
    parallel_tasks(plan.tasks, [&](int64_t task) {
      float* dk_part = dk_parts.data() + task * dk_size;
      std::fill_n(dk_part, dk_size, 0.f);
      auto scratch = products.scratch(true);
      TileColumns columns;
      std::vector<float> offset(kMaxRows), row_weight(kMaxRows), col_weight(kMaxCols);
      for (int64_t panel = task; panel < plan.panels; panel += plan.tasks) {
        const int64_t row0 = panel * plan.panel, rows = std::min(plan.panel, p.N - row0);
        products.pack_queries(p.q, row0, rows, need_dk, scratch);
        for (int64_t begin = 0; begin < chunk_cols; begin += plan.tile) {
          const int64_t cols = std::min(plan.tile, chunk_cols - begin), col0 = chunk + begin;
          const int64_t strips = (cols + kStrip - 1) / kStrip;
          const Tile g = products.scores(begin, cols, scratch);
          columns.load(p, col0, cols);

          bool one_exponential = !has_cols;
          if (!has_cols) {  // offsets by row need no window
            std::copy_n(&row.lse[row0], rows, offset.begin());
            std::copy_n(&row.weight[row0], rows, row_weight.begin());
            std::fill(col_weight.begin(), col_weight.end(), 0.f);
          } else if (has_rows) {
            const auto [row_lo, row_hi] = row.range(row0, rows);
            const auto [col_lo, col_hi] = col.range(col0, cols);
            const float lo = std::min(row_lo, col_lo), hi = std::min(row_hi, col_hi);
            one_exponential = std::max(row_hi, col_hi) - lo <= kRange;
            const float K = 0.5f * (lo + hi);
            for (int64_t i = 0; i < rows; ++i) {
              offset[i] = K;
              row_weight[i] = row.weight[row0 + i] * std::exp(K - row.lse[row0 + i]);
            }
            for (int64_t j = 0; j < cols; ++j)
              col_weight[j] = col.weight[col0 + j] * std::exp(K - col.lse[col0 + j]);
            std::fill(col_weight.begin() + cols, col_weight.begin() + strips * kStrip, 0.f);
          }
          for (int64_t s = 0; s < strips; ++s) {
            const StripInput in = columns.strip(p, row0, s);
            if (one_exponential)
              gradient_strip(g.at(s), g.row, rows, in, offset.data(), row_weight.data(),
                             &col_weight[s * kStrip]);
            else
              gradient_strip_exact(g.at(s), g.row, rows, in, has_rows, &row.lse[row0],
                                   &row.weight[row0],
                                   &col.lse[col0 + s * kStrip], &col.weight[col0 + s * kStrip]);
          }
          if (dpos) {
            for (int64_t i = 0; i < rows; ++i) {
              const int64_t j = p.target[row0 + i] - col0;
              if (j >= 0 && j < cols) g(i, j) += dpos[row0 + i];
            }
            if (p.symmetric)
              for (int64_t j = 0; j < cols; ++j) {
                const int64_t i = p.target[col0 + j] - row0;
                if (i >= 0 && i < rows) g(i, j) += dpos[col0 + j];
              }
          }
          if (dbias)
            for (int64_t j = 0; j < cols; ++j) {
              float sum = 0.f;
              for (int64_t i = 0; i < rows; ++i) sum += g(i, j);
              dbias_parts[task * plan.chunk + begin + j] += sum;
            }
          products.round_gradient(g, cols, scratch);
          if (need_dq) products.add_dq(begin, cols, scratch, &dq[row0 * p.D], p.D);
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
          dscale_parts[task] +=
              finish_row(dk, p.k, chunk + begin + j, &sums[j * p.D], p.scale, !need_dq, key);
      }
    });
    if (dbias)
      for (int64_t task = 0; task < plan.tasks; ++task)
        for (int64_t j = 0; j < chunk_cols; ++j)
          dbias[chunk + j] += dbias_parts[task * plan.chunk + j];
  }
  for (double part : dscale_parts) dscale += part;
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

Tensor unit_stride(const Tensor& t) {
  return t.stride(1) == 1 || t.size(1) <= 1 ? t : torch::stable::contiguous(t);
}

std::tuple<Tensor, Tensor, Tensor> contrastive_fwd(Tensor q, Tensor k, Tensor scale,
                                                   OptTensor q_ids, OptTensor k_ids, OptTensor bias,
                                                   OptTensor target, bool rows, bool cols,
                                                   bool symmetric) {
  q = unit_stride(q);
  k = unit_stride(k);
  const Problem p(q, k, scale, q_ids, k_ids, bias, target, symmetric);
  Tensor row_lse = torch::stable::new_empty(scale, {rows ? p.N : 0});
  Tensor col_lse = torch::stable::new_empty(scale, {cols ? p.M : 0});
  Tensor pos = torch::stable::new_empty(scale, {target ? p.N : 0});
  with_products(q.scalar_type(), [&]<class Products>() {
    forward<Products>(p, rows, cols, static_cast<float*>(row_lse.mutable_data_ptr()),
                      static_cast<float*>(col_lse.mutable_data_ptr()),
                      target ? static_cast<float*>(pos.mutable_data_ptr()) : nullptr);
  });
  return {row_lse, col_lse, pos};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_bwd(
    Tensor q, Tensor k, Tensor scale, OptTensor q_ids, OptTensor k_ids, OptTensor bias,
    OptTensor target, Tensor row_lse, Tensor col_lse, Tensor drow, Tensor dcol, Tensor dpos,
    bool symmetric, bool need_dq, bool need_dk) {
  q = unit_stride(q);
  k = unit_stride(k);
  const Problem p(q, k, scale, q_ids, k_ids, bias, target, symmetric);
  const int64_t padded = round_up(p.M, kStrip) + kMaxCols;
  const Direction row(p.N, p.N, row_lse, drow);
  const Direction col = symmetric ? Direction(p.N, padded, row_lse, drow)
                                  : Direction(p.M, padded, col_lse, dcol);
  Tensor dq = torch::stable::new_empty(q, {need_dq ? p.N : 0, p.D});
  Tensor dk = torch::stable::new_empty(k, {need_dk ? p.M : 0, p.D});
  Tensor dbias = torch::stable::new_zeros(scale, {bias ? p.M : 0});
  Tensor dscale = torch::stable::new_zeros(scale, {});
  std::vector<float> sums(need_dq ? p.N * p.D : 0, 0.f);
  double total = 0.0;
  with_products(q.scalar_type(), [&]<class Products>() {
    backward<Products>(p, row, col, drow.numel() > 0, symmetric || dcol.numel() > 0,
                       dpos.numel() > 0 ? floats(dpos) : nullptr, need_dk, sums, dk, total,
                       bias ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr);
  });
  if (need_dq) {
    // <q_i, (G k)_i> summed over rows is the gradient of the scale; a symmetric G counts it twice.
    const int64_t block = 64, blocks = (p.N + block - 1) / block;
    std::vector<double> parts(blocks, 0.0);
    parallel_tasks(blocks, [&](int64_t b) {
      std::vector<float> query(p.D);
      for (int64_t i = b * block; i < std::min(p.N, (b + 1) * block); ++i)
        parts[b] += finish_row(dq, q, i, &sums[i * p.D], p.scale, true, query);
    });
    for (double part : parts) total += symmetric ? 0.5 * part : part;
  }
  *static_cast<float*>(dscale.mutable_data_ptr()) = static_cast<float>(total);
  return {dq, dk, dscale, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("contrastive_fwd", TORCH_BOX(&contrastive_fwd));
  m.impl("contrastive_bwd", TORCH_BOX(&contrastive_bwd));
}

}  // namespace fastssl
