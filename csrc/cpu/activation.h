// Activations by name. Their vector forms are in activation_kernel.h.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <string>
#include <utility>

namespace bmk {

enum class Activation { none, relu, leaky_relu, tanh, sigmoid, gelu, silu, tanh_sigmoid };

inline Activation parse_activation(const std::string& name) {
  static const std::pair<const char*, Activation> kNames[] = {{"none", Activation::none},
                                                              {"relu", Activation::relu},
                                                              {"leaky_relu", Activation::leaky_relu},
                                                              {"tanh", Activation::tanh},
                                                              {"sigmoid", Activation::sigmoid},
                                                              {"gelu", Activation::gelu},
                                                              {"silu", Activation::silu},
                                                              {"tanh_sigmoid", Activation::tanh_sigmoid}};
  for (const auto& [known, activation] : kNames)
    if (name == known) return activation;
  STD_TORCH_CHECK(false, "activation: unknown name ", name);
}

}  // namespace bmk
