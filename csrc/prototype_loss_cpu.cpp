// Cross-entropy of softmax(x_tb), x = scale s + bias the teachers' logits, with softmax(y_sb), the
// students': loss_sb = sum_t [LSE_k(y_sb) - sum_k q_tbk y_sbk] over the teachers t that student s is
// compared with, and dy_sb = n_s softmax(y_sb) - sum_t q_tb.
//
// A task owns rows b. It goes through their columns in blocks that fit the first cache: the block's
// teacher weights q once (their normaliser took a first pass over the teachers' rows), then the
// block of every student, so each student is read once, from memory, for all teachers. One
// exponential for a student's element, forward and backward, three for a teacher's.
// Exponents are differences to maxima, which the forward keeps up to date by rescaling, so nothing
// overflows; y enters the product as a difference to a value near its maximum, so nothing cancels.
// Sums are fp32 in a block and fp64 across: no result depends on the number of threads.
// Papers: DINO arXiv:2104.14294, SwAV arXiv:2006.09882, iBOT arXiv:2111.07832.
#include "rows.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

namespace fastssl {
namespace {

constexpr int64_t kColumns = 4096;

// sum += sum_k e^(y_k - max), dot += sum_k q_k (y_k - shift). Where a teacher has no weight a score
// of -inf counts nothing.
template <bool kWeighted>
FASTSSL_INLINE inline void add_block(const float* y, const float* q, int64_t n, float max,
                                     float shift, const Ahead& next, double* sum, double* dot) {
  float e[kLanes] = {}, d[kLanes] = {};
  for (int64_t k = 0; k < n; k += kLanes) {
    next.fetch(k);
    for (int64_t c = 0; c < kLanes; ++c) {
      e[c] += exp_poly(y[k + c] - max);
      if (kWeighted) d[c] += q[k + c] == 0.f ? 0.f : q[k + c] * (y[k + c] - shift);
    }
  }
  for (int64_t c = 0; c < kLanes; ++c) *sum += e[c], *dot += d[c];
}
FASTSSL_CLONES void add_exponentials(const float* y, int64_t n, float max, const Ahead& next,
                                     double* sum) {
  double dot = 0.0;
  add_block<false>(y, nullptr, n, max, 0.f, next, sum, &dot);
}
FASTSSL_CLONES void add_weighted(const float* y, const float* q, int64_t n, float max, float shift,
                                 const Ahead& next, double* sum, double* dot) {
  add_block<true>(y, q, n, max, shift, next, sum, dot);
}
FASTSSL_CLONES void to_weights(float* x, int64_t n, float max, float log_sum, const Ahead& next) {
  for (int64_t k = 0; k < n; k += kLanes) {
    next.fetch(k);
    for (int64_t c = 0; c < kLanes; ++c) x[k + c] = exp_poly(x[k + c] - max - log_sum);
  }
}
FASTSSL_CLONES void add(float* sum, const float* x, int64_t n) {
  for (int64_t k = 0; k < n; k += kLanes)
    for (int64_t c = 0; c < kLanes; ++c) sum[k + c] += x[k + c];
}

// y_k = factor (pairs e^(y_k - max - log_sum) - q_k).
FASTSSL_CLONES void to_gradient(float* y, const float* q, int64_t n, float max, float log_sum,
                                float pairs, float factor, const Ahead& next) {
  for (int64_t k = 0; k < n; k += kLanes) {
    next.fetch(k);
    for (int64_t c = 0; c < kLanes; ++c)
      y[k + c] = factor * (pairs * exp_poly(y[k + c] - max - log_sum) - q[k + c]);
  }
}
FASTSSL_CLONES void store_bf16(uint16_t* out, const float* x, int64_t n) {
  for (int64_t k = 0; k < n; ++k) out[k] = static_cast<uint16_t>(bf16_bits(x[k]));
}
FASTSSL_CLONES void store_fp16(uint16_t* out, const float* x, int64_t n) {
  for (int64_t k = 0; k < n; ++k) out[k] = half_bits(x[k]);
}
// n numbers from element `at` of t on, rounded once.
void store(const Tensor& t, int64_t at, const float* x, int64_t n) {
  if (t.scalar_type() == ScalarType::Float)
    return void(std::copy_n(x, n, static_cast<float*>(t.mutable_data_ptr()) + at));
  uint16_t* out = static_cast<uint16_t*>(t.mutable_data_ptr()) + at;
  if (t.scalar_type() == ScalarType::Half) store_fp16(out, x, n);
  else store_bf16(out, x, n);
}

// Scores (crops, B, K) read as logits.
struct Crops {
  Tensor t;
  int64_t n, B, K;
  float scale;
  const float* bias = nullptr;  // (n, K) or one row for all
  int64_t bias_stride = 0;

  Crops(const char* name, const Tensor& scores, double scale)
      : t(scores.stride(2) == 1 || scores.size(2) == 1 ? scores : torch::stable::contiguous(scores)),
        n(scores.size(0)), B(scores.size(1)), K(scores.size(2)), scale(static_cast<float>(scale)) {
    check_scores(name, scores);
  }
  // Logits of columns [k, k + width) of crop i of row b; returns the largest.
  float read(int64_t i, int64_t b, int64_t k, int64_t width, float* x) const {
    const float* some = bias ? bias + i * bias_stride + k : nullptr;
    return logits_of(t, at(i, b, k), width, scale, some, x);
  }
  int64_t at(int64_t i, int64_t b, int64_t k) const {
    return i * t.stride(0) + b * t.stride(1) + k;
  }
};

struct Problem {
  Crops student, teacher;
  bool ignore_diagonal;

  Problem(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& bias,
          double student_scale, double teacher_scale, bool ignore_diagonal)
      : student("prototype_loss: student", student, student_scale),
        teacher("prototype_loss: teacher", teacher, teacher_scale),
        ignore_diagonal(ignore_diagonal) {
    STD_TORCH_CHECK(teacher.size(1) == B() && teacher.size(2) == K(),
                    "prototype_loss: student and teacher must have one B and K");
    if (!bias) return;
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float && bias->dim() == 2 &&
                        bias->size(0) == T() && bias->size(1) == K() &&
                        (bias->stride(1) == 1 || K() == 1),
                    "prototype_loss: bias must be float32 with rows of ", K(), " elements");
    this->teacher.bias = static_cast<const float*>(bias->const_data_ptr());
    this->teacher.bias_stride = bias->stride(0);
  }
  int64_t S() const { return student.n; }
  int64_t T() const { return teacher.n; }
  int64_t B() const { return student.B; }
  int64_t K() const { return student.K; }
  // Of a block, filled up to whole lanes.
  int64_t columns() const { return std::min(kColumns, (K() + kLanes - 1) / kLanes * kLanes); }
  // The teacher that student s is not compared with, or T.
  int64_t left_out(int64_t s) const { return ignore_diagonal ? std::min(s, T()) : T(); }
  int64_t pairs(int64_t s) const { return T() - (left_out(s) < T()); }
  // What is read after the block k of teacher t of row b, or of student s: that of the next crop,
  // at last the first teacher's next block.
  Ahead after_teacher(int64_t t, int64_t b, int64_t k) const {
    return t + 1 < T() ? Ahead(teacher.t, teacher.at(t + 1, b, k))
                       : Ahead(student.t, student.at(0, b, k));
  }
  Ahead after_student(int64_t s, int64_t b, int64_t k) const {
    return s + 1 < S() ? Ahead(student.t, student.at(s + 1, b, k))
                       : Ahead(teacher.t, teacher.at(0, b, std::min(k + kColumns, K() - 1)));
  }
  template <class F>
  void each_row(const F& f) const {
    const int64_t work = (S() + T()) * B() * K(), threads = torch::stable::get_num_threads();
    const int64_t tasks = std::max<int64_t>(1, std::min({threads, B(), work >> 14}));
    parallel_tasks(tasks, [&](int64_t task) {
      for (int64_t b = B() * task / tasks; b < B() * (task + 1) / tasks; ++b) f(b);
    });
  }
};

// A maximum of what came so far, and the sum of e^(x - max).
struct Online {
  float max = kFloor, shift = 0.f;
  double sum = 0.0, dot = 0.0;

  void take(const float* x, const float* q, int64_t n, float top, const Ahead& next) {
    if (max == kFloor && top != kFloor) shift = top;
    if (top > max) {
      sum *= std::exp(double(max) - top);
      max = top;
    }
    if (q) add_weighted(x, q, n, max, shift, next, &sum, &dot);
    else add_exponentials(x, n, max, next, &sum);
  }
};

// Maxima and logarithms of sums of e^(x - max): (2, crops, B).
template <class Float>
struct Statistics {
  Float* data;
  int64_t n, B;

  Float& max(int64_t i, int64_t b) const { return data[i * B + b]; }
  Float& log_sum(int64_t i, int64_t b) const { return data[(n + i) * B + b]; }
};

// The teachers' weights in a block of columns.
class Weights {
 public:
  explicit Weights(const Problem& p) : p_(p), q_(p.T() * p.columns()), sum_(p.columns()) {}

  template <class Float>
  void read(int64_t b, int64_t k, int64_t width, const Statistics<Float>& stats) {
    width_ = width, summed_ = -1;
    for (int64_t t = 0; t < p_.T(); ++t) {
      p_.teacher.read(t, b, k, width, row(t));
      to_weights(row(t), width, stats.max(t, b), stats.log_sum(t, b), p_.after_teacher(t, b, k));
    }
  }
  // Summed over the teachers of student s, which has at least one.
  const float* of(int64_t s) {
    const int64_t out = p_.left_out(s);
    if (p_.pairs(s) == 1) return row(out == 0);
    if (out == summed_) return sum_.data();  // the students that have all teachers share one
    summed_ = out;
    std::fill(sum_.begin(), sum_.end(), 0.f);
    for (int64_t t = 0; t < p_.T(); ++t)
      if (t != out) add(sum_.data(), row(t), width_);
    return sum_.data();
  }

 private:
  float* row(int64_t t) { return &q_[t * p_.columns()]; }

  const Problem& p_;
  std::vector<float> q_, sum_;
  int64_t width_ = 0, summed_ = -1;
};

std::tuple<Tensor, Tensor, Tensor> prototype_loss_fwd(Tensor student, Tensor teacher,
                                                      std::optional<Tensor> bias,
                                                      double student_scale, double teacher_scale,
                                                      bool ignore_diagonal) {
  const Problem p(student, teacher, bias, student_scale, teacher_scale, ignore_diagonal);
  const int64_t S = p.S(), T = p.T(), B = p.B(), K = p.K();
  Tensor loss = torch::stable::new_empty(student, {S, B}, ScalarType::Float);
  Tensor student_stats = torch::stable::new_empty(student, {2, S, B}, ScalarType::Float);
  Tensor teacher_stats = torch::stable::new_empty(student, {2, T, B}, ScalarType::Float);
  float* losses = static_cast<float*>(loss.mutable_data_ptr());
  const Statistics<float> of_student{static_cast<float*>(student_stats.mutable_data_ptr()), S, B};
  const Statistics<float> of_teacher{static_cast<float*>(teacher_stats.mutable_data_ptr()), T, B};
  p.each_row([&](int64_t b) {
    std::vector<float> x(p.columns());
    for (int64_t t = 0; t < T; ++t) {
      Online row;
      for (int64_t k = 0; k < K; k += kColumns) {
        const int64_t width = std::min(kColumns, K - k);
        const float top = p.teacher.read(t, b, k, width, x.data());
        const int64_t next = std::min(k + kColumns, K - 1);
        row.take(x.data(), nullptr, width, top, Ahead(p.teacher.t, p.teacher.at(t, b, next)));
      }
      of_teacher.max(t, b) = row.max;
      of_teacher.log_sum(t, b) = static_cast<float>(std::log(row.sum));
    }
    Weights weights(p);
    std::vector<Online> rows(S);
    for (int64_t k = 0; k < K; k += kColumns) {
      const int64_t width = std::min(kColumns, K - k);
      weights.read(b, k, width, of_teacher);
      for (int64_t s = 0; s < S; ++s) {
        const float top = p.student.read(s, b, k, width, x.data());
        rows[s].take(x.data(), p.pairs(s) ? weights.of(s) : nullptr, width, top,
                     p.after_student(s, b, k));
      }
    }
    for (int64_t s = 0; s < S; ++s) {
      const Online& row = rows[s];
      const double log_sum = std::log(row.sum), lse = double(row.max) - row.shift + log_sum;
      of_student.max(s, b) = row.max;
      of_student.log_sum(s, b) = static_cast<float>(log_sum);
      losses[s * B + b] = p.pairs(s) ? static_cast<float>(p.pairs(s) * lse - row.dot) : 0.f;
    }
  });
  return {loss, student_stats, teacher_stats};
}

// dstudent (S, B, K), contiguous; it may be the student: each block is read before it is written.
void fill_dstudent(const Problem& p, const Tensor& student_stats, const Tensor& teacher_stats,
                   const Tensor& dloss, const Tensor& dstudent) {
  const int64_t S = p.S(), T = p.T(), B = p.B(), K = p.K();
  for (const auto& [t, n] : {std::tuple<const Tensor&, int64_t>{student_stats, 2 * S * B},
                             {teacher_stats, 2 * T * B}, {dloss, S * B}})
    STD_TORCH_CHECK(t.numel() == n && t.scalar_type() == ScalarType::Float && t.is_contiguous(),
                    "prototype_loss_bwd: expected ", n, " contiguous float32 numbers, got ",
                    t.numel());
  const auto statistics = [B](const Tensor& t, int64_t n) {
    return Statistics<const float>{static_cast<const float*>(t.const_data_ptr()), n, B};
  };
  const auto of_student = statistics(student_stats, S), of_teacher = statistics(teacher_stats, T);
  const float* upstream = static_cast<const float*>(dloss.const_data_ptr());
  p.each_row([&](int64_t b) {
    std::vector<float> y(p.columns());
    Weights weights(p);
    for (int64_t k = 0; k < K; k += kColumns) {
      const int64_t width = std::min(kColumns, K - k);
      weights.read(b, k, width, of_teacher);
      for (int64_t s = 0; s < S; ++s) {
        if (p.pairs(s)) {
          p.student.read(s, b, k, width, y.data());
          to_gradient(y.data(), weights.of(s), width, of_student.max(s, b),
                      of_student.log_sum(s, b), static_cast<float>(p.pairs(s)),
                      upstream[s * B + b] * p.student.scale, p.after_student(s, b, k));
        } else {
          std::fill(y.begin(), y.end(), 0.f);
        }
        store(dstudent, (s * B + b) * K + k, y.data(), width);
      }
    }
  });
}

Tensor prototype_loss_bwd(Tensor student, Tensor teacher, std::optional<Tensor> bias,
                          double student_scale, double teacher_scale, bool ignore_diagonal,
                          Tensor student_stats, Tensor teacher_stats, Tensor dloss) {
  const Problem p(student, teacher, bias, student_scale, teacher_scale, ignore_diagonal);
  Tensor dstudent = new_result(student, {p.S(), p.B(), p.K()}, student.scalar_type());
  fill_dstudent(p, student_stats, teacher_stats, dloss, dstudent);
  return dstudent;
}

void prototype_loss_bwd_(Tensor student, Tensor teacher, std::optional<Tensor> bias,
                         double student_scale, double teacher_scale, bool ignore_diagonal,
                         Tensor student_stats, Tensor teacher_stats, Tensor dloss) {
  STD_TORCH_CHECK(student.is_contiguous(), "prototype_loss_bwd_: student must be contiguous");
  const Problem p(student, teacher, bias, student_scale, teacher_scale, ignore_diagonal);
  fill_dstudent(p, student_stats, teacher_stats, dloss, student);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) {
  m.impl("prototype_loss_fwd", TORCH_BOX(&prototype_loss_fwd));
  m.impl("prototype_loss_bwd", TORCH_BOX(&prototype_loss_bwd));
  m.impl("prototype_loss_bwd_", TORCH_BOX(&prototype_loss_bwd_));
}

}  // namespace fastssl
