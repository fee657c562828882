// Native ops lstm_cell_step_fwd and lstm_cell_step_bwd: checks, allocation, launch and registration of lstm_cell.cuh.
#include "lstm_cell.cuh"

#include "host.h"

namespace bmk {

namespace {

constexpr unsigned kMostRowBlocks = 65535;  // of a grid's second dimension

dim3 cell_grid(int64_t batch, int64_t hidden) {
  return dim3(blocks_for(hidden, kCellUnits), std::min(blocks_for(batch, kCellRows), kMostRowBlocks));
}

}  // namespace

// Returns (h_new, c_new, gates, cells); the last two have a leading dimension of 1, or of 0 without `save`.
std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_cell_step_fwd(const Tensor& from_input, const Tensor& from_state, const Tensor& c,
                                                              const std::optional<Tensor>& b_ih, const std::optional<Tensor>& b_hh,
                                                              bool save) {
  CHECK_DIM(c, 2);
  const int64_t batch = c.size(0), hidden = c.size(1);
  for (const Tensor* product : {&from_input, &from_state}) {
    CHECK_CUDA(*product);
    CHECK_SHAPE(*product, batch, 4 * hidden);
    CHECK_DTYPE_IS(*product, ScalarType::Float);
    CHECK_CONTIGUOUS(*product);
  }
  CHECK_CUDA(c);
  CHECK_CONTIGUOUS(c);
  STD_TORCH_CHECK(b_ih.has_value() == b_hh.has_value(), "b_ih and b_hh must be given both or neither");
  for (const std::optional<Tensor>* bias : {&b_ih, &b_hh})
    if (*bias) {
      CHECK_CUDA(**bias);
      CHECK_SHAPE(**bias, 4 * hidden);
      CHECK_SAME_DTYPE(**bias, c);
      CHECK_CONTIGUOUS(**bias);
    }
  const int64_t kept = save ? 1 : 0;
  Tensor h_new = torch::stable::new_empty(c, {batch, hidden}), c_new = torch::stable::new_empty(c, {batch, hidden});
  Tensor gates = torch::stable::new_empty(from_input, {kept, batch, 4 * hidden});
  Tensor cells = torch::stable::new_empty(from_input, {kept, batch, hidden});
  if (batch * hidden > 0) {
    const OnDeviceOf device(c);
    DISPATCH_CUDA(c.scalar_type(), "lstm_cell", [&] {
      const LstmCellForward<scalar_t> p{batch,
                                        hidden,
                                        data<float>(from_input),
                                        data<float>(from_state),
                                        data<scalar_t>(b_ih),
                                        data<scalar_t>(b_hh),
                                        data<scalar_t>(c),
                                        mutable_data<scalar_t>(h_new),
                                        mutable_data<scalar_t>(c_new),
                                        save ? mutable_data<float>(gates) : nullptr,
                                        save ? mutable_data<float>(cells) : nullptr};
      lstm_cell_forward<<<cell_grid(batch, hidden), dim3(kCellUnits, kCellRows), 0, device.stream()>>>(p);
    });
    check_cuda(cudaGetLastError(), "lstm_cell_step_fwd");
  }
  return {h_new, c_new, gates, cells};
}

// Returns (d_gates, before activation, and d_c, of the state before the step).
std::tuple<Tensor, Tensor> lstm_cell_step_bwd(const std::optional<Tensor>& d_h, const std::optional<Tensor>& d_c, const Tensor& gates,
                                              const Tensor& cells, const Tensor& c) {
  CHECK_DIM(c, 2);
  const int64_t batch = c.size(0), hidden = c.size(1);
  CHECK_SHAPE(gates, 1, batch, 4 * hidden);
  CHECK_SHAPE(cells, 1, batch, hidden);
  for (const Tensor* saved : {&gates, &cells}) {
    CHECK_CUDA(*saved);
    CHECK_DTYPE_IS(*saved, ScalarType::Float);
    CHECK_CONTIGUOUS(*saved);
  }
  CHECK_CUDA(c);
  CHECK_CONTIGUOUS(c);
  for (const std::optional<Tensor>* gradient : {&d_h, &d_c})
    if (*gradient) {
      CHECK_CUDA(**gradient);
      CHECK_SHAPE(**gradient, batch, hidden);
      CHECK_SAME_DTYPE(**gradient, c);
      CHECK_CONTIGUOUS(**gradient);
    }
  Tensor d_gates = torch::stable::new_empty(c, {batch, 4 * hidden}), d_c_before = torch::stable::new_empty(c, {batch, hidden});
  if (batch * hidden > 0) {
    const OnDeviceOf device(c);
    DISPATCH_CUDA(c.scalar_type(), "lstm_cell", [&] {
      const LstmCellBackward<scalar_t> p{batch,
                                         hidden,
                                         data<scalar_t>(d_h),
                                         data<scalar_t>(d_c),
                                         data<float>(gates),
                                         data<float>(cells),
                                         data<scalar_t>(c),
                                         mutable_data<scalar_t>(d_gates),
                                         mutable_data<scalar_t>(d_c_before)};
      lstm_cell_backward<<<cell_grid(batch, hidden), dim3(kCellUnits, kCellRows), 0, device.stream()>>>(p);
    });
    check_cuda(cudaGetLastError(), "lstm_cell_step_bwd");
  }
  return {d_gates, d_c_before};
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "lstm_cell_step_fwd(Tensor from_input, Tensor from_state, Tensor c, Tensor? b_ih, Tensor? b_hh, bool save) -> "
      "(Tensor h_new, Tensor c_new, Tensor gates, Tensor cells)");
  m.def("lstm_cell_step_bwd(Tensor? d_h, Tensor? d_c, Tensor gates, Tensor cells, Tensor c) -> (Tensor d_gates, Tensor d_c_before)");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CUDA, m) {
  m.impl("lstm_cell_step_fwd", TORCH_BOX(&bmk::lstm_cell_step_fwd));
  m.impl("lstm_cell_step_bwd", TORCH_BOX(&bmk::lstm_cell_step_bwd));
}
