// Bytes of dynamic shared memory that the launchers in csrc/cuda/*.cu ask for, by the same functions, for tests of the plans in Python.
#pragma once

#include "attention_decode.cuh"
#include "conv_stem.cuh"
#include "conv_stem_backward.cuh"
#include "conv_step.cuh"
#include "lstm_backward.cuh"
#include "lstm_forward.cuh"

namespace bmk {

template <class T, int kChannels, bool kSave>
__global__ void stem_bytes(StemForward<T> p, int* bytes) {
  *bytes = StemTile(p).shared_bytes(kChannels, sizeof(T), sizeof(StemFull<T, kSave>));
}

template <class T, int kChannels>
__global__ void stem_weights_bytes(StemWeights<T> p, int* bytes) {
  *bytes = StemWeightsTile(p).shared_bytes(kChannels, sizeof(T));
}

template <class T>
__global__ void step_bytes(ConvStep<T> p, int sequences, int* bytes) {
  *bytes = static_cast<int>(p.shared_bytes(sequences));
}

template <class T>
__global__ void lstm_bytes(bool forward, Scope scope, int hidden, int registers, int warps, int* bytes) {
  *bytes = (forward ? lstm_forward_plan<T> : lstm_backward_plan<T>)(scope, hidden, registers, warps).shared_bytes;
}

template <Cache cache, int kHeadDim>
__global__ void decode_bytes(int* bytes) {
  *bytes = DecodeStage<cache, kHeadDim>::kShared;
}

}  // namespace bmk
