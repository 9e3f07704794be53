// Contrast with frozen keys as attention whose values are the keys: with x_ij = scale <q_i, k_j> +
// bias_j, row_lse_i = log sum_j e^x_ij and out_i = sum_j e^(x_ij - row_lse_i) k_j, in one pass.
//
// A task owns some rows and some columns; for every tile of 512 columns, packed once, it goes
// through its rows in panels: scores, then e^(x - running row maximum) in place, then one product
// onto the row's sum, which shrinks first where the maximum grew. Few rows and many columns (a
// queue) are split over columns, and the tasks' sums merged at the end in fixed order. 2U operations
// for U = 2 N M D, one exponential a pair; memory O(N D) a task. Exponents are at most 0.
// Deterministic for a given number of threads.
// Paper: online softmax arXiv:1805.02867; FlashAttention arXiv:2205.14135.
#include "tiles.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace fastssl {
namespace {

constexpr int64_t kRowsOfTask = 192;  // fewer rows a task do not repay packing the keys again

// x to e^(x - max_i) in place; per-lane sums of the rows.
FASTSSL_CLONES void exp_strip(float* x, int64_t ld, int64_t rows, const float* max, float* sum) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < kStrip; ++c) {
      const float e = exp_poly(x[i * ld + c] - max[i]);
      x[i * ld + c] = e;
      sum[i * kStrip + c] += e;
    }
}

FASTSSL_CLONES void add_row(float* x, int64_t n, float factor, const float* y) {
  for (int64_t d = 0; d < n; ++d) x[d] += factor * y[d];
}

// One task's part: rows [row0, row0 + rows) against some columns.
struct Part {
  int64_t row0, rows, col0, cols;
  std::vector<float> max, sum, out;
};

template <class Products>
void attend(const Problem& p, Part& part) {
  const int64_t tile = std::min(kMaxCols, round_up(part.cols, kStrip));
  const int64_t panel = std::min(kMaxRows, part.rows);
  part.max.assign(part.rows, kFloor);
  part.sum.assign(part.rows, 0.f);
  part.out.assign(part.rows * p.D, 0.f);
  Products products(p.D, tile, panel, tile, true);
  auto scratch = products.scratch(true);
  TileColumns columns;
  std::vector<float> lanes(kMaxRows * kStrip), sums(kMaxRows);
  for (int64_t begin = 0; begin < part.cols; begin += tile) {
    Block b{0, 0, part.col0 + begin, std::min(tile, part.cols - begin)};
    products.pack_keys(p.k, p.k0 + b.col0, 0, b.cols, true);
    columns.load(p, b);
    for (int64_t first = 0; first < part.rows; first += panel) {
      b.row0 = part.row0 + first, b.rows = std::min(panel, part.rows - first);
      products.pack_queries(p.q, p.q0 + b.row0, b.rows, false, scratch);
      const Tile x = products.scores(0, b.cols, scratch);
      std::fill_n(lanes.begin(), b.rows * kStrip, kFloor);
      for (int64_t s = 0; s < b.strips(); ++s)
        logits_strip(x.at(s), x.row, b.rows, columns.strip(p, b, s), -b.rows, lanes.data());
      float *max = &part.max[first], *sum = &part.sum[first], *out = &part.out[first * p.D];
      for (int64_t i = 0; i < b.rows; ++i) {
        const float m = *std::max_element(&lanes[i * kStrip], &lanes[i * kStrip] + kStrip);
        if (!(m > max[i])) continue;
        const float shrink = std::exp(max[i] - m);
        sum[i] *= shrink;
        scale_row(out + i * p.D, p.D, shrink);
        max[i] = m;
      }
      std::fill_n(lanes.begin(), b.rows * kStrip, 0.f);
      for (int64_t s = 0; s < b.strips(); ++s)
        exp_strip(x.at(s), x.row, b.rows, max, lanes.data());
      reduce_lanes(lanes, b.rows, sums.data());
      for (int64_t i = 0; i < b.rows; ++i) sum[i] += sums[i];
      products.round_gradient(x, b.cols, scratch);
      products.add_dq(0, b.cols, scratch, out, p.D);
    }
  }
}

// row_lse and out of the rows that `parts` cover, each with other columns.
void merge(const Problem& p, const Part* parts, int64_t count, float* row_lse, float* out) {
  for (int64_t i = 0; i < parts[0].rows; ++i) {
    const int64_t row = parts[0].row0 + i;
    float max = kFloor, sum = 0.f;
    for (int64_t c = 0; c < count; ++c) max = std::max(max, parts[c].max[i]);
    float* o = out + row * p.D;
    std::fill_n(o, p.D, 0.f);
    for (int64_t c = 0; c < count; ++c) {
      const float factor = std::exp(parts[c].max[i] - max);
      sum += factor * parts[c].sum[i];
      add_row(o, p.D, factor, &parts[c].out[i * p.D]);
    }
    row_lse[row] = max + std::log(sum);
    if (sum == 0.f) row_lse[row] = kNegInf;
    else scale_row(o, p.D, 1.f / sum);
  }
}

std::tuple<Tensor, Tensor> queue_fwd(Tensor q, Tensor k, Tensor scale, OptTensor q_ids,
                                     OptTensor k_ids, bool keep_equal, OptTensor bias,
                                     OptTensor limit, int64_t groups) {
  Problem p(q, k, scale, groups);
  p.masks(q_ids, k_ids, keep_equal, bias, limit);
  Tensor row_lse = torch::stable::new_empty(scale, {p.N * groups});
  Tensor out = torch::stable::new_empty(scale, {p.N * groups, p.D});
  for_groups(p, groups, [&](const Problem& p, int64_t) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t tasks = std::min(threads, (p.N * p.M * p.D + (1 << 19) - 1) >> 19);
    const int64_t by_rows = std::clamp<int64_t>(p.N / kRowsOfTask, 1, std::max<int64_t>(1, tasks));
    const int64_t by_cols = std::clamp<int64_t>(tasks / by_rows, 1, (p.M + kStrip - 1) / kStrip);
    const int64_t rows = (p.N + by_rows - 1) / by_rows;
    const int64_t cols = round_up((p.M + by_cols - 1) / by_cols, kStrip);
    std::vector<Part> parts;
    for (int64_t r = 0; r < p.N; r += rows)
      for (int64_t c = 0; c < p.M; c += cols)
        parts.push_back({r, std::min(rows, p.N - r), c, std::min(cols, p.M - c), {}, {}, {}});
    with_products(q.scalar_type(), [&]<class Products>() {
      parallel_tasks(parts.size(), [&](int64_t t) { attend<Products>(p, parts[t]); });
    });
    const int64_t each = (p.M + cols - 1) / cols;
    parallel_tasks(parts.size() / each, [&](int64_t r) {
      merge(p, &parts[r * each], each, fill_floats(row_lse) + p.q0, fill_floats(out) + p.q0 * p.D);
    });
  });
  return {row_lse, out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) { m.impl("queue_fwd", TORCH_BOX(&queue_fwd)); }

}  // namespace fastssl
