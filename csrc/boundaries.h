// The boundary rule (packattn/boundaries.py states it) on position ids and padding in memory, for C++ and CUDA alike.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PACKATTN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PACKATTN_HOST_DEVICE inline
#endif

namespace packattn {

// Rows of position ids and, if mask is not null, of an attention mask; strides in elements, any layout.
struct Rows {
  const void* position_ids;
  int64_t position_row_stride, position_stride;
  const void* mask;
  int64_t mask_row_stride, mask_stride;
  int64_t n;  // tokens in a row
  int32_t tokens;
  int32_t position_bytes;  // 4 or 8
  int32_t mask_bytes;      // 1, 4 or 8

  PACKATTN_HOST_DEVICE bool first_of_row(int64_t i) const { return i % n == 0; }

  // A token that goes on where the one before it in its row stopped. The sum wraps in the dtype of the positions.
  PACKATTN_HOST_DEVICE bool continues(int64_t i) const {
    if (first_of_row(i)) return false;
    const int64_t at = (i / n) * position_row_stride + (i % n) * position_stride;
    if (position_bytes == 4) {
      const auto* p = static_cast<const uint32_t*>(position_ids);
      return p[at] == p[at - position_stride] + 1u;
    }
    const auto* p = static_cast<const uint64_t*>(position_ids);
    return p[at] == p[at - position_stride] + 1u;
  }

  PACKATTN_HOST_DEVICE bool real(int64_t i) const {
    if (mask == nullptr) return true;
    const int64_t at = (i / n) * mask_row_stride + (i % n) * mask_stride;
    if (mask_bytes == 1) return static_cast<const uint8_t*>(mask)[at] != 0;
    if (mask_bytes == 4) return static_cast<const uint32_t*>(mask)[at] != 0;
    return static_cast<const uint64_t*>(mask)[at] != 0;
  }

  PACKATTN_HOST_DEVICE bool after_padding(int64_t i) const { return !first_of_row(i) && !real(i - 1); }

  // The first token of a sequence.
  PACKATTN_HOST_DEVICE bool starts(int64_t i) const { return real(i) && (!continues(i) || after_padding(i)); }

  // The first token of a sequence or of a run of padding.
  PACKATTN_HOST_DEVICE bool begins(int64_t i) const { return real(i) ? starts(i) : i == 0 || real(i - 1); }
};

// What the operator returns, tokens elements each but for cu_seqlens (tokens + 1) and summary (4).
struct Found {
  int32_t *seq_start, *seq_end, *cu_seqlens, *summary;
};

}  // namespace packattn
