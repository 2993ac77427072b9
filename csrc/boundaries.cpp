// packattn::boundaries on the CPU: one pass over the tokens.
#include <algorithm>

#include "boundaries_op.h"

namespace packattn {
namespace {

void find(const Rows& rows, const Found& found, const Tensor&) {
  int32_t sequences = 0, longest = 0, holes = 0, padding = 0;
  int32_t start = 0, run_start = 0, last_real = -1;
  const auto close = [&](int32_t end) {
    const bool sequence = rows.real(start);
    std::fill(found.seq_start + start, found.seq_start + end, start);
    std::fill(found.seq_end + start, found.seq_end + end, sequence ? end : start);
    if (sequence) longest = std::max(longest, end - start);
  };
  for (int32_t i = 0; i < rows.tokens; ++i) {
    if (!rows.continues(i)) run_start = i;
    if (rows.begins(i)) {
      if (i > 0) close(i);
      start = i;
      if (rows.real(i)) found.cu_seqlens[sequences++] = i - padding;
    }
    if (rows.real(i)) {
      // Padding between two real tokens of one run of positions: a gap that no span can express.
      holes += rows.after_padding(i) && last_real >= run_start;
      last_real = i;
    } else {
      ++padding;
    }
  }
  close(rows.tokens);
  std::fill(found.cu_seqlens + sequences, found.cu_seqlens + rows.tokens + 1, rows.tokens - padding);
  const int32_t summary[] = {sequences, longest, holes, padding};
  std::copy(summary, summary + 4, found.summary);
}

Boundaries boundaries_cpu(const Tensor& position_ids, const std::optional<Tensor>& attention_mask) {
  return boundaries_op(position_ids, attention_mask, find);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(packattn, CPU, m) { m.impl("boundaries", TORCH_BOX(&boundaries_cpu)); }

}  // namespace packattn
