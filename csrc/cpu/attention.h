// Attention without gradients, for the ops that have it among their steps.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "attention_tasks.h"

namespace bmk {

void run_attention(const AttentionForward& problem, torch::headeronly::ScalarType dtype);

// Of up to kFewRows queries a group; out and lse as of AttentionForward.
void run_decode(const AttentionArgs& a, const AttentionCache& cache, void* out, void* lse, torch::headeronly::ScalarType dtype);

}  // namespace bmk
