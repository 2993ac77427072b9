// packattn._C_cuda: packattn::boundaries for CUDA tensors.
#include <Python.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "boundaries_kernel.cuh"
#include "boundaries_op.h"

namespace packattn {
namespace {

void find(const Rows& rows, const Found& found, const Tensor& like) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  const int64_t tiles = (int64_t{rows.tokens} + kThreads - 1) / kThreads;
  const int64_t chunk = (tiles + kMaxBlocks - 1) / kMaxBlocks * kThreads;
  const int64_t blocks = (int64_t{rows.tokens} + chunk - 1) / chunk;
  Tensor workspace = torch::stable::new_empty(like, {blocks * int64_t{sizeof(Aggregate) / 4}}, ScalarType::Int);
  auto* aggregates = static_cast<Aggregate*>(workspace.mutable_data_ptr());
  const auto s = static_cast<cudaStream_t>(stream);
  boundaries_reduce<<<blocks, kThreads, 0, s>>>(rows, static_cast<int32_t>(chunk), aggregates, found.summary);
  boundaries_scan<<<blocks, kThreads, 0, s>>>(rows, static_cast<int32_t>(chunk), aggregates, found);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "packattn::boundaries did not launch: ", cudaGetErrorString(error));
}

Boundaries boundaries_cuda(const Tensor& position_ids, const std::optional<Tensor>& attention_mask) {
  return boundaries_op(position_ids, attention_mask, find);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(packattn, CUDA, m) { m.impl("boundaries", TORCH_BOX(&boundaries_cuda)); }

}  // namespace packattn

extern "C" PyObject* PyInit__C_cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", "CUDA operators of packattn.", -1, nullptr,
                               nullptr,               nullptr,   nullptr, nullptr};
  return PyModule_Create(&module);
}
