// Views of images from their parameters: all pixel operations while a view is in the second cache.
//
// A view is made in blocks of rows. The crop brings the rows of the image to fp32 that 16 rows of the
// view take, sums them, and then, of their transpose, columns: no gathers. Weights come from fp64,
// once a view. Mirror images cost nothing, since taps are then listed the other way round; an odd
// turn transposes the finished square. Colour operations run on a block until a contrast needs the
// mean luminance of the whole view; then another pass begins. The last one normalises and rounds
// into the result. Blurred views take one more, separable. Sums run over blocks in fixed order, so a
// view's bits depend on its image and its parameters only.
// Bytes: the crop's pixels once, the result once. Every loop keeps a NaN.
// Papers: the operations of SimCLR, arXiv:2002.05709; Philox, Salmon et al., SC 2011.
#include "augment_math.h"
#include "rows.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

namespace fastssl {
namespace {

enum Operation { kScale, kContrast, kSaturation, kHue, kGrayscale };

constexpr int64_t kBlock = 1024;  // pixels of a block of rows, at least: its planes stay in cache 1
constexpr int64_t kFewest = 1 << 14;  // elements of a task, at least
constexpr double kFarthest = 1 << 20;  // a crop's corner, so that its pixels are soon counted

struct alignas(4 * kLanes) Lanes {  // a type of its own, or std::vector would not align it
  float __attribute__((vector_size(4 * kLanes))) of;
};
using Quad = float __attribute__((vector_size(16)));

// ---------------------------------------------------------------------------------------- crop

// Which pixels of a line of the image each pixel of a line of the view takes, and how much.
struct Axis {
  std::vector<int32_t> begin, place;  // pixel i takes place[begin[i]] .. place[begin[i + 1] - 1]
  std::vector<float> weight;
  int64_t low = 0, length = 0;  // places count from pixel `low` on and are below `length`

  // Of a view of `size` pixels of [from, to); the weights of a pixel add up to `unit`.
  void build(double from, double to, int64_t size, int64_t pixels, double unit, bool bicubic,
             bool antialias, bool mirrored);
};

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Without a call of the library; exact for |x| < 2^52.
int64_t floor_of(double x) {
  const auto i = static_cast<int64_t>(x);
  return i - (static_cast<double>(i) > x);
}

void Axis::build(double from, double to, int64_t size, int64_t pixels, double unit, bool bicubic,
                 bool antialias, bool mirrored) {
  const double share = (to - from) / static_cast<double>(size);
  const double stretch = antialias ? std::max(share, 1.0) : 1.0;
  const double reach = bicubic ? 2.0 * stretch : stretch, a = antialias ? -0.5 : -0.75;
  const int64_t first = floor_of(from), last = -floor_of(-to) - 1;
  const auto most = static_cast<size_t>(size * std::min<double>(2.0 * reach + 2.0, pixels));
  if (place.size() < most) place.resize(most), weight.resize(most);
  begin.assign(size + 1, 0);
  int32_t lowest = std::numeric_limits<int32_t>::max(), highest = 0, count = 0;
  for (int64_t i = 0; i < size; ++i) {
    const double centre = from + share * (static_cast<double>(mirrored ? size - 1 - i : i) + 0.5);
    int64_t j = -floor_of(reach + 0.5 - centre), end = floor_of(centre + reach - 0.5);
    if (antialias) j = std::max(j, first), end = std::min(end, last);
    double sum = 0.0;
    const int32_t start = count;
    for (; j <= end; ++j) {
      const double w =
          filter(std::abs(static_cast<double>(j) + 0.5 - centre) / stretch, bicubic, a);
      if (w == 0.0) continue;
      sum += w;
      const auto p = static_cast<int32_t>(
          std::clamp<int64_t>(std::clamp(j, first, last), 0, pixels - 1));
      if (count > start && place[count - 1] == p) {  // an edge, repeated
        weight[count - 1] += static_cast<float>(w);
      } else {
        place[count] = p, weight[count++] = static_cast<float>(w);
      }
    }
    const auto factor = static_cast<float>(unit / sum);
    for (int32_t k = start; k < count; ++k) weight[k] *= factor;
    lowest = std::min(lowest, place[start]), highest = std::max(highest, place[count - 1]);
    begin[i + 1] = count;
  }
  // In whole vectors where the image is as wide: what is read beyond is not used.
  const int64_t span = highest - lowest + 1;
  length = std::min(round_up(span, kLanes), pixels);
  low = std::min<int64_t>(lowest, pixels - length);
  for (int32_t k = 0; k < count; ++k) place[k] -= static_cast<int32_t>(low);
}

// out (rows, ld) = x (rows, stride), n columns of each in fp32.
template <class T>
FASTSSL_INLINE inline void widen_rows(const T* x, int64_t stride, int64_t rows, int64_t n,
                                      float* __restrict out, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; ++j) out[i * ld + j] = static_cast<float>(x[i * stride + j]);
}
FASTSSL_CLONES void widen(const uint8_t* x, int64_t stride, int64_t rows, int64_t n, float* out,
                          int64_t ld) {
  widen_rows(x, stride, rows, n, out, ld);
}
FASTSSL_CLONES void widen(const float* x, int64_t stride, int64_t rows, int64_t n, float* out,
                          int64_t ld) {
  widen_rows(x, stride, rows, n, out, ld);
}

// out (rows, width): row i is the sum of weight[t] x[place[t] - first] over its taps.
FASTSSL_CLONES void combine(const Lanes* x, int64_t width, int64_t first, const int32_t* begin,
                            const int32_t* place, const float* weight, int64_t rows,
                            Lanes* __restrict out) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; ++j) {
      Lanes sum = {};
      for (int32_t t = begin[i]; t < begin[i + 1]; ++t)
        sum.of += weight[t] * x[(place[t] - first) * width + j].of;
      out[i * width + j] = sum;
    }
}

// out (columns, ld_out) = the transpose of x (rows, ld).
void transpose(const float* x, int64_t ld, int64_t rows, int64_t columns, float* out,
               int64_t ld_out) {
  const auto single = [&](int64_t i, int64_t j) { out[j * ld_out + i] = x[i * ld + j]; };
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) {
      Quad a[4];
      for (int k = 0; k < 4; ++k) std::memcpy(&a[k], x + (i + k) * ld + j, sizeof(Quad));
      const Quad b0 = __builtin_shufflevector(a[0], a[1], 0, 4, 1, 5);
      const Quad b1 = __builtin_shufflevector(a[2], a[3], 0, 4, 1, 5);
      const Quad b2 = __builtin_shufflevector(a[0], a[1], 2, 6, 3, 7);
      const Quad b3 = __builtin_shufflevector(a[2], a[3], 2, 6, 3, 7);
      a[0] = __builtin_shufflevector(b0, b1, 0, 1, 4, 5);
      a[1] = __builtin_shufflevector(b0, b1, 2, 3, 6, 7);
      a[2] = __builtin_shufflevector(b2, b3, 0, 1, 4, 5);
      a[3] = __builtin_shufflevector(b2, b3, 2, 3, 6, 7);
      for (int k = 0; k < 4; ++k) std::memcpy(out + (j + k) * ld_out + i, &a[k], sizeof(Quad));
    }
    for (; j < columns; ++j)
      for (int k = 0; k < 4; ++k) single(i + k, j);
  }
  for (; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) single(i, j);
}

// -------------------------------------------------------------------------------------- colour

// x = clamp(a x + b)
FASTSSL_CLONES void affine(float* x, int64_t n, float a, float b) {
  for (int64_t i = 0; i < n; ++i) x[i] = unit(a * x[i] + b);
}

FASTSSL_CLONES void saturate(float* __restrict r, float* __restrict g, float* __restrict b,
                             int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) {
    const float rest = (1.f - factor) * luminance(r[i], g[i], b[i]);
    r[i] = unit(factor * r[i] + rest);
    g[i] = unit(factor * g[i] + rest);
    b[i] = unit(factor * b[i] + rest);
  }
}

FASTSSL_CLONES void turn_hues(float* __restrict r, float* __restrict g, float* __restrict b,
                              int64_t n, float shift) {
  for (int64_t i = 0; i < n; ++i) turn_hue(&r[i], &g[i], &b[i], shift);
}

FASTSSL_CLONES void gray(float* __restrict r, const float* __restrict g, const float* __restrict b,
                         int64_t n) {
  for (int64_t i = 0; i < n; ++i) r[i] = luminance(r[i], g[i], b[i]);
}

// The sum of n luminances, by lanes.
FASTSSL_CLONES float sum_luminance(const float* r, const float* g, const float* b, int64_t n) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += luminance(r[i + l], g[i + l], b[i + l]);
  for (; i < n; ++i) lanes[i % kLanes] += luminance(r[i], g[i], b[i]);
  float sum = 0.f;
  for (float lane : lanes) sum += lane;
  return sum;
}
FASTSSL_CLONES float sum_plane(const float* x, int64_t n) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += x[i + l];
  for (; i < n; ++i) lanes[i % kLanes] += x[i];
  float sum = 0.f;
  for (float lane : lanes) sum += lane;
  return sum;
}

// ---------------------------------------------------------------------------- blur and the end

// out (n,) += the sum of weight[k] (before[k] + after[k]) over N distances from k on.
template <int N>
FASTSSL_INLINE inline void add_pairs(const float* const* before, const float* const* after,
                                     const float* weight, int64_t k, int64_t n,
                                     float* __restrict out) {
  const float *p[N], *q[N];
  float w[N];
  for (int i = 0; i < N; ++i) p[i] = before[k + i], q[i] = after[k + i], w[i] = weight[k + i];
  for (int64_t x = 0; x < n; ++x) {
    float s = out[x];
    for (int i = 0; i < N; ++i) s += w[i] * (p[i][x] + q[i][x]);
    out[x] = s;
  }
}
// A symmetric filter of lines: weight[0] of the middle one, weight[k] of those at distance k.
FASTSSL_CLONES void blur_line(const float* middle, const float* const* before,
                              const float* const* after, const float* weight, int64_t radius,
                              int64_t n, float* __restrict out) {
  const float w = weight[0];
  for (int64_t x = 0; x < n; ++x) out[x] = w * middle[x];
  int64_t k = 1;
  for (; k + 5 <= radius; k += 6) add_pairs<6>(before, after, weight, k, n, out);
  for (; k + 2 <= radius; k += 3) add_pairs<3>(before, after, weight, k, n, out);
  for (; k <= radius; ++k) add_pairs<1>(before, after, weight, k, n, out);
}

// Philox4x32-10: blocks of four words from `block` on, as fastssl/random.py counts them.
struct Counter {
  uint32_t index, epoch, view, stream, key[2];
};
FASTSSL_CLONES void random_words(const Counter& counter, uint32_t block, int64_t blocks,
                                 uint32_t* __restrict out) {
  for (int64_t i = 0; i < blocks; ++i) {
    uint32_t w0 = counter.index, w1 = counter.epoch;
    uint32_t w2 = counter.view | (block + static_cast<uint32_t>(i)), w3 = counter.stream;
    philox(w0, w1, w2, w3, counter.key[0], counter.key[1]);
    out[4 * i] = w0, out[4 * i + 1] = w1, out[4 * i + 2] = w2, out[4 * i + 3] = w3;
  }
}

FASTSSL_CLONES void normal_pairs(const uint32_t* __restrict u, const uint32_t* __restrict v,
                                 int64_t n, float deviation, float* __restrict x,
                                 float* __restrict y) {
  for (int64_t i = 0; i < n; ++i) normal_pair(u[i], v[i], deviation, &x[i], &y[i]);
}

struct End {  // of a pixel's way: solarise, clamp, normalise
  float threshold;
  const float *mean, *factor;  // (C,)

  FASTSSL_INLINE float operator()(float x, float m, float f) const {
    x = x >= threshold ? 1.f - x : x;
    return (unit(x) - m) * f;
  }
};
// n pixels of C planes into `out`: planes `stride` apart, or interleaved where it is 0.
template <class T, class Round>
FASTSSL_INLINE inline void finish(const float* const* x, int64_t C, int64_t n, const End& given,
                                  T* __restrict out, int64_t stride, const Round& round) {
  const End end = given;
  if (stride == 0 && C == 3) {
    const float *r = x[0], *g = x[1], *b = x[2];
    const float m0 = end.mean[0], m1 = end.mean[1], m2 = end.mean[2];
    const float f0 = end.factor[0], f1 = end.factor[1], f2 = end.factor[2];
    for (int64_t i = 0; i < n; ++i) {
      out[3 * i] = round(end(r[i], m0, f0));
      out[3 * i + 1] = round(end(g[i], m1, f1));
      out[3 * i + 2] = round(end(b[i], m2, f2));
    }
    return;
  }
  for (int64_t c = 0; c < C; ++c) {
    const float *plane = x[c], m = end.mean[c], f = end.factor[c];
    if (stride == 0) {
      for (int64_t i = 0; i < n; ++i) out[i * C + c] = round(end(plane[i], m, f));
    } else {
      for (int64_t i = 0; i < n; ++i) out[c * stride + i] = round(end(plane[i], m, f));
    }
  }
}
FASTSSL_CLONES void finish_fp32(const float* const* x, int64_t C, int64_t n, const End& end,
                                float* out, int64_t stride) {
  finish(x, C, n, end, out, stride, [](float v) FASTSSL_INLINE { return v; });
}
FASTSSL_CLONES void finish_bf16(const float* const* x, int64_t C, int64_t n, const End& end,
                                uint16_t* out, int64_t stride) {
  finish(x, C, n, end, out, stride,
         [](float v) FASTSSL_INLINE { return static_cast<uint16_t>(bf16_bits(v)); });
}
FASTSSL_CLONES void finish_fp16(const float* const* x, int64_t C, int64_t n, const End& end,
                                uint16_t* out, int64_t stride) {
  finish(x, C, n, end, out, stride, [](float v) FASTSSL_INLINE { return half_bits(v); });
}

// ---------------------------------------------------------------------------------- the views

struct Job {
  const void* pixels;
  bool bytes;  // of `pixels`; or else fp32
  const int64_t *offsets, *sizes, *source;  // (B,), (B, 2), (M,)
  const float* params;  // (M, kParams)
  const int64_t* keys;  // (M, 4) or null
  int64_t C, size;
  bool bicubic, antialias;
  std::vector<float> mean, factor;  // (C,)
  ScalarType dtype;
  bool channels_last;
  void* out;  // (M, C, size, size), or (M, size, size, C)
};

// Makes views one after another in the same memory.
class Renderer {
 public:
  explicit Renderer(const Job& job)
      : job_(job),
        plane_(job.size * job.size),
        rows_(std::max(kLanes, kBlock / job.size / kLanes * kLanes)),
        image_(job.C * plane_),
        sources_(job.C) {}

  void render(int64_t m);

 private:
  struct Step {
    int operation;
    float factor;
  };

  void plan();
  void crop(int64_t row);
  template <class T>
  void resize(const T* image, int64_t row, int64_t rows, float* out);
  void apply(const Step& step, int64_t at, int64_t n, double mean);
  double sum(int64_t at, int64_t n) const;
  void blur();
  void draw_noise();
  void emit(const float* x, int64_t ld, int64_t at, int64_t n);

  const Job& job_;
  const int64_t plane_, rows_;
  std::vector<float> image_;  // (C, size, size); of grey views the first plane only
  std::vector<const float*> sources_;
  std::vector<Lanes> source_, lines_, columns_;  // of the image; of the view; their transpose
  std::vector<float> line_, block_, noise_;
  std::vector<uint32_t> words_;
  Axis x_, y_;

  int64_t view_ = 0, image_at_ = 0, height_ = 0, width_ = 0, planes_ = 0;
  const float* p_ = nullptr;  // this view's parameters
  bool across_ = false, mirror_x_ = false, mirror_y_ = false;
  Step steps_[5];
  int count_ = 0;
};

// One row of samples along a turned line: at (x + dx[i], y + dy[i]), edges repeated.
template <class T>
void sample_row(const T* image, int64_t height, int64_t width, double x, double y, double dx,
                double dy, float scale, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const double px = std::clamp(x + dx * static_cast<double>(i), 0.0, double(width - 1));
    const double py = std::clamp(y + dy * static_cast<double>(i), 0.0, double(height - 1));
    const auto left = static_cast<int64_t>(px), top = static_cast<int64_t>(py);
    const int64_t right = std::min(left + 1, width - 1), bottom = std::min(top + 1, height - 1);
    const float fx = static_cast<float>(px - double(left)), fy = static_cast<float>(py - double(top));
    const T *upper = image + top * width, *lower = image + bottom * width;
    const float a = upper[left], b = upper[right], c = lower[left], d = lower[right];
    const float up = a + fx * (b - a), down = c + fx * (d - c);
    out[i] = scale * (up + fy * (down - up));
  }
}

void Renderer::plan() {
  // Quarter turns are mirror images of the image or of its transpose.
  const int turns = static_cast<int>(p_[kTurns]) & 3;
  across_ = turns & 1, mirror_x_ = turns == 1 || turns == 2, mirror_y_ = turns >= 2;
  if (p_[kFlip] != 0.f) (across_ ? mirror_y_ : mirror_x_) ^= true;
  if (p_[kAngle] == 0.f) {
    x_.build(p_[kX0], p_[kX1], job_.size, width_, 1.0, job_.bicubic, job_.antialias, mirror_x_);
    y_.build(p_[kY0], p_[kY1], job_.size, height_, job_.bytes ? 1.0 / 255.0 : 1.0, job_.bicubic,
             job_.antialias, mirror_y_);
  }
  count_ = 0;
  for (int k = kFirst; k < kGray; ++k) {
    const int operation = static_cast<int>(p_[k]);
    if (operation < 0 || operation > (job_.C == 3 ? kHue : kContrast)) continue;
    float factor = p_[kBrightness + operation];
    if (operation == kHue) {
      factor = 6.f * (factor - std::floor(factor));
      if (factor < 1.f) factor += 6.f;
    }
    steps_[count_++] = {operation, factor};
  }
  if (p_[kGray] != 0.f && job_.C == 3) steps_[count_++] = {kGrayscale, 0.f};
}

template <class T>
void grow(std::vector<T>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
}

// At most kLanes rows of the view from `row` on.
template <class T>
void Renderer::resize(const T* image, int64_t row, int64_t rows, float* out) {
  const int64_t width = round_up(x_.length, kLanes) / kLanes, size = job_.size;
  const int32_t *begin = &y_.begin[row], *place = y_.place.data();
  const auto ends = std::minmax_element(place + begin[0], place + begin[rows]);
  const int64_t first = *ends.first, last = *ends.second;
  grow(source_, (last - first + 1) * width);
  grow(lines_, std::max(kLanes * width, size));
  grow(columns_, kLanes * width);
  float* lines = reinterpret_cast<float*>(lines_.data());
  widen(image + (y_.low + first) * width_ + x_.low, width_, last - first + 1, x_.length,
        reinterpret_cast<float*>(source_.data()), kLanes * width);
  combine(source_.data(), width, first, begin, place, y_.weight.data(), rows, lines_.data());
  transpose(lines, kLanes * width, rows, x_.length, reinterpret_cast<float*>(columns_.data()),
            kLanes);
  combine(columns_.data(), 1, 0, x_.begin.data(), x_.place.data(), x_.weight.data(), size,
          lines_.data());
  transpose(lines, kLanes, size, rows, out, size);
}

// Rows of the view from `row` on, as many as a block has, into the image.
void Renderer::crop(int64_t row) {
  const int64_t size = job_.size, end = std::min(size, row + rows_);
  const auto put = [&]<class T>(const T* image) {
    if (p_[kAngle] == 0.f) {
      for (int64_t i = row; i < end; i += kLanes)
        for (int64_t c = 0; c < job_.C; ++c)
          resize(image + c * height_ * width_, i, std::min(kLanes, end - i),
                 &image_[c * plane_ + i * size]);
      return;
    }
    const double x0 = p_[kX0], y0 = p_[kY0], x1 = p_[kX1], y1 = p_[kY1], n = double(size);
    const double cosine = std::cos(double(p_[kAngle])), sine = std::sin(double(p_[kAngle]));
    const double u = (x1 - x0) * (0.5 / n - 0.5) * (mirror_x_ ? -1 : 1);
    const double du = (x1 - x0) / n * (mirror_x_ ? -1 : 1);
    for (int64_t i = row; i < end; ++i) {
      const double v = (y1 - y0) * ((double(i) + 0.5) / n - 0.5) * (mirror_y_ ? -1 : 1);
      const double x = (x0 + x1) / 2 + cosine * u - sine * v - 0.5;
      const double y = (y0 + y1) / 2 + sine * u + cosine * v - 0.5;
      for (int64_t c = 0; c < job_.C; ++c)
        sample_row(image + c * height_ * width_, height_, width_, x, y, cosine * du, sine * du,
                   job_.bytes ? 1.f / 255.f : 1.f, size, &image_[c * plane_ + i * size]);
    }
  };
  if (job_.bytes) put(static_cast<const uint8_t*>(job_.pixels) + image_at_);
  else put(static_cast<const float*>(job_.pixels) + image_at_);
}

void Renderer::apply(const Step& step, int64_t at, int64_t n, double mean) {
  float *x = &image_[at], *g = x + plane_, *b = g + plane_;
  if (step.operation == kSaturation) saturate(x, g, b, n, step.factor);
  else if (step.operation == kHue) turn_hues(x, g, b, n, step.factor);
  else if (step.operation == kGrayscale) gray(x, g, b, n);
  else {
    const bool contrast = step.operation == kContrast;
    const float rest = contrast ? static_cast<float>((1.0 - double(step.factor)) * mean) : 0.f;
    for (int64_t c = 0; c < job_.C; ++c) affine(x + c * plane_, n, step.factor, rest);
  }
}

// Of the luminances, or of all channels divided by their number.
double Renderer::sum(int64_t at, int64_t n) const {
  const float* x = &image_[at];
  if (job_.C == 3) return sum_luminance(x, x + plane_, x + 2 * plane_, n);
  double total = 0.0;
  for (int64_t c = 0; c < job_.C; ++c) total += sum_plane(x + c * plane_, n);
  return total / double(job_.C);
}

void Renderer::blur() {
  const int64_t size = job_.size, widest = std::max<int64_t>(1, size / 20);
  std::vector<double> exact(widest + 1);
  double sum = 0.0;
  for (int64_t k = 0; k <= widest; ++k) {
    const double t = double(k) / double(p_[kSigma]);
    exact[k] = std::exp(-0.5 * t * t);
    sum += k ? 2.0 * exact[k] : exact[k];
  }
  std::vector<float> weight;
  for (double w : exact)
    if (w > 1e-8 * sum) weight.push_back(static_cast<float>(w / sum));  // others round to nothing
  const int64_t radius = static_cast<int64_t>(weight.size()) - 1, last = size - 1;
  const auto reflected = [&](int64_t i) { return i < 0 ? -i : i > last ? 2 * last - i : i; };
  std::vector<const float*> before(radius + 1), after(radius + 1);
  grow(line_, size + 2 * radius);
  grow(block_, planes_ * rows_ * size);
  float* middle = line_.data() + radius;
  for (int64_t row = 0; row < size; row += rows_) {
    const int64_t end = std::min(size, row + rows_);
    for (int64_t c = 0; c < planes_; ++c)
      for (int64_t i = row; i < end; ++i) {
        const float* plane = &image_[c * plane_];
        for (int64_t k = 0; k <= radius; ++k) {
          before[k] = plane + reflected(i - k) * size;
          after[k] = plane + reflected(i + k) * size;
        }
        blur_line(plane + i * size, before.data(), after.data(), weight.data(), radius, size,
                  middle);
        for (int64_t k = 1; k <= radius; ++k) {
          middle[-k] = middle[k], middle[last + k] = middle[last - k];
          before[k] = middle - k, after[k] = middle + k;
        }
        blur_line(middle, before.data(), after.data(), weight.data(), radius, size,
                  &block_[(c * rows_ + i - row) * size]);
      }
    emit(block_.data(), rows_ * size, row * size, (end - row) * size);
  }
}

// (C, size, size) by Box and Muller, a pair of words for two values: the first half of the words
// gives lengths, the second half angles.
void Renderer::draw_noise() {
  constexpr uint32_t kFirstBlock = 16;
  const int64_t values = job_.C * plane_, pairs = (values + 1) / 2, blocks = (2 * pairs + 3) / 4;
  const int64_t* key = job_.keys + 4 * view_;  // index, epoch, view, seed
  words_.resize(4 * blocks);
  random_words({uint32_t(key[0]), uint32_t(key[1]), uint32_t(key[2]) << 24,
                kAugment << 24 | uint32_t(uint64_t(key[0]) >> 32),
                {uint32_t(key[3]), uint32_t(uint64_t(key[3]) >> 32)}},
               kFirstBlock, blocks, words_.data());
  noise_.resize(2 * pairs);
  normal_pairs(words_.data(), words_.data() + pairs, pairs, p_[kNoise], noise_.data(),
               noise_.data() + pairs);
}

// The end of n pixels' way, from `at` on: planes of x are `ld` apart.
void Renderer::emit(const float* x, int64_t ld, int64_t at, int64_t n) {
  // A constant image stays constant: its pixels differ by the rounding of their weights.
  End end{p_[kSolarize] - 1e-6f, job_.mean.data(), job_.factor.data()};
  for (int64_t c = 0; c < job_.C; ++c) {
    const float* plane = x + std::min(c, planes_ - 1) * ld;
    if (p_[kNoise] > 0.f) {
      float* noise = &noise_[c * plane_ + at];
      for (int64_t i = 0; i < n; ++i)
        noise[i] += plane[i] >= end.threshold ? 1.f - plane[i] : plane[i];
      plane = noise;
    }
    sources_[c] = plane;
  }
  if (p_[kNoise] > 0.f) end.threshold = std::numeric_limits<float>::infinity();
  const int64_t stride = job_.channels_last ? 0 : plane_;
  const int64_t first = view_ * job_.C * plane_ + (job_.channels_last ? at * job_.C : at);
  if (job_.dtype == ScalarType::Float)
    finish_fp32(sources_.data(), job_.C, n, end, static_cast<float*>(job_.out) + first, stride);
  else if (job_.dtype == ScalarType::BFloat16)
    finish_bf16(sources_.data(), job_.C, n, end, static_cast<uint16_t*>(job_.out) + first, stride);
  else
    finish_fp16(sources_.data(), job_.C, n, end, static_cast<uint16_t*>(job_.out) + first, stride);
}

void Renderer::render(int64_t m) {
  view_ = m, p_ = job_.params + m * kParams;
  const int64_t b = job_.source[m], size = job_.size;
  image_at_ = job_.offsets[b], height_ = job_.sizes[2 * b], width_ = job_.sizes[2 * b + 1];
  plan();
  if (p_[kNoise] > 0.f) draw_noise();
  const bool blurred = p_[kSigma] > 0.f && size > 1, emitted = !blurred && !across_;
  planes_ = count_ && steps_[count_ - 1].operation == kGrayscale ? 1 : job_.C;
  double mean = 0.0;
  int at = 0;
  for (bool cropped = false;; cropped = true) {
    int end = cropped ? at + 1 : 0;  // from the second pass on, the contrast that it waited for
    while (end < count_ && steps_[end].operation != kContrast) ++end;
    double total = 0.0;
    for (int64_t row = 0; row < size; row += rows_) {
      const int64_t n = std::min(size - row, rows_) * size;
      if (!cropped) crop(row);
      for (int k = at; k < end; ++k) apply(steps_[k], row * size, n, mean);
      if (end < count_) total += sum(row * size, n);
      else if (emitted) emit(&image_[row * size], plane_, row * size, n);
    }
    if (end == count_) break;
    mean = total / double(plane_), at = end;
  }
  if (across_) {
    block_.resize(image_.size());
    for (int64_t c = 0; c < planes_; ++c)
      transpose(&image_[c * plane_], size, size, size, &block_[c * plane_], size);
    image_.swap(block_);
  }
  if (blurred) blur();
  else if (!emitted) emit(image_.data(), plane_, 0, plane_);
}

void check(const Job& job, int64_t pixels, int64_t images, int64_t views) {
  for (int64_t m = 0; m < views; ++m) {
    const int64_t b = job.source[m];
    STD_TORCH_CHECK(b >= 0 && b < images, "render_views: source must be in [0, ", images, "), got ",
                    b, " of view ", m, ".");
    const int64_t at = job.offsets[b], H = job.sizes[2 * b], W = job.sizes[2 * b + 1];
    const int64_t room = at < 0 || at > pixels ? 0 : (pixels - at) / job.C;
    STD_TORCH_CHECK(H > 0 && W > 0 && H <= room / W, "render_views: image ", b, " of ", H, " x ", W,
                    " pixels must lie in pixels, of ", pixels, " elements, got offset ", at, ".");
    const float* p = job.params + m * kParams;
    bool good = p[kX0] < p[kX1] && p[kY0] < p[kY1];
    for (int k = kX0; k <= kAngle; ++k) good = good && std::abs(p[k]) <= kFarthest;
    STD_TORCH_CHECK(good, "render_views: crops must be x0 < x1, y0 < y1, they and the angle within "
                          "2^20, got another of view ", m, ".");
    STD_TORCH_CHECK(job.keys || !(p[kNoise] > 0.f),
                    "render_views: views with noise need noise_key, got None.");
  }
}

Tensor render_views(Tensor pixels, Tensor offsets, Tensor sizes, Tensor source, Tensor params,
                    int64_t channels, int64_t size, bool bicubic, bool antialias,
                    std::vector<double> mean, std::vector<double> std, ScalarType dtype,
                    bool channels_last, std::optional<Tensor> noise_key) {
  const auto integers = [](const Tensor& t) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous(),
                    "render_views: offsets, sizes, source and noise_key must be contiguous int64");
    return static_cast<const int64_t*>(t.const_data_ptr());
  };
  const int64_t M = source.numel(), images = offsets.numel();
  const bool bytes = pixels.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK((bytes || pixels.scalar_type() == ScalarType::Float) && pixels.is_contiguous(),
                  "render_views: pixels must be contiguous uint8 or float32");
  STD_TORCH_CHECK(params.scalar_type() == ScalarType::Float && params.is_contiguous() &&
                      params.numel() == M * kParams && sizes.numel() == 2 * images &&
                      (!noise_key || noise_key->numel() == 4 * M),
                  "render_views: params must be contiguous float32 (M, 20), source (M,), sizes "
                  "(B, 2) and noise_key (M, 4)");
  STD_TORCH_CHECK(channels > 0 && size > 0 && mean.size() == size_t(channels) &&
                      std.size() == size_t(channels),
                  "render_views: size must be positive, mean and std have a number a channel");
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  "render_views: dtype must be float32, bfloat16 or float16");
  Tensor out = channels_last ? new_result(pixels, {M, size, size, channels}, dtype)
                             : new_result(pixels, {M, channels, size, size}, dtype);
  Job job{pixels.const_data_ptr(), bytes, integers(offsets), integers(sizes), integers(source),
          static_cast<const float*>(params.const_data_ptr()),
          noise_key ? integers(*noise_key) : nullptr, channels, size, bicubic, antialias,
          {mean.begin(), mean.end()}, {}, dtype, channels_last, out.mutable_data_ptr()};
  for (double s : std) job.factor.push_back(static_cast<float>(1.0 / s));
  check(job, pixels.numel(), images, M);
  const int64_t few = std::max<int64_t>(1, kFewest / (channels * size * size));
  torch::stable::parallel_for(0, M, few, [&](int64_t begin, int64_t end) {
    Renderer renderer(job);
    for (int64_t m = begin; m < end; ++m) renderer.render(m);
  });
  if (!channels_last) return out;
  return torch::stable::transpose(torch::stable::transpose(out, 1, 3), 2, 3);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastssl, CPU, m) { m.impl("render_views", TORCH_BOX(&render_views)); }

}  // namespace fastssl
