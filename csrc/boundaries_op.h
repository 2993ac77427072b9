// The operator packattn::boundaries around an implementation: argument checks, Rows, allocation. Shared by C++ and CUDA.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>

#include "boundaries.h"

namespace packattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Boundaries = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// find(rows, found, like) fills the results; it is not called for zero tokens.
template <class Find>
Boundaries boundaries_op(const Tensor& position_ids, const std::optional<Tensor>& attention_mask, Find find) {
  const ScalarType type = position_ids.scalar_type();
  STD_TORCH_CHECK(position_ids.dim() == 2, "position_ids must have shape (rows, n), got ", position_ids.dim(),
                  " dimensions");
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, "position_ids must be int32 or int64");
  STD_TORCH_CHECK(position_ids.numel() < INT32_MAX, "position_ids must hold fewer than 2**31 tokens, got ",
                  position_ids.numel());
  Rows rows{};
  rows.position_ids = position_ids.const_data_ptr();
  rows.position_row_stride = position_ids.stride(0);
  rows.position_stride = position_ids.stride(1);
  rows.position_bytes = static_cast<int32_t>(position_ids.element_size());
  rows.n = position_ids.size(1);
  rows.tokens = static_cast<int32_t>(position_ids.numel());
  if (attention_mask.has_value()) {
    const Tensor& mask = *attention_mask;
    const ScalarType mask_type = mask.scalar_type();
    STD_TORCH_CHECK(mask_type == ScalarType::Bool || mask_type == ScalarType::Int || mask_type == ScalarType::Long,
                    "attention_mask must be bool, int32 or int64");
    STD_TORCH_CHECK(mask.dim() == 2 && mask.size(0) == position_ids.size(0) && mask.size(1) == rows.n,
                    "attention_mask must have the shape of position_ids");
    STD_TORCH_CHECK(mask.device() == position_ids.device(), "attention_mask must be on the device of position_ids");
    rows.mask = mask.const_data_ptr();
    rows.mask_row_stride = mask.stride(0);
    rows.mask_stride = mask.stride(1);
    rows.mask_bytes = static_cast<int32_t>(mask.element_size());
  }
  const auto int32s = [&](int64_t size) { return torch::stable::new_empty(position_ids, {size}, ScalarType::Int); };
  if (rows.tokens == 0) {
    const auto zeros = [&](int64_t size) { return torch::stable::new_zeros(position_ids, {size}, ScalarType::Int); };
    return {int32s(0), int32s(0), zeros(1), zeros(4)};
  }
  Tensor seq_start = int32s(rows.tokens), seq_end = int32s(rows.tokens);
  Tensor cu_seqlens = int32s(int64_t{rows.tokens} + 1), summary = int32s(4);
  const auto data = [](const Tensor& x) { return static_cast<int32_t*>(x.mutable_data_ptr()); };
  find(rows, Found{data(seq_start), data(seq_end), data(cu_seqlens), data(summary)}, position_ids);
  return {seq_start, seq_end, cu_seqlens, summary};
}

}  // namespace packattn
