// Convolutions of few pixels and many weights, as the last layers of a classifier on one image: a product of the pixels' windows, laid
// out in rows, with the weights where they lie (few_rows.h). Packing weights that so few pixels meet takes longer than the sums.
// Included by for_each_isa.h inside the namespace of each instruction set.
//
// 512 -> 512 channels, 3x3 on 7x7: floor 0.55 ms on two Zen 5 threads.

template <class T, class S>
inline bool few_pixels_apply(const Pass& pass, const Weights<T, S>& weights) {
  constexpr int64_t kFewPixels = 256, kManyWeights = 1 << 16;
  const int64_t pixels = pass.batch * pass.h.outputs() * pass.w.outputs();
  const bool plain = pass.groups == 1 && !pass.h.scatter && !pass.is_pointwise() && !weights.scale;
  const bool few = pixels <= kFewPixels && pass.depth() * pass.out_channels >= kManyWeights;
  return plain && few && weights.out == pass.depth() && weight_order(pass, weights) != WeightOrder::scattered;
}

// The windows of row `h` of the outputs of image n, each in the order of the weights, `row_step` apart.
template <class T, class S, class Source>
inline void windows_in_rows(const Pass& pass, const Weights<T, S>& weights, const Source& source, int64_t n, int64_t h, T* rows,
                            int64_t row_step) {
  const int64_t C = pass.channels, width = pass.w.outputs(), block_columns = pass.w.span(width), block_rows = pass.h.span(1);
  Scratch<T> block(block_rows * block_columns * C + kLanes<T>);
  source.load(block.get(), C, block_columns, n, 0, C, pass.h.lowest(h), block_rows, pass.w.lowest(0), block_columns);
  for (int64_t p = 0; p < width; ++p)
    for (int64_t kh = 0; kh < pass.h.axis.taps; ++kh)
      for (int64_t kw = 0; kw < pass.w.axis.taps; ++kw) {
        const int64_t column = p * pass.w.axis.stride + kw * pass.w.axis.dilation;
        const T* pixel = block.get() + (kh * pass.h.axis.dilation * block_columns + column) * C;
        T* out = rows + p * row_step + kh * (pass.h.axis.taps > 1 ? weights.h : 0) + kw * (pass.w.axis.taps > 1 ? weights.w : 0);
        for (int64_t c = 0; c < C; ++c) out[c * weights.in] = pixel[c];
      }
}

template <class T, class S, class Source, class Sink>
inline void few_pixels_pass(const Pass& pass, const Bands& bands, const Weights<T, S>& weights, const Source& source, const Sink& sink) {
  const int64_t width = pass.w.outputs(), pixels = pass.h.outputs() * width, depth = pass.depth();
  const int64_t padded = padded_channels<T>(pass.out_channels);
  // A distance of many whole pages would lay all rows on the same few sets of the first-level cache.
  const int64_t row_step = round_up(depth, kLanes<T>) + kLanes<T>;
  Scratch<T> rows(pass.batch * pixels * row_step), y(pass.batch * pixels * padded + kLanes<T>);
  if (padded > pass.out_channels) std::memset(y.get(), 0, pass.batch * pixels * padded * sizeof(T));
  torch::stable::parallel_for(0, pass.batch * pass.h.outputs(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      windows_in_rows<T>(pass, weights, source, i / pass.h.outputs(), i % pass.h.outputs(), rows.get() + i * width * row_step, row_step);
  });
  const auto nothing = [](const T*, int64_t, int64_t, int64_t, int64_t) {};
  const auto multiply = [&](auto vectors) {
    multiply_few_rows<vectors.value, T>(pass.batch * pixels, pass.out_channels, depth, rows.get(), row_step, weights.data, weights.out,
                                        y.get(), padded, pass.sum_length, nothing);
  };
  if (strip_vectors<T>(pass.out_channels) == PanelTile<T>::kVectors)
    multiply(std::integral_constant<int, PanelTile<T>::kVectors>{});
  else
    multiply(std::integral_constant<int, PanelTile<T>::kVectors / 2>{});
  torch::stable::parallel_for(0, pass.batch * bands.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / bands.count(), i = task % bands.count();
      const Band band = bands.full(i);
      // A sink may change what it is given, and the windows of two bands may share rows.
      Scratch<T> own(band.rows() * width * padded + kLanes<T>);
      std::memcpy(own.get(), y.get() + (n * pixels + band.top * width) * padded, band.rows() * width * padded * sizeof(T));
      sink(n, 0, i, own.get(), width, padded);
    }
  });
}
