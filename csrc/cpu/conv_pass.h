// A pass by the faster of its kernels. Included by for_each_isa.h inside the namespace of each instruction set.

// The weights of a pass, from the tensor [narrow channels, wide channels / groups, KH, KW]. A gather sums over its second
// dimension, a scatter over its first; `scale`, if any, belongs to the channels summed over.
template <class T, class S>
inline Weights<T, S> weights_of(const Pass& pass, const Image<const S>& weight, const S* scale = nullptr) {
  return pass.h.scatter ? Weights<T, S>{weight.data, pass.channels * weight.n, weight.c, weight.n, weight.h, weight.w, scale}
                        : Weights<T, S>{weight.data, pass.out_channels * weight.n, weight.n, weight.c, weight.h, weight.w, scale};
}

// How many channels the sink of a pass gets at a time.
template <class T>
inline int64_t channels_per_sink(const Pass& pass) {
  return is_depthwise(pass) ? kDepthwiseChannels<T> : pass.out_channels;
}

// The bands of a direct pass.
template <class T>
inline Bands direct_bands(const Pass& pass, const Window& window, int64_t per_pixel, int64_t budget) {
  Bands bands = make_bands(pass.h.outputs(), pass.w.outputs(), window, pass.batch * pass.groups, per_pixel, budget);
  if (pass.is_pointwise() && pass.h.outputs() == 1 && pass.batch == 1) {
    // A product: an even number of equal bands, of few enough pixels for their outputs to stay in the first-level cache.
    constexpr int64_t kMost = 4 * ConvTile<T>::kRows;
    const int64_t pieces = round_up((bands.width + kMost - 1) / kMost, 2);
    bands.columns = std::max<int64_t>(1, (bands.width + pieces - 1) / pieces);
  }
  return bands;
}

// Runs a pass the faster way. make_sink(bands) is called once and gives the sink. `winograd` allows that kernel: its largest
// error is at most 1.6 times that of PyTorch's own convolution and 2.3 times that of its gradient, but twice that of its
// transposed convolution of stride 1, whose forward therefore goes without.
template <class T, class S, class Source, class MakeSink>
inline void run_pass(const Pass& pass, const Window& window, const Weights<T, S>& weights, const Source& source, bool winograd,
                     const MakeSink& make_sink) {
  const int64_t padded = padded_channels<T>(pass.out_channels);
  constexpr int64_t kCacheBudget = 192 << 10;  // of the second-level cache, for a band and what is computed from it
  if (is_depthwise(pass)) {
    Scratch<T> packed(pass.depth() * padded_channels<T>(pass.groups));
    pack_depthwise<T, S>(packed.get(), pass, weights);
    const int64_t chunk = std::min(kDepthwiseChannels<T>, pass.groups), tasks = pass.batch * ((pass.groups + chunk - 1) / chunk);
    const bool in_place = reads_in_place<T>(source.plain());
    // Without a block of sources there is nothing that a band could share but its place in the first-level cache.
    const int64_t per_pixel = (in_place ? 1 : 2) * chunk * sizeof(T), budget = in_place ? 24 << 10 : 2 * kCacheBudget;
    const Bands bands = make_bands(pass.h.outputs(), pass.w.outputs(), window, tasks, per_pixel, budget, 2);
    depthwise_pass<T>(pass, bands, packed.get(), source, make_sink(bands));
    return;
  }
  if (scatter_applies<T>(pass)) {
    Scratch<T> packed(pass.channels * scatter_columns<T>(pass));
    pack_scatter<T, S>(packed.get(), pass, weights);
    const int64_t per_source = (pass.channels + scatter_columns<T>(pass)) * sizeof(T) / (pass.h.axis.stride * pass.w.axis.stride);
    const Bands bands = make_bands(pass.h.outputs(), pass.w.outputs(), window, pass.batch, per_source + padded * sizeof(T), kCacheBudget);
    scatter_pass_to_few<T>(pass, bands, packed.get(), source, make_sink(bands));
    return;
  }
  if constexpr (std::is_same_v<T, float>) {
    if (few_pixels_apply(pass, weights)) {
      const Bands bands = make_bands(pass.h.outputs(), pass.w.outputs(), window, pass.batch, padded * sizeof(T), kCacheBudget);
      few_pixels_pass<T>(pass, bands, weights, source, make_sink(bands));
      return;
    }
  }
  Scratch<T> packed(packed_weights_size<T>(pass));
  pack_weights<T, S>(packed.get(), pass, weights);
  if constexpr (std::is_same_v<T, float>) {
    if (winograd && winograd_applies<T>(pass) && !pairs_apply<S>(pass) && all_finite<T>(packed.get(), packed_weights_size<T>(pass))) {
      if (winograd_side(pass) == 4)
        winograd_pass<4, T>(pass, window, packed.get(), source, make_sink);
      else
        winograd_pass<2, T>(pass, window, packed.get(), source, make_sink);
      return;
    }
  }
  if constexpr (std::is_same_v<T, float>) {
    if (phases_apply<T>(pass, window) && !pairs_apply<S>(pass) && all_finite<T>(packed.get(), packed_weights_size<T>(pass))) {
      Scratch<T> u((pass.h.axis.taps + 2) * (pass.w.axis.taps + 2) * pass.channels * padded);
      pack_phases<T>(u.get(), pass, packed.get());
      const TileTasks plan = phase_tasks(pass, window);
      phases_pass<T>(pass, plan, packed.get(), u.get(), source, make_sink(plan.bands));
      return;
    }
  }
  if constexpr (std::is_same_v<T, float>) {
    if (winograd && taps_apply<T>(pass) && !pairs_apply<S>(pass) && all_finite<T>(packed.get(), packed_weights_size<T>(pass))) {
      const auto run_taps = [&](auto rows) {
        const auto points = TapPoints::of<rows.value>(pass);
        Scratch<T> u(points.terms * padded);
        pack_taps<rows.value, T>(u.get(), pass, points, packed.get());
        const int64_t per_pixel = (pass.channels * pass.h.axis.stride * pass.w.axis.stride + padded) * sizeof(T);
        const Bands bands = make_bands(pass.h.outputs(), pass.w.outputs(), window, pass.batch, per_pixel, 2 * kCacheBudget, rows.value);
        taps_pass<rows.value, T>(pass, bands, points, packed.get(), u.get(), source, make_sink(bands));
      };
      if (rows_of_tiles(pass) == 3)
        run_taps(std::integral_constant<int, 3>{});
      else
        run_taps(std::integral_constant<int, 2>{});
      return;
    }
  }
  const auto run_direct = [&](const auto* weights_as_multiplied) {
    using M = std::remove_const_t<std::remove_pointer_t<decltype(weights_as_multiplied)>>;
    const int64_t per_pixel = block_channels<T, M>(pass.channels) * sizeof(M) + padded * sizeof(T);
    const Bands bands = direct_bands<T>(pass, window, per_pixel, kCacheBudget);
    direct_pass<T, M>(pass, bands, weights_as_multiplied, source, make_sink(bands));
  };
#if ISA_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<S, bfloat16> && std::is_same_v<typename Source::Stored, bfloat16>)
    if (row_pairs_apply<T, S>(pass) && source.plain() && is_dense_and_finite(*source.plain(), pass.batch)) {
      const Pass rows = pass_of_rows(pass);
      Scratch<bfloat16> pairs(packed_weights_size<T>(pass_of_pairs(rows)));
      pack_pairs<T>(pairs.get(), rows, packed.get());
      const int64_t per_pixel = pass.channels * sizeof(bfloat16) + padded * sizeof(T);
      const Bands bands = direct_bands<T>(pass, window, per_pixel, kCacheBudget);
      row_pairs_pass<T>(pass, bands, pairs.get(), source, make_sink(bands));
      return;
    }
  if constexpr (std::is_same_v<S, bfloat16>)
    if (pairs_apply<S>(pass)) {
      Scratch<bfloat16> pairs(packed_weights_size<T>(pass_of_pairs(pass)));
      pack_pairs<T>(pairs.get(), pass, packed.get());
      run_direct(static_cast<const bfloat16*>(pairs.get()));
      return;
    }
#endif
  run_direct(static_cast<const T*>(packed.get()));
}
