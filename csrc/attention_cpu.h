// Packed attention on the CPU: the problem as the kernels see it.
//
//   s_ij = scale * q_i . k_j, capped, biased; p_ij = exp(s_ij - lse_i) where k_start_i <= j < k_end_i; out_i = sum_j p_ij v_j
//   ds_ij = p_ij * (dout_i . v_j - delta_i); dq_i = scale * sum_j ds_ij k_j; dk_j, dv_j likewise over i
//
// Everything inside is float32. Lanes are rows (token, head of a group of query heads) of the query side.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PACKATTN_X86 1
#else
#define PACKATTN_X86 0
#endif

namespace packattn {

// Half precision as the compiler has it; g++ for ARM knew no _Float16 before version 13.
#if defined(__aarch64__)
#define PACKATTN_FLOAT16 1
typedef __fp16 Float16;
#elif defined(__FLT16_MANT_DIG__)
#define PACKATTN_FLOAT16 1
typedef _Float16 Float16;
#else
#define PACKATTN_FLOAT16 0
#endif

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  static BFloat16 rounded(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    if ((wide & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((wide >> 16) | 0x40u)};  // stays a NaN
    return {static_cast<uint16_t>((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16)};
  }
};

// A tensor (tokens, heads, dim) with any token and head stride, in elements.
template <class T>
struct View {
  T* data = nullptr;
  int64_t token_stride = 0, head_stride = 0;
  T* at(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

constexpr int64_t kTileLanes = 64;    // lanes of a tile
constexpr int64_t kTilesInGroup = 4;  // tiles of queries that share one read of the keys (forward: or twice as many)
constexpr int64_t kBlockKeys = 96;    // keys of a block

template <class T>
struct Problem {
  int64_t tokens, tokens_k, heads_q, heads_k, head_dim, head_dim_v;
  View<const T> q, k, v, out, dout;
  View<T> out_w, dq, dk, dv;
  float* lse_w = nullptr;                             // (heads_q, tokens)
  const float *lse = nullptr, *dlse = nullptr;        // likewise; dlse may be null
  float* delta = nullptr;                             // likewise: out . dout - dlse, written if not null
  const int32_t *k_start, *k_end, *q_start, *q_end;   // spans
  const float* sinks = nullptr;                       // (heads_q,) or null
  View<const float> slopes;                           // ALiBi: (tokens, heads_q), any strides; data may be null
  const int32_t* anchors = nullptr;                   // ALiBi: the key at which each query stands
  float scale, softcap, keep_scale;                   // keep_scale = 1 / (1 - dropout_p)
  bool dropout = false;
  uint32_t key0 = 0, key1 = 0, threshold = 0;         // Philox key; words below threshold are dropped

  int64_t group() const { return heads_q / heads_k; }
  // Tokens whose rows fill a group of tiles.
  int64_t step() const {
    const int64_t tokens = kTilesInGroup * kTileLanes / group();
    return tokens > 1 ? tokens : 1;
  }
  float bias(int64_t query, int64_t key, int64_t head) const {
    return -*slopes.at(query, head) * static_cast<float>(std::abs(anchors[query] - key));
  }
};

// The unit of work: queries of one group of heads. In the backward pass a run of queries and the keys that they see, or
// a piece of it: the gradients of these queries, or those of these keys. Every sum's order is that of the whole run.
struct Unit {
  int64_t head_k, begin, end;              // queries
  int64_t key_base, key_begin, key_end;    // backward: first key of the run, keys of the piece
  bool queries, keys;                      // backward: whose gradients
  int64_t cost;                            // scores, and what a row costs by itself
};

// What one instruction set offers: a unit's work, and the floats of scratch that it needs.
template <class T>
struct Kernels {
  using Run = void (*)(const Problem<T>&, const Unit&, float*);
  using Size = int64_t (*)(const Problem<T>&, const Unit&);
  Run forward, backward;
  Size forward_scratch, backward_scratch;
};

#if PACKATTN_X86
namespace avx512 {
template <class T>
Kernels<T> kernels();
}
namespace avx512bf16 {
template <class T>
Kernels<T> kernels();
}
namespace avx512pairs {
template <class T>
Kernels<T> kernels();
}
namespace avx2 {
template <class T>
Kernels<T> kernels();
}
#endif
namespace portable {
template <class T>
Kernels<T> kernels();
}

// The first word of Philox4x32-10 for the counter (query, key, head, 0).
inline uint32_t philox(uint32_t key0, uint32_t key1, uint32_t query, uint32_t key, uint32_t head) {
  uint32_t c0 = query, c1 = key, c2 = head, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p2 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p2 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(p2);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(p0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c0;
}

}  // namespace packattn
