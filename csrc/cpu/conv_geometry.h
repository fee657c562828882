// The index arithmetic of convolutions: plain structs shared by the host side and every instruction set's kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "activation.h"

namespace bmk {

enum class Pooling { none, max, avg };

// In the saved index of a max-pool: the ReLU of this window is off, so no gradient flows.
inline constexpr int kNoGradient = 255;

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// A tensor [N, C, H, W] of any strides. A null pointer stands for a tensor that is not there.
template <class S>
struct Image {
  S* data = nullptr;
  int64_t n = 0, c = 0, h = 0, w = 0;  // strides
  int64_t channels = 0, height = 0, width = 0;
};

// One spatial axis. The wide side (the input of a convolution, the output of a transposed one) meets the narrow side at
// wide = narrow * stride - pad + tap * dilation.
struct Axis {
  int64_t wide, narrow, taps, stride, dilation, pad;
};

struct Conv {
  int64_t batch, groups, wide_channels, narrow_channels;
  Axis h, w;
};

struct Window {  // of a pool; 1 x 1 without one
  Pooling kind = Pooling::none;
  int64_t h = 1, w = 1, stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0;

  // A 2x2 max-pool whose windows do not overlap.
  bool is_halves() const { return kind == Pooling::max && h == 2 && w == 2 && stride_h == 2 && stride_w == 2 && pad_h == 0 && pad_w == 0; }
};

// One axis of a pass over the output: `gather` computes the narrow side from the wide one (convolution, gradient of a
// transposed convolution), `scatter` the wide side from the narrow one (transposed convolution, gradient of a convolution).
// The outputs of a scatter fall into `stride` phases; those of one phase read consecutive sources at the same taps.
struct PassAxis {
  Axis axis;
  bool scatter;

  int64_t outputs() const { return scatter ? axis.wide : axis.narrow; }
  int64_t sources() const { return scatter ? axis.narrow : axis.wide; }
  int64_t phases() const { return scatter ? axis.stride : 1; }
  int64_t source_step() const { return scatter ? 1 : axis.stride; }
  int64_t reach() const { return (axis.taps - 1) * axis.dilation; }

  // The first output of the phase that is not below `output`.
  int64_t first_of_phase(int64_t output, int64_t phase) const {
    if (!scatter) return output;
    const int64_t offset = phase - (output + axis.pad) % axis.stride;
    return output + (offset < 0 ? offset + axis.stride : offset);
  }
  int64_t phase_of(int64_t output) const { return scatter ? (output + axis.pad) % axis.stride : 0; }
  // The source to which the offsets of the taps are relative.
  int64_t base(int64_t output) const { return scatter ? (output + axis.pad) / axis.stride : output * axis.stride - axis.pad; }
  bool tap_offset(int64_t phase, int64_t tap, int64_t* offset) const {
    const int64_t reach = tap * axis.dilation;
    if (!scatter) {
      *offset = reach;
      return true;
    }
    if ((reach - phase) % axis.stride != 0) return false;
    *offset = -floor_div(reach - phase, axis.stride);
    return true;
  }
  // The lowest source that outputs from `output` on may read, and how many sources `count` outputs may span.
  int64_t lowest(int64_t output) const {
    return scatter ? floor_div(output + axis.pad - reach(), axis.stride) : output * axis.stride - axis.pad;
  }
  int64_t span(int64_t count) const {
    return scatter ? (count + reach() - 1 + axis.stride - 1) / axis.stride + 1 : (count - 1) * axis.stride + reach() + 1;
  }
};

// One run of the reduction: `depth` consecutive elements of the source block times `depth` consecutive weight rows. A run
// that `begins` a sum makes the tile add what it has to the output first.
struct Tap {
  int64_t source, weight, depth;
  bool begins = false;
};

// A single precision sum loses a digit over a few hundred terms, so that after this many a new one is begun. PyTorch's
// transposed convolution sums every tap by itself first, and is that much more accurate: ours begins anew more often there.
// A product over channels alone may run longer: blocks of 192 gave the results of PyTorch's products (gemm.h).
inline constexpr int64_t kSumLength = 48, kTransposedSumLength = 16, kPointwiseSumLength = 128;

// Appends a run, joined to the one before where source and weights both continue, in pieces of at most `length`.
inline void append_run(std::vector<Tap>& taps, Tap tap, int64_t length) {
  while (tap.depth > 0) {
    const bool continues =
        !taps.empty() && taps.back().source + taps.back().depth == tap.source && taps.back().weight + taps.back().depth == tap.weight;
    const int64_t room = continues ? length - taps.back().depth : 0, depth = std::min(tap.depth, room > 0 ? room : length);
    if (room > 0)
      taps.back().depth += depth;
    else
      taps.push_back({tap.source, tap.weight, depth});
    tap.source += depth, tap.weight += depth, tap.depth -= depth;
  }
}
inline void mark_sums(std::vector<Tap>& taps, int64_t length) {
  int64_t terms = 0;
  for (Tap& tap : taps) {
    tap.begins = terms > 0 && terms + tap.depth > length;
    terms = (tap.begins ? 0 : terms) + tap.depth;
  }
}

// One pass: source [batch, groups * channels, h.sources, w.sources] -> output [batch, groups * out_channels, ..].
struct Pass {
  int64_t batch, groups, channels, out_channels;  // channels per group
  PassAxis h, w;
  int64_t sum_length = kSumLength;

  int64_t depth() const { return h.axis.taps * w.axis.taps * channels; }
  bool is_pointwise() const {
    const auto one = [](const Axis& a) { return a.taps == 1 && a.stride == 1 && a.pad == 0 && a.wide == a.narrow; };
    return one(h.axis) && one(w.axis);
  }
  // Where the weights of one tap begin. A scatter meets the sources from the last tap to the first.
  int64_t weight_row(int64_t kh, int64_t kw) const {
    const int64_t column = w.scatter ? w.axis.taps - 1 - kw : kw;
    return (kh * w.axis.taps + column) * channels;
  }
  // The taps of every phase [h.phases * w.phases] for a source block whose rows are `columns` pixels of `stride` elements;
  // neighbouring taps are joined where source and weights both continue.
  std::vector<std::vector<Tap>> taps(int64_t columns, int64_t stride) const {
    std::vector<std::vector<Tap>> all;
    for (int64_t ph = 0; ph < h.phases(); ++ph)
      for (int64_t pw = 0; pw < w.phases(); ++pw) {
        std::vector<Tap> taps;
        for (int64_t kh = 0; kh < h.axis.taps; ++kh)
          for (int64_t column = 0; column < w.axis.taps; ++column) {
            const int64_t kw = w.scatter ? w.axis.taps - 1 - column : column;
            int64_t row_offset, column_offset;
            if (!h.tap_offset(ph, kh, &row_offset) || !w.tap_offset(pw, kw, &column_offset)) continue;
            append_run(taps, {(row_offset * columns + column_offset) * stride, weight_row(kh, kw), channels}, sum_length);
          }
        mark_sums(taps, sum_length);
        all.push_back(std::move(taps));
      }
    return all;
  }
};

inline Pass with_sum_length(Pass pass) {
  if (pass.is_pointwise()) pass.sum_length = kPointwiseSumLength;
  return pass;
}
inline Pass gather_pass(const Conv& conv) {
  const int64_t from = conv.wide_channels / conv.groups, to = conv.narrow_channels / conv.groups;
  return with_sum_length({conv.batch, conv.groups, from, to, {conv.h, false}, {conv.w, false}});
}
inline Pass scatter_pass(const Conv& conv) {
  const int64_t from = conv.narrow_channels / conv.groups, to = conv.wide_channels / conv.groups;
  return with_sum_length({conv.batch, conv.groups, from, to, {conv.h, true}, {conv.w, true}});
}

// A rectangle of outputs that one task computes: rows [top, bottom), columns [left, right).
struct Band {
  int64_t top, bottom, left, right;
  int64_t rows() const { return bottom - top; }
  int64_t columns() const { return right - left; }
};

// Cuts the outputs of an image into bands of up to `rows` x `columns`. With a pool the cuts are made between its windows, and a
// band holds every row and column its windows need.
struct Bands {
  int64_t height, width;  // of the pooled output
  int64_t rows, columns;  // of the pooled output, in one band at most
  Window window;
  int64_t full_height, full_width;  // of the output before the pool
  int64_t row_unit = 1;             // bands begin at multiples of this
  int64_t down = 1;                 // bands along the height, of as equal a size as can be

  int64_t count() const { return down * across(); }
  int64_t across() const { return (width + columns - 1) / columns; }
  // The first of the bands are the larger ones: a thread that begins further down may have to compute rows of the band above.
  int64_t first_row(int64_t i) const { return std::min(height, ((height + row_unit - 1) / row_unit * i + down - 1) / down * row_unit); }
  // Pooled coordinates.
  Band pooled(int64_t i) const {
    const int64_t left = i % across() * columns;
    return {first_row(i / across()), first_row(i / across() + 1), left, std::min(width, left + columns)};
  }
  // Coordinates before the pool; its padding is no part of a band.
  Band full(int64_t i) const {
    const Band p = pooled(i);
    if (window.kind == Pooling::none) return p;
    const int64_t top = p.top * window.stride_h - window.pad_h, bottom = (p.bottom - 1) * window.stride_h - window.pad_h + window.h;
    const int64_t left = p.left * window.stride_w - window.pad_w, right = (p.right - 1) * window.stride_w - window.pad_w + window.w;
    return {std::max<int64_t>(top, 0), std::min(bottom, full_height), std::max<int64_t>(left, 0), std::min(right, full_width)};
  }
  int64_t full_rows() const { return std::min(full_height, (rows - 1) * window.stride_h + window.h); }
  int64_t full_columns() const { return std::min(full_width, (columns - 1) * window.stride_w + window.w); }
};

// Bands of about 64 columns, and of as many rows as keep `bytes_per_pixel` x pixels near `budget`; the batch is cut further
// while there are fewer than `kFewTasks` tasks. None of this looks at the number of threads: results must not depend on it.
// `row_unit`: the rows before the pool come in multiples of this (Winograd tiles).
inline Bands make_bands(int64_t height, int64_t width, const Window& window, int64_t batch, int64_t bytes_per_pixel, int64_t budget,
                        int64_t row_unit = 1) {
  constexpr int64_t kColumns = 64, kFewTasks = 8, kFewPixels = 512, kManyTasks = 32;
  Bands bands{0, 0, 0, 0, window, height, width};
  bands.height = window.kind == Pooling::none ? height : (height + 2 * window.pad_h - window.h) / window.stride_h + 1;
  bands.width = window.kind == Pooling::none ? width : (width + 2 * window.pad_w - window.w) / window.stride_w + 1;
  int64_t columns = width <= 2 * kColumns ? width : kColumns;
  if (height == 1 && width > 2 * kColumns) columns = 4 * kColumns;
  bands.columns = std::max<int64_t>(1, std::min(bands.width, columns / window.stride_w));
  int64_t rows = std::max<int64_t>(1, budget / std::max<int64_t>(1, bytes_per_pixel * bands.columns * window.stride_w));
  rows = std::min(rows, height);
  while (rows > 1 && batch * ((height + rows - 1) / rows) < kFewTasks && rows * bands.columns * window.stride_w > kFewPixels)
    rows = (rows + 1) / 2;
  rows = std::max<int64_t>(1, rows / window.stride_h);
  if (row_unit > 1 && window.stride_h % row_unit != 0) bands.row_unit = row_unit, rows = round_up(rows, row_unit);
  rows = std::max<int64_t>(1, std::min(bands.height, rows));
  const int64_t units = std::max<int64_t>(1, (bands.height + bands.row_unit - 1) / bands.row_unit);
  bands.down = std::min(units, std::max<int64_t>(1, (bands.height + rows - 1) / rows));
  // Of a few bands an odd number is shared out badly.
  if (batch * bands.down * bands.across() % 2 == 1 && bands.down > 1 && bands.down < std::min(units, kManyTasks)) ++bands.down;
  bands.rows = (units + bands.down - 1) / bands.down * bands.row_unit;
  return bands;
}

// A tensor whose storage type is known only where the kernel is chosen.
struct AnyImage {
  void* data = nullptr;
  int64_t n = 0, c = 0, h = 0, w = 0;
  int64_t channels = 0, height = 0, width = 0;
  template <class S>
  Image<S> as() const {
    return {static_cast<S*>(data), n, c, h, w, channels, height, width};
  }
};

// Makes all images' pixels one row, where memory has them one after the other (single pixels in any case).
inline bool flatten(AnyImage& t, int64_t batch) {
  const int64_t step = t.width > 1 ? t.w : t.height > 1 ? t.h : t.n;
  const bool rows = t.height == 1 || t.width == 1 || t.h == t.width * t.w;
  if (!rows || (batch > 1 && t.n != t.height * t.width * step)) return false;
  t.width *= t.height * batch, t.height = 1, t.w = step, t.h = t.n = 0;
  return true;
}

// The arguments of a kernel call, checked and with two spatial axes. Scale, shift and bias are contiguous [output channels].
struct ConvForward {
  Conv conv;
  bool transposed;
  Window window;
  Activation activation;
  double slope;  // of the leaky ReLU
  AnyImage x, weight, residual, out, pre, index;
  const void *bias, *scale, *shift;
};

struct ConvBackward {
  Conv conv;
  bool transposed;
  Window window;
  Activation activation;
  double slope;
  AnyImage x, weight, grad, out, pre, index;  // grad, index: pooled; out, pre: what the activation's derivative needs
  AnyImage dx, dweight, dresidual;            // null where not wanted
  const void *bias, *scale;
  void *dbias, *dscale, *dshift;  // null where not wanted
};

}  // namespace bmk
