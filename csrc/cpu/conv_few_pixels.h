// Convolutions of few pixels and many weights, as the last layers of a classifier on one image: a product of the weights, where they
// lie, with the pixels' windows. Packing weights that so few pixels meet takes longer than the sums.
//
// Lanes are pixels, weights are broadcast: a task owns some output channels and meets a block of the depth of all pixels before the
// next, so the weights are read once and both blocks stay in the second-level cache. The pixels left over by whole vectors (49 = 3 x 16
// + 1) have lanes along the depth: padding them to a vector would add 30 % at 7x7. The sums lie as [channels][pixels] and are turned
// as a band goes to its sink. For less than two vectors of pixels, and where weights are of another type than is computed in, they are
// packed all the same, a strip of channels at a time (strips.h).
// Included by for_each_isa.h inside the namespace of each instruction set.
//
// 512 -> 512 channels, 3x3 on 7x7: floor 0.48 ms on two Zen 5 threads; 256 -> 256 on 14x14 the same.

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

// Pixels in strips of whole vectors, as many as a tile has registers for or one less, and a rest.
template <class T>
struct PixelStrips {
  static constexpr int kVectors = PanelTile<T>::kVectors, kFewestVectors = kVectors / 2;  // of a strip
  static constexpr int64_t kMostRest = 6;
  int64_t vectors, count, rest;

  explicit PixelStrips(int64_t pixels)  // at least two vectors
      : vectors(pixels / kLanes<T>), rest(pixels % kLanes<T>) {
    if (rest > kMostRest) ++vectors, rest = 0;
    count = (vectors + kVectors - 1) / kVectors;
  }
  int64_t first(int64_t i) const { return vectors * i / count * kLanes<T>; }  // pixel of strip i
  int64_t whole() const { return vectors * kLanes<T>; }
};

// y[channels][rest] (+)= the sums over `steps` of the depth, lanes along it.
template <int kRest, class T>
NOINLINE void multiply_rest(int64_t channels, const T* weights, int64_t weight_row, const T* pixels, int64_t pixel_row, int64_t steps, T* y,
                            int64_t y_row, bool add) {
  constexpr int R = 4;
  constexpr int64_t W = kLanes<T>;
  for (int64_t c = 0; c < channels; c += R) {
    const int64_t count = std::min<int64_t>(R, channels - c);
    const T* row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) row[r] = weights + (c + std::min<int64_t>(r, count - 1)) * weight_row;
    vec<T> acc[R][kRest] = {};
    const auto step = [&](auto read) __attribute__((always_inline)) {
      vec<T> w[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) w[r] = read(row[r]);
#pragma GCC unroll 6
      for (int p = 0; p < kRest; ++p) {
        const vec<T> x = read(pixels + p * pixel_row);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r][p] += w[r] * x;
      }
    };
    int64_t k = 0;
    for (; k + W <= steps; k += W) step([k](const T* from) { return load(from + k); });
    if (k < steps) step([k, steps](const T* from) { return load_partial(from + k, steps - k); });
    for (int r = 0; r < count; ++r)
      for (int p = 0; p < kRest; ++p) {
        T* at = y + (c + r) * y_row + p;
        *at = (add ? *at : T(0)) + reduce_add(acc[r][p]);
      }
  }
}

// y[channels][y_row] = weights [channels][depth] times windows [pixels][depth].
template <class T>
inline void multiply_few_pixels(int64_t channels, int64_t pixels, int64_t depth, const T* weights, int64_t weight_row, const T* windows,
                                int64_t window_row, T* y, int64_t y_row, int64_t chain) {
  constexpr int64_t W = kLanes<T>, kDepthBlock = 256, kTaskChannels = 96;
  const PixelStrips<T> strips(pixels);
  const int64_t block = chain * std::max<int64_t>(1, kDepthBlock / chain), blocks = (depth + block - 1) / block;
  Scratch<T> packed(strips.whole() * depth);  // [strip][depth][pixels of the strip]
  torch::stable::parallel_for(0, strips.count * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t strip = i / blocks, k0 = i % blocks * block, first = strips.first(strip), width = strips.first(strip + 1) - first;
      pack_panels<T>(packed + first * depth + k0 * width, windows + first * window_row + k0, 1, window_row, std::min(block, depth - k0),
                     std::min(width, pixels - first), width, 0, 1);
    }
  });
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tasks = std::min(channels, threads * ((channels + threads * kTaskChannels - 1) / (threads * kTaskChannels)));
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_channel = channels * task / tasks, count = channels * (task + 1) / tasks - first_channel;
      const T* rows = weights + first_channel * weight_row;
      for (int64_t k0 = 0; k0 < depth; k0 += block) {
        const int64_t steps = std::min(block, depth - k0), following = std::min(block, depth - k0 - steps);
        for (int64_t strip = 0; strip < strips.count; ++strip) {
          const int64_t first = strips.first(strip), width = strips.first(strip + 1) - first;
          const T* panel = packed + first * depth + k0 * width;
          with_constant<PixelStrips<T>::kVectors>(width / W, [&](auto vectors) {
            if constexpr (vectors.value >= PixelStrips<T>::kFewestVectors) {
              constexpr int64_t R = PanelTile<T>::rows(vectors.value);
              const int64_t tiles = (count + R - 1) / R;
              for (int64_t i = 0, c = 0; i < tiles; ++i) {
                const int64_t n = (count - c + tiles - i - 1) / (tiles - i);  // of as equal a size as can be
                if (strip == 0) prefetch_rows(rows + k0 + steps, weight_row, count, following, i, tiles);
                multiply_rows<vectors.value, T>(n, rows + c * weight_row + k0, weight_row, panel, steps, chain,
                                                y + (first_channel + c) * y_row + first, y_row, width, k0 > 0, nullptr);
                c += n;
              }
            }
          });
        }
        if (strips.rest > 0)
          with_constant<PixelStrips<T>::kMostRest>(strips.rest, [&](auto rest) {
            multiply_rest<rest.value, T>(count, rows + k0, weight_row, windows + strips.whole() * window_row + k0, window_row, steps,
                                         y + first_channel * y_row + strips.whole(), y_row, k0 > 0);
          });
      }
    }
  });
}

template <class T, class S, class Source, class Sink>
inline void few_pixels_pass(const Pass& pass, const Bands& bands, const Weights<T, S>& weights, const Source& source, const Sink& sink) {
  const int64_t width = pass.w.outputs(), pixels = pass.h.outputs() * width, all = pass.batch * pixels, depth = pass.depth();
  const int64_t channels = pass.out_channels, padded = padded_channels<T>(channels);
  const bool where_they_lie = std::is_same_v<T, S> && all >= 2 * kLanes<T>;
  // A distance of many whole pages would lay all rows on the same few sets of the first-level cache.
  const int64_t row_step = round_up(depth, kLanes<T>) + kLanes<T>;
  const int64_t y_row = where_they_lie ? round_up(all, kLanes<T>) + kLanes<T> : padded;
  Scratch<T> rows(all * row_step), y((where_they_lie ? channels : all) * y_row + kLanes<T>);
  torch::stable::parallel_for(0, pass.batch * pass.h.outputs(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      windows_in_rows<T>(pass, weights, source, i / pass.h.outputs(), i % pass.h.outputs(), rows.get() + i * width * row_step, row_step);
  });
  if (where_they_lie) {
    if constexpr (std::is_same_v<T, S>)
      multiply_few_pixels<T>(channels, all, depth, weights.data, weights.out, rows.get(), row_step, y.get(), y_row, pass.sum_length);
  } else {
    if (padded > channels) std::memset(y.get(), 0, all * padded * sizeof(T));
    multiply_strips(StripProduct<T, S>{all, channels, depth, rows.get(), row_step, weights.data, 1, weights.out, y.get(), padded, false,
                                       pass.sum_length},
                    [](auto...) {});
  }
  torch::stable::parallel_for(0, pass.batch * bands.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / bands.count(), i = task % bands.count();
      const Band band = bands.full(i);
      const int64_t first = n * pixels + band.top * width, count = band.rows() * width;
      // A sink may change what it is given, and the windows of two bands may share rows.
      Scratch<T> own(count * padded + kLanes<T>);
      if (where_they_lie)
        pack_panels<T>(own.get(), y + first, 1, y_row, count, channels, padded, 0, 1);
      else
        std::memcpy(own.get(), y.get() + first * padded, count * padded * sizeof(T));
      sink(n, 0, i, own.get(), width, padded);
    }
  });
}
