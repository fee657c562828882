// Scatter passes to few channels, such as the gradient of a network's first layer or the last layer of a decoder: one product,
// then sums. Included by for_each_isa.h inside the namespace of each instruction set.
//
//   t[source pixel, (tap, output channel)] = sum over channels of  source[pixel] weight[channel, (tap, output channel)]
//   y[output pixel, channel]               = sum over the taps that reach it of  t
//
// The direct pass would fill a vector of output channels per tap, most of its lanes with nothing. Floor: the multiply-adds with
// taps and output channels together in whole vectors.

template <class T>
inline int64_t scatter_columns(const Pass& pass) {
  return round_up(pass.h.axis.taps * pass.w.axis.taps * pass.out_channels, kLanes<T>);
}
template <class T>
inline bool scatter_applies(const Pass& pass) {
  const int64_t direct = pass.h.axis.taps * pass.w.axis.taps * padded_channels<T>(pass.out_channels);
  return pass.h.scatter && pass.groups == 1 && 2 * scatter_columns<T>(pass) <= direct;
}

// [panel][channels][columns of the panel], as pack_weights does it.
template <class T, class S>
inline void pack_scatter(T* packed, const Pass& pass, const Weights<T, S>& weights) {
  constexpr int64_t kColumns = ConvTile<T>::kColumns;
  const int64_t padded = scatter_columns<T>(pass), taps_w = pass.w.axis.taps;
  std::memset(packed, 0, pass.channels * padded * sizeof(T));
  for (int64_t tap = 0; tap < pass.h.axis.taps * taps_w; ++tap)
    for (int64_t o = 0; o < pass.out_channels; ++o) {
      const int64_t column = tap * pass.out_channels + o, panel = column / kColumns * kColumns;
      const int64_t columns = std::min(kColumns, padded - panel);
      for (int64_t c = 0; c < pass.channels; ++c)
        packed[panel * pass.channels + c * columns + column - panel] =
            to_compute(weights.data[o * weights.out + c * weights.in + tap / taps_w * weights.h + tap % taps_w * weights.w]) *
            (weights.scale ? to_compute(weights.scale[c]) : T(1));
    }
}

// Adds the taps of the sources [row, row + rows) x [column, column + columns) to the outputs of a band.
template <class T>
inline void add_taps(const Pass& pass, const Band& band, const T* t, int64_t t_step, int64_t t_columns, int64_t row, int64_t rows,
                     int64_t column, int64_t columns, T* y, int64_t y_columns, int64_t y_stride) {
  const Axis &h = pass.h.axis, &w = pass.w.axis;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t kh = 0; kh < h.taps; ++kh) {
      const int64_t r = (row + i) * h.stride - h.pad + kh * h.dilation;
      if (r < band.top || r >= band.bottom) continue;
      for (int64_t kw = 0; kw < w.taps; ++kw) {
        // Source column + j reaches output column + j * stride: those in [first, last) lie in the band.
        const int64_t at = column * w.stride - w.pad + kw * w.dilation - band.left;
        const int64_t first = std::max<int64_t>(0, -floor_div(at, w.stride));
        const int64_t last = std::min(columns, floor_div(band.columns() - 1 - at, w.stride) + 1);
        for (int64_t o = 0; o < pass.out_channels; ++o) {
          const T* from = t + i * t_columns * t_step + (kh * w.taps + kw) * pass.out_channels + o;
          T* to = y + ((r - band.top) * y_columns + at) * y_stride + o;
          for (int64_t j = first; j < last; ++j) to[j * w.stride * y_stride] += from[j * t_step];
        }
      }
    }
}

// As direct_pass; packed by pack_scatter.
template <class T, class Source, class Sink>
inline void scatter_pass_to_few(const Pass& pass, const Bands& bands, const T* packed, const Source& source, const Sink& sink) {
  constexpr int64_t kColumns = ConvTile<T>::kColumns;
  const int64_t C = pass.channels, padded = scatter_columns<T>(pass), y_stride = padded_channels<T>(pass.out_channels);
  const int64_t y_columns = bands.full_columns(), y_rows = bands.full_rows();
  const int64_t columns = pass.w.span(y_columns), rows = pass.h.span(y_rows);
  std::vector<Tap> run;
  append_run(run, {0, 0, C}, pass.sum_length);
  mark_sums(run, pass.sum_length);
  torch::stable::parallel_for(0, pass.batch * bands.count(), 1, [&](int64_t begin, int64_t end) {
    Scratch<T> block(rows * columns * C), t(rows * columns * padded), y(y_rows * y_columns * y_stride + kLanes<T>);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / bands.count(), i = task % bands.count();
      const Band band = bands.full(i);
      // No source outside the image has anything to add.
      const int64_t row = std::max<int64_t>(0, pass.h.lowest(band.top)), column = std::max<int64_t>(0, pass.w.lowest(band.left));
      const int64_t height = std::min(pass.h.lowest(band.top) + pass.h.span(band.rows()), pass.h.sources()) - row;
      const int64_t width = std::min(pass.w.lowest(band.left) + pass.w.span(band.columns()), pass.w.sources()) - column;
      std::memset(y.get(), 0, band.rows() * y_columns * y_stride * sizeof(T));
      if (height > 0 && width > 0) {
        source.load(block.get(), C, width, n, 0, C, row, height, column, width);
        for (int64_t first = 0; first < padded; first += kColumns) {
          const T* panel = packed + first * C;
          if (padded - first >= kColumns)
            conv_row<2, T>(height * width, block.get(), C, run.data(), run.size(), panel, t.get() + first, padded, false);
          else
            conv_row<1, T>(height * width, block.get(), C, run.data(), run.size(), panel, t.get() + first, padded, false);
        }
        add_taps<T>(pass, band, t.get(), padded, width, row, height, column, width, y.get(), y_columns, y_stride);
      }
      sink(n, 0, i, y.get(), y_columns, y_stride);
    }
  });
}
