// Streaming log-sum-exp of x_ij = scale <q_i, k_j> + bias_j over rows and columns, and its gradient.
//
// Forward: per tile of at most 96 x 256 scores, one exponential per element serves both directions:
// E = 2^80 e^(x - tile maximum), so sums neither overflow nor lose anything that matters while they
// stay above 2^-86; a tile with a smaller sum is redone with each row's and column's own maximum.
// Backward: G_ij = drow_i e^(x_ij - row_lse_i) + dcol_j e^(x_ij - col_lse_j) from one exponential
// where the tile's lse values lie within 200 log 2 of each other, else from two; then dq = scale G k,
// dk = scale G^T q. 1U forward and 3U backward for U = 2 N M D operations (2U backward from stored
// logits); a symmetric problem (k is q) costs 0.5U and 2U. Memory O((N + M) D), never N x M unless
// the logits are stored. Deterministic for a given number of threads: tasks own fixed panels and
// merge in fixed order.
// Paper: SimCLR arXiv:2002.05709 and CLIP arXiv:2103.00020 for the loss; online softmax
// arXiv:1805.02867 for the merged sums.
#include "tiles.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace fastssl {
namespace {

constexpr int kHeadroom = 80;                // E <= 2^80: a sum over 2^47 columns still fits
constexpr float kSmallest = 1.2924697e-26f;  // 2^-86: what flushed below 2^-126 is then < 2^-30
constexpr float kRange = 200.f * kLn2;       // lse values that one offset serves: 2^(+-100)

// ---------------------------------------------------------------- loops over one strip of a tile

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
    const float o = offset[i], w = row_weight[i];
    each_logit(v, in, i, [&](int64_t c, float logit) FASTSSL_INLINE {
      v[c] = exp_poly(logit - o) * (w + col_weight[c]);
    });
  }
}

FASTSSL_CLONES void gradient_strip_exact(float* x, int64_t ld, int64_t rows, const StripInput in,
                                         bool has_rows, const float* row_lse, const float* drow,
                                         const float* col_lse, const float* dcol) {
  for (int64_t i = 0; i < rows; ++i) {
    float* v = x + i * ld;
    // Where rows have no lse their exponential could overflow: it must not be formed at all.
    each_logit(v, in, i, [&](int64_t c, float logit) FASTSSL_INLINE {
      const float by_row = has_rows ? exp_poly(logit - row_lse[i]) * drow[i] : 0.f;
      v[c] = by_row + exp_poly(logit - col_lse[c]) * dcol[c];
    });
  }
}

// G += weights of the row and of the column where the labels are equal.
FASTSSL_CLONES void add_alike(float* x, int64_t ld, int64_t rows, int64_t cols,
                              const float* row_weight, const float* col_weight,
                              const int32_t* row_labels, const int32_t* col_labels) {
  for (int64_t i = 0; i < rows; ++i) {
    float* v = x + i * ld;
    const float w = row_weight[i];
    const int32_t label = row_labels ? row_labels[i] : 0;
    for (int64_t c = 0; c < cols; ++c)
      v[c] += col_labels[c] == label ? w + col_weight[c] : 0.f;
  }
}

float lse(float max, float sum) {
  return static_cast<float>(max + std::log(std::ldexp(double(sum), -kHeadroom)));
}

// ------------------------------------------------------------------------------------ forward

struct Wanted {
  bool rows, cols, both;
};

// Maxima and sums of one tile, of rows and columns as wanted: what a task keeps between its tiles.
struct TileSums {
  TileColumns columns;
  std::vector<float> lanes, row_max, row_sum, col_max, col_sum;
  TileSums()
      : lanes(kMaxRows * kStrip), row_max(kMaxRows), row_sum(kMaxRows), col_max(kMaxCols),
        col_sum(kMaxCols) {}

  void operator()(const Problem& p, const Block& b, const Tile& x, const Wanted& want,
                  float* logits) {
    const bool triangle = p.symmetric && b.col0 < b.row0 + b.rows;
    columns.load(p, b);
    std::fill_n(lanes.begin(), b.rows * kStrip, kFloor);
    for (int64_t s = 0; s < b.strips(); ++s)
      logits_strip(x.at(s), x.row, b.rows, columns.strip(p, b, s),
                   triangle ? b.row0 + 1 - (b.col0 + s * kStrip) : -b.rows, lanes.data());
    if (logits) store(p, b, x, logits);
    float tile_max = kFloor;
    for (int64_t i = 0; i < b.rows; ++i) {
      row_max[i] = *std::max_element(&lanes[i * kStrip], &lanes[i * kStrip] + kStrip);
      tile_max = std::max(tile_max, row_max[i]);
    }
    if (want.both && window(b, x, tile_max)) return;
    if (want.rows) {
      std::fill_n(lanes.begin(), b.rows * kStrip, 0.f);
      for (int64_t s = 0; s < b.strips(); ++s)
        rows_strip(x.at(s), x.row, b.rows, row_max.data(), lanes.data());
      reduce_lanes(lanes, b.rows, row_sum.data());
    }
    if (want.cols)
      for (int64_t s = 0; s < b.strips(); ++s)
        cols_strip(x.at(s), x.row, b.rows, &col_max[s * kStrip], &col_sum[s * kStrip]);
  }

 private:
  // Both directions from one exponential; false where a sum came out too small to trust.
  bool window(const Block& b, const Tile& x, float tile_max) {
    std::fill_n(lanes.begin(), b.rows * kStrip, 0.f);
    for (int64_t s = 0; s < b.strips(); ++s)
      window_strip(x.at(s), x.row, b.rows, tile_max, lanes.data(), &col_sum[s * kStrip]);
    reduce_lanes(lanes, b.rows, row_sum.data());
    for (int64_t i = 0; i < b.rows; ++i)
      if (!(row_sum[i] >= kSmallest)) return false;
    for (int64_t j = 0; j < b.cols; ++j)
      if (!(col_sum[j] >= kSmallest)) return false;
    std::fill_n(row_max.begin(), b.rows, tile_max);
    std::fill_n(col_max.begin(), b.cols, tile_max);
    return true;
  }
  static void store(const Problem& p, const Block& b, const Tile& x, float* logits) {
    for (int64_t s = 0; s < b.strips(); ++s)
      for (int64_t i = 0; i < b.rows; ++i)
        std::copy_n(x.at(s) + i * x.row, std::min(kStrip, b.cols - s * kStrip),
                    logits + (b.row0 + i) * p.M + b.col0 + s * kStrip);
  }
};

// Logits of the positives that lie in this tile, from its raw products.
void gather_positives(const Problem& p, const Block& b, const Tile& x, float* pos) {
  for (int64_t i = 0; i < b.rows; ++i) {
    const int64_t j = p.target[b.row0 + i] - b.col0;
    if (j >= 0 && j < b.cols && !(p.symmetric && b.col0 + j < b.row0 + i))
      pos[b.row0 + i] = x(i, j) * p.scale + (p.bias ? p.bias[b.col0 + j] : 0.f);
  }
  if (!p.symmetric) return;
  for (int64_t j = 0; j < b.cols; ++j) {  // the positive below the diagonal is the one above it
    const int64_t i = p.target[b.col0 + j] - b.row0;
    if (i >= 0 && i < b.rows && b.row0 + i < b.col0 + j) pos[b.col0 + j] = x(i, j) * p.scale;
  }
}

template <class Products>
void forward(const Problem& p, bool rows, bool cols, float* row_lse, float* col_lse, float* pos,
             float* logits) {
  const Plan plan(p.N, p.M, p.D);
  const Wanted want{rows || p.symmetric, cols || p.symmetric, (rows && cols) || p.symmetric};
  Products products(p.D, plan.chunk, plan.panel, plan.tile, false);
  std::vector<float> row_max(p.N, kFloor), row_sum(p.N, 0.f);
  const int64_t col_state = want.cols ? p.M : 0;
  std::vector<float> col_max(plan.tasks * col_state, kFloor), col_sum(plan.tasks * col_state, 0.f);

  for (int64_t chunk = 0; chunk < p.M; chunk += plan.chunk) {
    const int64_t chunk_cols = std::min(plan.chunk, p.M - chunk);
    const int64_t tiles = (chunk_cols + plan.tile - 1) / plan.tile;
    parallel_tasks(tiles, [&](int64_t t) {
      products.pack_keys(p.k, p.k0 + chunk, t * plan.tile,
                         std::min(chunk_cols, (t + 1) * plan.tile), false);
    });
    parallel_tasks(plan.tasks, [&](int64_t task) {
      auto scratch = products.scratch(false);
      TileSums sums;
      for (int64_t panel = task; panel < plan.panels; panel += plan.tasks) {
        Block b{panel * plan.panel, 0, 0, 0};
        b.rows = std::min(plan.panel, p.N - b.row0);
        if (p.symmetric && chunk + chunk_cols <= b.row0) continue;
        products.pack_queries(p.q, p.q0 + b.row0, b.rows, false, scratch);
        for (int64_t begin = 0; begin < chunk_cols; begin += plan.tile) {
          b.cols = std::min(plan.tile, chunk_cols - begin), b.col0 = chunk + begin;
          if (p.symmetric && b.col0 + b.cols <= b.row0) continue;
          const Tile x = products.scores(begin, b.cols, scratch);
          each_part(x, b, [&](const Tile& x, const Block& b) {
            if (p.symmetric && b.col0 + b.cols <= b.row0) return;
            if (pos) gather_positives(p, b, x, pos);
            if (!want.rows && !want.cols && !logits) return;
            sums(p, b, x, want, logits);
            if (want.rows)
              merge(&row_max[b.row0], &row_sum[b.row0], sums.row_max.data(), sums.row_sum.data(),
                    b.rows);
            if (want.cols)
              merge(&col_max[task * p.M + b.col0], &col_sum[task * p.M + b.col0],
                    sums.col_max.data(), sums.col_sum.data(), b.cols);
          });
        }
      }
    });
  }
  for (int64_t task = 1; task < plan.tasks && col_state; ++task)
    merge(col_max.data(), col_sum.data(), &col_max[task * p.M], &col_sum[task * p.M], p.M);
  if (p.symmetric) merge(row_max.data(), row_sum.data(), col_max.data(), col_sum.data(), p.N);
  if (rows)
    for (int64_t i = 0; i < p.N; ++i) row_lse[i] = lse(row_max[i], row_sum[i]);
  if (cols)
    for (int64_t j = 0; j < p.M; ++j) col_lse[j] = lse(col_max[j], col_sum[j]);
}

// ----------------------------------------------------------------------------------- backward

// lse and upstream gradient of one direction; rows without any pair weigh nothing.
struct Direction {
  bool given;
  std::vector<float> lse, weight;
  Direction(int64_t first, int64_t n, int64_t padded, const Tensor& saved, const Tensor& d)
      : given(d.numel() > 0), lse(padded, 0.f), weight(padded, 0.f) {
    for (int64_t i = 0; given && i < n; ++i)
      if (floats(saved)[first + i] != kNegInf) {
        lse[i] = floats(saved)[first + i];
        weight[i] = floats(d)[first + i];
      }
  }
  std::pair<float, float> range(int64_t begin, int64_t n) const {
    const auto [lo, hi] = std::minmax_element(lse.begin() + begin, lse.begin() + begin + n);
    return {*lo, *hi};
  }
};

// Upstream gradients of the sums over pairs of equal labels, or of all pairs.
struct Alike {
  bool given, labels;
  std::vector<float> row_weight, col_weight;
  std::vector<int32_t> row_labels, col_labels;
  Alike(const Problem& p, int64_t padded, const OptTensor& q_labels, const OptTensor& k_labels,
        const Tensor& drow, const Tensor& dcol)
      : given(drow.numel() || dcol.numel()), labels(q_labels), row_weight(p.N, 0.f),
        col_weight(padded, 0.f), row_labels(p.N, 0), col_labels(padded, 0) {
    if (drow.numel()) std::copy_n(floats(drow) + p.q0, p.N, row_weight.begin());
    if (dcol.numel()) std::copy_n(floats(dcol) + p.k0, p.M, col_weight.begin());
    if (p.symmetric) std::copy_n(row_weight.begin(), p.N, col_weight.begin());
    if (!labels) return;
    std::copy_n(ids(q_labels) + p.q0, p.N, row_labels.begin());
    std::copy_n(ids(k_labels) + p.k0, p.M, col_labels.begin());
  }
};

// Turns a tile of raw products, or of stored logits, into G; one object a task.
struct TileGradient {
  const Problem& p;
  const Direction &row, &col;
  const Alike& alike;
  const float *dpos, *logits;
  TileColumns columns;
  std::vector<float> offset, row_weight, col_weight, dbias;

  TileGradient(const Problem& p, const Direction& row, const Direction& col, const Alike& alike,
               const float* dpos, const float* logits, bool need_dbias)
      : p(p), row(row), col(col), alike(alike), dpos(dpos), logits(logits), offset(kMaxRows),
        row_weight(kMaxRows), col_weight(kMaxCols), dbias(need_dbias ? p.M : 0) {}

  void operator()(const Tile& g, const Block& b) {
    columns.load(p, b);
    if (logits) load_logits(g, b);
    const bool one = one_exponential(b), none = !row.given && !col.given;
    for (int64_t s = 0; s < b.strips(); ++s) {
      if (none) {  // no exponential at all: without a log-sum-exp it could overflow
        for (int64_t i = 0; i < b.rows; ++i) std::fill_n(g.at(s) + i * g.row, kStrip, 0.f);
        continue;
      }
      StripInput in = columns.strip(p, b, s);
      if (logits) in = {1.f, kZeros, nullptr, nullptr, nullptr, false};
      if (one)
        gradient_strip(g.at(s), g.row, b.rows, in, offset.data(), row_weight.data(),
                       &col_weight[s * kStrip]);
      else
        gradient_strip_exact(g.at(s), g.row, b.rows, in, row.given, &row.lse[b.row0],
                             &row.weight[b.row0], &col.lse[b.col0 + s * kStrip],
                             &col.weight[b.col0 + s * kStrip]);
    }
    if (alike.given)
      for (int64_t s = 0; s < b.strips(); ++s) {
        const int64_t j = b.col0 + s * kStrip;
        add_alike(g.at(s), g.row, b.rows, std::min(kStrip, b.cols - s * kStrip),
                  &alike.row_weight[b.row0], &alike.col_weight[j],
                  alike.labels ? &alike.row_labels[b.row0] : nullptr, &alike.col_labels[j]);
      }
    if (p.symmetric)
      for (int64_t i = std::max<int64_t>(0, b.col0 - b.row0);
           i < std::min(b.rows, b.col0 + b.cols - b.row0); ++i)
        g(i, b.row0 + i - b.col0) = 0.f;
    if (dpos) add_positives(g, b);
    for (size_t j = 0; !dbias.empty() && j < static_cast<size_t>(b.cols); ++j) {
      float sum = 0.f;
      for (int64_t i = 0; i < b.rows; ++i) sum += g(i, j);
      dbias[b.col0 + j] += sum;
    }
  }

 private:
  static constexpr float kZeros[kStrip] = {};

  // The weights of one exponential a pair, if one offset serves the whole tile.
  bool one_exponential(const Block& b) {
    if (!col.given) {  // offsets by row need no window
      std::copy_n(&row.lse[b.row0], b.rows, offset.begin());
      std::copy_n(&row.weight[b.row0], b.rows, row_weight.begin());
      std::fill(col_weight.begin(), col_weight.end(), 0.f);
      return true;
    }
    if (!row.given) return false;
    const auto [row_lo, row_hi] = row.range(b.row0, b.rows);
    const auto [col_lo, col_hi] = col.range(b.col0, b.cols);
    const float lo = std::min(row_lo, col_lo), hi = std::max(row_hi, col_hi);
    if (!(hi - lo <= kRange)) return false;
    const float K = 0.5f * (lo + std::min(row_hi, col_hi));
    for (int64_t i = 0; i < b.rows; ++i) {
      offset[i] = K;
      row_weight[i] = row.weight[b.row0 + i] * std::exp(K - row.lse[b.row0 + i]);
    }
    for (int64_t j = 0; j < b.cols; ++j)
      col_weight[j] = col.weight[b.col0 + j] * std::exp(K - col.lse[b.col0 + j]);
    std::fill(col_weight.begin() + b.cols, col_weight.begin() + b.strips() * kStrip, 0.f);
    const auto finite = [](float w) { return std::isfinite(w); };  // huge upstream gradients are not
    return std::all_of(row_weight.begin(), row_weight.begin() + b.rows, finite) &&
           std::all_of(col_weight.begin(), col_weight.begin() + b.cols, finite);
  }
  void load_logits(const Tile& g, const Block& b) const {
    for (int64_t s = 0; s < b.strips(); ++s)
      for (int64_t i = 0; i < b.rows; ++i) {
        const int64_t count = std::min(kStrip, b.cols - s * kStrip);
        float* out = g.at(s) + i * g.row;
        std::copy_n(logits + (b.row0 + i) * p.M + b.col0 + s * kStrip, count, out);
        std::fill(out + count, out + kStrip, kNegInf);
      }
  }
  void add_positives(const Tile& g, const Block& b) const {
    for (int64_t i = 0; i < b.rows; ++i) {
      const int64_t j = p.target[b.row0 + i] - b.col0;
      if (j >= 0 && j < b.cols) g(i, j) += dpos[b.row0 + i];
    }
    for (int64_t j = 0; p.symmetric && j < b.cols; ++j) {
      const int64_t i = p.target[b.col0 + j] - b.row0;
      if (i >= 0 && i < b.rows) g(i, j) += dpos[b.col0 + j];
    }
  }
};

// ----------------------------------------------------------------------------------------- ops

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_fwd(
    Tensor q, Tensor k, Tensor scale, OptTensor q_ids, OptTensor k_ids, bool keep_equal,
    OptTensor bias, OptTensor limit, OptTensor target, bool rows, bool cols, bool symmetric,
    int64_t groups, bool store) {
  Problem p(q, k, scale, groups);
  p.masks(q_ids, k_ids, keep_equal, bias, limit);
  p.targets(target, true);
  p.symmetric = symmetric;
  Tensor row_lse = torch::stable::new_empty(scale, {rows ? p.N * groups : 0});
  Tensor col_lse = torch::stable::new_empty(scale, {cols ? p.M * groups : 0});
  Tensor pos = torch::stable::new_empty(scale, {target ? p.N * groups : 0});
  Tensor logits = torch::stable::new_empty(scale, {store ? p.N * groups : 0, store ? p.M : 0});
  for_groups(p, groups, [&](const Problem& p, int64_t) {
    with_products(q.scalar_type(), [&]<class Products>() {
      forward<Products>(p, rows, cols, fill_floats(row_lse) + p.q0, fill_floats(col_lse) + p.k0,
                        target ? fill_floats(pos) + p.q0 : nullptr,
                        store ? fill_floats(logits) + p.q0 * p.M : nullptr);
    });
  });
  return {row_lse, col_lse, pos, logits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_bwd(
    Tensor q, Tensor k, Tensor scale, OptTensor q_ids, OptTensor k_ids, bool keep_equal,
    OptTensor bias, OptTensor limit, OptTensor target, OptTensor q_labels, OptTensor k_labels,
    Tensor logits, Tensor row_lse, Tensor col_lse, Tensor drow, Tensor dcol, Tensor dpos,
    Tensor drow_alike, Tensor dcol_alike, bool symmetric, int64_t groups, bool need_dq,
    bool need_dk, bool need_dbias, bool wide) {
  Problem p(q, k, scale, groups);
  p.masks(q_ids, k_ids, keep_equal, bias, limit);
  p.targets(target, true);
  p.symmetric = symmetric;
  for (const auto& [name, d, lse, n] :
       {std::tuple<const char*, const Tensor&, const Tensor&, int64_t>
        {"drow", drow, row_lse, p.N * groups}, {"dcol", dcol, col_lse, p.M * groups},
        {"dpos", dpos, dpos, p.N * groups}})
    if (d.numel()) {
      check_vector(name, d, n, ScalarType::Float);
      check_vector(name, lse, n, ScalarType::Float);
    }
  STD_TORCH_CHECK(!dpos.numel() || target, "contrastive: dpos needs a target");
  if (drow_alike.numel())
    check_vector("drow_alike", drow_alike, p.N * groups, ScalarType::Float);
  if (dcol_alike.numel())
    check_vector("dcol_alike", dcol_alike, p.M * groups, ScalarType::Float);
  if (q_labels || k_labels) {
    STD_TORCH_CHECK(q_labels && k_labels, "contrastive: q_labels and k_labels go together");
    check_vector("q_labels", *q_labels, p.N * groups, ScalarType::Int);
    check_vector("k_labels", *k_labels, p.M * groups, ScalarType::Int);
  }
  if (logits.numel()) check_vector("logits", logits, p.N * groups * p.M, ScalarType::Float);
  const Tensor& like = wide ? scale : q;
  Tensor dq = torch::stable::new_empty(like, {need_dq ? p.N * groups : 0, p.D});
  Tensor dk = torch::stable::new_empty(like, {need_dk ? p.M * groups : 0, p.D});
  Tensor dbias = torch::stable::new_empty(scale, {need_dbias ? p.M * groups : 0});
  Tensor dscale = torch::stable::new_empty(scale, {});
  std::vector<double> totals(groups);
  for_groups(p, groups, [&](const Problem& p, int64_t g) {
    const Plan plan(p.N, p.M, p.D);
    const int64_t padded = round_up(p.M, kStrip) + kMaxCols;
    const Direction row(p.q0, p.N, p.N, row_lse, drow);
    const Direction col = symmetric ? Direction(p.q0, p.N, padded, row_lse, drow)
                                    : Direction(p.k0, p.M, padded, col_lse, dcol);
    const Alike alike(p, padded, q_labels, k_labels, drow_alike, dcol_alike);
    const bool stored = logits.numel() > 0;
    std::vector<TileGradient> tasks(
        plan.tasks, TileGradient(p, row, col, alike, dpos.numel() ? floats(dpos) + p.q0 : nullptr,
                                 stored ? floats(logits) + p.q0 * p.M : nullptr, need_dbias));
    totals[g] = with_products(q.scalar_type(), [&]<class Products>() {
      return gradients<Products>(
          p, plan, need_dq, dq, need_dk, dk, stored,
          [&](int64_t task, const Tile& g, const Block& b) { tasks[task](g, b); });
    });
    for (int64_t j = 0; need_dbias && j < p.M; ++j) {
      float sum = 0.f;
      for (const auto& task : tasks) sum += task.dbias[j];
      fill_floats(dbias)[p.k0 + j] = sum;
    }
  });
  double total = 0.0;
  for (double part : totals) total += part;
  *fill_floats(dscale) = static_cast<float>(total);
  return {dq, dk, dscale, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("contrastive_fwd", TORCH_BOX(&contrastive_fwd));
  m.impl("contrastive_bwd", TORCH_BOX(&contrastive_bwd));
}

}  // namespace fastssl
