// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project

// Attention over packed sequences on a CPU, with its gradient.
//
// One task is one sequence and one KV head, with all query heads that share it, so
// that K and V are packed once. Where that leaves threads idle, tasks are ranges of
// queries; in the backward, ranges of queries for dQ and ranges of keys for dK and
// dV. No sum crosses tasks, and tiles lie where they lie in a whole sequence: the
// bits do not depend on the number of threads. A tile is kTile query rows, a row
// being one token and one head of the group, by kTile keys. The forward keeps a
// running softmax and the log-sum-exp; the backward recomputes the probabilities
// (FlashAttention-2, https://arxiv.org/abs/2307.08691). Products are oneDNN's
// batch-reduce kernels, which use AMX tiles for bfloat16, in float32 sums. Shapes of
// tiles are rounded up, because oneDNN compiles a kernel for each shape.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

#include "multiversion.h"

namespace {

using at::BFloat16;
using at::Tensor;
namespace blas = at::native::cpublas;

constexpr int64_t kTile = 128;  // query rows, and keys, in a tile
constexpr int64_t kPanel = 64;  // columns of a packed right-hand side
constexpr int64_t kRound = 32;  // rows are rounded up to a multiple of it
constexpr int64_t kTerms = 64;  // products that are added one after another
constexpr float kInfinity = std::numeric_limits<float>::infinity();

INLINE int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

INLINE int64_t round_down(int64_t x, int64_t multiple) {
  return x / multiple * multiple;
}

INLINE int64_t panel_width(int64_t head_dim) {
  return head_dim % kPanel == 0 ? kPanel : kRound;
}

// ---- Elements -------------------------------------------------------------------

// e^x for x <= 0, to 2 units in the last place; below -87 it is e^-87.
INLINE float exp_nonpositive(float x) {
  x = x < -87.f ? -87.f : x;
  float n = x * 1.442695041f + 12582912.f;  // 1.5 * 2^23 rounds to an integer
  int32_t bits;
  std::memcpy(&bits, &n, 4);
  n -= 12582912.f;
  // x - n * ln 2, in two parts
  float r = x - n * 0.693359375f;
  r += n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  int32_t exponent = (bits - 0x4B400000 + 127) << 23;
  float power;
  std::memcpy(&power, &exponent, 4);
  return p * power;
}

// The same to 3e-6, which is enough for a result in bfloat16.
INLINE float exp_coarse(float x) {
  x = x < -87.f ? -87.f : x;
  float n = x * 1.442695041f + 12582912.f;
  int32_t bits;
  std::memcpy(&bits, &n, 4);
  float r = x * 1.442695041f - (n - 12582912.f);
  float p = 0.0095701f;
  p = p * r + 0.05591786f;
  p = p * r + 0.24024745f;
  p = p * r + 0.69312181f;
  p = p * r + 0.99999926f;
  int32_t power;
  std::memcpy(&power, &p, 4);
  power += bits << 23;
  std::memcpy(&p, &power, 4);
  return p;
}

template <typename T>
INLINE float exp_for(float x) {
  return std::is_same_v<T, BFloat16> ? exp_coarse(x) : exp_nonpositive(x);
}

INLINE float load(const float* from) { return *from; }
INLINE float load(const BFloat16* from) {
  uint32_t bits = uint32_t(*reinterpret_cast<const uint16_t*>(from)) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

INLINE void store(float* to, float x) { *to = x; }
INLINE void store(BFloat16* to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // To nearest, ties to even. It is no special case of NaN: one from bfloat16 ends in
  // zeros, as does one that arithmetic makes, so that it stays one.
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *reinterpret_cast<uint16_t*>(to) = uint16_t(rounded);
}

// ---- Which keys a query sees ----------------------------------------------------

struct Range {  // of the tokens of a sequence
  int64_t begin;
  int64_t end;

  int64_t size() const { return end - begin; }
};

struct Mask {
  int64_t length;
  int64_t window;  // -1 for none
  bool causal;

  INLINE int64_t first_key(int64_t token) const {
    return window < 0 ? 0 : std::max<int64_t>(0, token - window + 1);
  }
  INLINE int64_t end_key(int64_t token) const {
    if (causal) return token + 1;
    return window < 0 ? length : std::min(length, token + window);
  }
  INLINE int64_t first_token(int64_t key) const {
    if (causal) return key;
    return window < 0 ? 0 : std::max<int64_t>(0, key - window + 1);
  }
  INLINE int64_t end_token(int64_t key) const {
    if (key >= length) return 0;
    return window < 0 ? length : std::min(length, key + window);
  }
  Range keys_of(Range tokens) const {
    return {first_key(tokens.begin), end_key(tokens.end - 1)};
  }
  Range tokens_of(Range keys) const {
    return {first_token(keys.begin), end_token(keys.end - 1)};
  }
};

// ---- Vectorized loops -----------------------------------------------------------

// Scores of rows x keys -> unnormalized probabilities, in the running softmax of
// `maximum` and `sum`; `out` is rescaled where the maximum rose.
template <typename T>
INLINE void softmax_rows(const float* scores, T* probs, int64_t rows,
                         int64_t group, int64_t token, int64_t key,
                         int64_t keys, Mask mask, float scale, float* maximum,
                         float* sum, float* out, int64_t head_dim, bool first) {
  auto seen_by = [&](int64_t r) {
    int64_t t = token + r / group;
    int64_t lo = std::clamp<int64_t>(mask.first_key(t) - key, 0, keys);
    return Range{lo, std::clamp<int64_t>(mask.end_key(t) - key, lo, keys)};
  };
  // A loop of its own, so that rows do not wait for each other's maximum.
  float highest[kTile];
  for (int64_t r = 0; r < rows; ++r) {
    const float* s = scores + r * kTile;
    auto [lo, hi] = seen_by(r);
    float most = -kInfinity;
#pragma omp simd reduction(max : most)
    for (int64_t j = lo; j < hi; ++j) most = std::max(most, s[j] * scale);
    highest[r] = most;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float* s = scores + r * kTile;
    T* p = probs + r * kTile;
    auto [lo, hi] = seen_by(r);
    float before = maximum[r];
    float now = std::max(before, highest[r]);
    for (int64_t j = 0; j < lo; ++j) store(p + j, 0.f);
    float total = 0.f;
#pragma omp simd reduction(+ : total)
    for (int64_t j = lo; j < hi; ++j) {
      float e = exp_for<T>(s[j] * scale - now);
      total += e;
      store(p + j, e);
    }
    for (int64_t j = hi; j < keys; ++j) store(p + j, 0.f);
    if (lo == hi) continue;
    float factor = before == now ? 1.f : exp_nonpositive(before - now);
    sum[r] = sum[r] * factor + total;
    maximum[r] = now;
    if (first || factor == 1.f) continue;
    float* o = out + r * head_dim;
#pragma omp simd
    for (int64_t c = 0; c < head_dim; ++c) o[c] *= factor;
  }
}

MULTIVERSION void softmax(const float* scores, float* probs, int64_t rows,
                          int64_t group, int64_t token, int64_t key,
                          int64_t keys, Mask mask, float scale, float* maximum,
                          float* sum, float* out, int64_t head_dim,
                          bool first) {
  softmax_rows(scores, probs, rows, group, token, key, keys, mask, scale,
               maximum, sum, out, head_dim, first);
}

MULTIVERSION void softmax(const float* scores, BFloat16* probs, int64_t rows,
                          int64_t group, int64_t token, int64_t key,
                          int64_t keys, Mask mask, float scale, float* maximum,
                          float* sum, float* out, int64_t head_dim,
                          bool first) {
  softmax_rows(scores, probs, rows, group, token, key, keys, mask, scale,
               maximum, sum, out, head_dim, first);
}

// Scores and dP of keys x rows -> P and dS. Rows of one token lie side by side, so
// those that see a key are one range.
template <typename T>
INLINE void differentiate_key(const float* scores, const float* grad_probs,
                              T* probs, T* grad_scores, int64_t key,
                              int64_t token, int64_t tokens, int64_t group,
                              int64_t rows, Mask mask, float scale,
                              const float* lse, const float* delta) {
  int64_t lo = std::clamp<int64_t>(mask.first_token(key) - token, 0, tokens);
  int64_t hi = std::clamp<int64_t>(mask.end_token(key) - token, lo, tokens);
  lo *= group;
  hi *= group;
  for (int64_t r = 0; r < lo; ++r) {
    store(probs + r, 0.f);
    store(grad_scores + r, 0.f);
  }
#pragma omp simd
  for (int64_t r = lo; r < hi; ++r) {
    float p = exp_for<T>(scores[r] * scale - lse[r]);
    store(probs + r, p);
    store(grad_scores + r, p * (grad_probs[r] - delta[r]) * scale);
  }
  for (int64_t r = hi; r < rows; ++r) {
    store(probs + r, 0.f);
    store(grad_scores + r, 0.f);
  }
}

MULTIVERSION void differentiate(const float* scores, const float* grad_probs,
                                float* probs, float* grad_scores, float*,
                                int64_t key, int64_t keys, int64_t token,
                                int64_t tokens, int64_t group, int64_t rows,
                                Mask mask, float scale, const float* lse,
                                const float* delta) {
  for (int64_t j = 0; j < keys; ++j) {
    int64_t at = j * kTile;
    differentiate_key(scores + at, grad_probs + at, probs + at,
                      grad_scores + at, key + j, token, tokens, group, rows,
                      mask, scale, lse, delta);
  }
}

// Also packs dS as a right-hand side: panels of [keys, kPanel], keys in pairs.
MULTIVERSION void differentiate(const float* scores, const float* grad_probs,
                                BFloat16* probs, BFloat16* grad_scores,
                                BFloat16* packed, int64_t key, int64_t keys,
                                int64_t token, int64_t tokens, int64_t group,
                                int64_t rows, Mask mask, float scale,
                                const float* lse, const float* delta) {
  for (int64_t j = 0; j < keys; ++j) {
    int64_t at = j * kTile;
    differentiate_key(scores + at, grad_probs + at, probs + at,
                      grad_scores + at, key + j, token, tokens, group, rows,
                      mask, scale, lse, delta);
    if (j % 2 == 0) continue;
    auto* odd = reinterpret_cast<const uint16_t*>(grad_scores + at);
    auto* even = odd - kTile;
    for (int64_t r0 = 0; r0 < rows; r0 += kPanel) {
      auto* to =
          reinterpret_cast<uint32_t*>(packed + r0 * kTile + (j - 1) * kPanel);
#pragma omp simd
      for (int64_t r = 0; r < kPanel; ++r) {
        to[r] = uint32_t(even[r0 + r]) | uint32_t(odd[r0 + r]) << 16;
      }
    }
  }
}

template <typename T>
INLINE float dot(const T* a, const T* b, int64_t n) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += load(a + i) * load(b + i);
  return sum;
}

// ---- Packing of operands --------------------------------------------------------

// [rows, head_dim] by strides -> contiguous, padded with rows of zeros
template <typename T>
void gather(const T* from, int64_t token_stride, int64_t head_stride,
            int64_t group, int64_t rows, int64_t padded, int64_t head_dim,
            T* to) {
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(
        to + r * head_dim,
        from + r / group * token_stride + r % group * head_stride,
        head_dim * sizeof(T));
  }
  std::memset(to + rows * head_dim, 0,
              (padded - rows) * head_dim * sizeof(T));
}

// Contiguous [rows, units] -> panels of [units, kPanel]. A unit is a float or a pair
// of bfloat16, which is how oneDNN wants a right-hand side.
MULTIVERSION void transpose_units(const uint32_t* from, int64_t rows,
                                  int64_t units, uint32_t* to) {
  for (int64_t r0 = 0; r0 < rows; r0 += kPanel) {
    for (int64_t u0 = 0; u0 < units; u0 += 16) {
      for (int64_t r = 0; r < kPanel; r += 16) {
        for (int64_t u = u0; u < u0 + 16; ++u) {
          uint32_t* column = to + r0 * units + u * kPanel + r;
          const uint32_t* row = from + (r0 + r) * units + u;
#pragma omp simd
          for (int64_t i = 0; i < 16; ++i) column[i] = row[i * units];
        }
      }
    }
  }
}

// [rows, head_dim] -> panels of kPanel rows, each a right-hand side [head_dim, kPanel]
template <typename T>
void pack_transposed(const T* from, int64_t rows, int64_t head_dim, T* to) {
  transpose_units(reinterpret_cast<const uint32_t*>(from), rows,
                  head_dim * sizeof(T) / sizeof(uint32_t),
                  reinterpret_cast<uint32_t*>(to));
}

// [rows, head_dim] -> panels of `width` columns, each a right-hand side
// [capacity, width]
MULTIVERSION void pack(const float* from, int64_t rows, int64_t head_dim,
                       int64_t capacity, int64_t width, float* to) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < head_dim; c += width) {
      std::memcpy(to + c * capacity + r * width, from + r * head_dim + c,
                  width * sizeof(float));
    }
  }
}

MULTIVERSION void pack(const BFloat16* from, int64_t rows, int64_t head_dim,
                       int64_t capacity, int64_t width, BFloat16* to) {
  for (int64_t r = 0; r < rows; r += 2) {
    for (int64_t c0 = 0; c0 < head_dim; c0 += width) {
      auto* even = reinterpret_cast<const uint16_t*>(from + r * head_dim + c0);
      auto* odd = even + head_dim;
      auto* pairs =
          reinterpret_cast<uint32_t*>(to + c0 * capacity + r * width);
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) {
        pairs[c] = uint32_t(even[c]) | uint32_t(odd[c]) << 16;
      }
    }
  }
}

// [rows, head_dim] -> blocks of kTile rows, each a left-hand side [head_dim, kTile]
template <typename T>
void transpose_blocks(const T* from, int64_t rows, int64_t head_dim, T* to) {
  constexpr int64_t step = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += step) {
    T* block = to + r0 / kTile * kTile * head_dim + r0 % kTile;
    for (int64_t c = 0; c < head_dim; ++c) {
      for (int64_t r = 0; r < step; ++r) {
        block[c * kTile + r] = from[(r0 + r) * head_dim + c];
      }
    }
  }
}

// Row-major C[m, n] = A[m, k] B[k, n], plus C if `add`
//
// oneDNN adds an element's k products one after another, so that their rounding errors
// grow with k. In float32, where the result shows them, sums of kTerms products are
// added instead.
template <typename T>
INLINE void multiply(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda,
                     const T* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  constexpr bool pairs = std::is_same_v<T, BFloat16>;
  int64_t step = pairs ? k : std::min(k, kTerms);
  for (int64_t i = 0; i < k; i += step) {
    blas::brgemm(m, n, std::min(step, k - i), lda, ldb, ldc, add || i > 0,
                 a + i, b + i * ldb, c, /*is_vnni=*/pairs);
  }
}

// ---- Tasks ----------------------------------------------------------------------

struct Options {
  float scale;
  bool causal;
  int64_t window;
};

struct Task {
  int64_t start;  // the sequence's first token
  int64_t length;
  int64_t kv_head;
  Range queries;
  Range keys;
  bool grad_q = true;  // what a backward computes
  bool grad_kv = true;

  double work() const { return double(queries.size()) * keys.size(); }
};

// [0, length) in ranges of `size`, but of whole tiles.
std::vector<Range> ranges(int64_t length, double size, int64_t tile) {
  int64_t step = round_up(std::ceil(size), tile);
  std::vector<Range> result;
  for (int64_t at = 0; at < length; at += step) {
    result.push_back({at, std::min(at + step, length)});
  }
  return result;
}

// Long ones first, so that threads end together. Each has at most about half of a
// thread's share; but a backward is split only where much is won, because its parts
// compute the scores twice.
std::vector<Task> make_tasks(const Tensor& cu_seqlens, int64_t kv_heads,
                             Options options, int64_t tile_tokens,
                             bool backward) {
  const int32_t* offsets = cu_seqlens.const_data_ptr<int32_t>();
  int64_t sequences = cu_seqlens.numel() - 1;
  auto work = [&](int64_t length) {
    int64_t seen =
        options.window < 0 ? length : std::min(length, options.window);
    return double(length) * seen;
  };
  double total = 0;
  for (int64_t i = 0; i < sequences; ++i) {
    total += kv_heads * work(offsets[i + 1] - offsets[i]);
  }
  std::vector<Task> tasks;
  for (int64_t i = 0; i < sequences; ++i) {
    int64_t start = offsets[i], length = offsets[i + 1] - start;
    double shares = work(length) / total * at::get_num_threads();
    double size = length / (2 * shares);
    Mask mask{length, options.window, options.causal};
    for (int64_t head = 0; length > 0 && head < kv_heads; ++head) {
      if (shares <= (backward ? 2 : 0.5)) {
        tasks.push_back({start, length, head, {0, length}, {0, length}});
        continue;
      }
      for (Range tokens : ranges(length, size, tile_tokens)) {
        tasks.push_back({start, length, head, tokens, mask.keys_of(tokens),
                         /*grad_q=*/true, /*grad_kv=*/false});
      }
      if (!backward) continue;
      for (Range keys : ranges(length, size, kTile)) {
        tasks.push_back({start, length, head, mask.tokens_of(keys), keys,
                         /*grad_q=*/false, /*grad_kv=*/true});
      }
    }
  }
  std::stable_sort(
      tasks.begin(), tasks.end(),
      [](const Task& a, const Task& b) { return a.work() > b.work(); });
  return tasks;
}

// Keys of the longest task, from where a tile begins.
int64_t most_keys(const std::vector<Task>& tasks) {
  int64_t most = 0;
  for (const Task& task : tasks) {
    most = std::max(most, round_up(task.keys.end, kTile) -
                              round_down(task.keys.begin, kTile));
  }
  return most;
}

// Calls make_worker() on each thread, and what it returns with each of its tasks.
template <typename T, typename MakeWorker>
void run(const std::vector<Task>& tasks, const MakeWorker& make_worker) {
  std::atomic<size_t> next{0};
  int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks.size());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    auto work = make_worker();
    for (; begin < end; ++begin) {
      for (size_t i = next++; i < tasks.size(); i = next++) work(tasks[i]);
    }
    blas::brgemm_release(std::is_same_v<T, BFloat16>);
  });
}

// Memory of one thread, 64-byte aligned.
class Arena {
 public:
  template <typename T>
  T* take(int64_t count) {
    size_t bytes = count * sizeof(T);
    blocks_.emplace_back(new char[bytes + 64]);
    auto address = reinterpret_cast<uintptr_t>(blocks_.back().get());
    return reinterpret_cast<T*>((address + 63) & ~uintptr_t{63});
  }

 private:
  std::vector<std::unique_ptr<char[]>> blocks_;
};

// The rows of `x` that belong to one sequence and head.
template <typename T>
INLINE const T* rows_of(const Tensor& x, int64_t token, int64_t head) {
  return x.const_data_ptr<T>() + token * x.stride(0) + head * x.stride(1);
}

template <typename T>
void forward(const Tensor& q, const Tensor& k, const Tensor& v,
             const Tensor& cu_seqlens, Options options, Tensor& out,
             Tensor& lse) {
  int64_t heads = q.size(1), kv_heads = k.size(1), head_dim = q.size(2);
  int64_t group = heads / kv_heads, width = panel_width(head_dim);
  int64_t tile_tokens = kTile / group;
  auto tasks = make_tasks(cu_seqlens, kv_heads, options, tile_tokens, false);
  int64_t capacity = most_keys(tasks);
  T* out_data = out.mutable_data_ptr<T>();
  float* lse_data = lse.mutable_data_ptr<float>();

  run<T>(tasks, [&] {
    auto arena = std::make_shared<Arena>();
    T* gathered = arena->take<T>(capacity * head_dim);
    T* keys_t = arena->take<T>(capacity * head_dim);
    T* values = arena->take<T>(capacity * head_dim);
    T* queries = arena->take<T>(kTile * head_dim);
    float* scores = arena->take<float>(kTile * kTile);
    T* probs = arena->take<T>(kTile * kTile);
    float* sums = arena->take<float>(kTile * head_dim);
    float* maximum = arena->take<float>(kTile);
    float* total = arena->take<float>(kTile);
    // rows that pad a tile are multiplied too, but never read
    std::memset(probs, 0, kTile * kTile * sizeof(T));

    return [=, &q, &k, &v](const Task& task) {
      Mask mask{task.length, options.window, options.causal};
      int64_t base = round_down(task.keys.begin, kPanel);
      int64_t count = task.keys.end - base, padded = round_up(count, kPanel);
      gather(rows_of<T>(k, task.start + base, task.kv_head), k.stride(0), 0, 1,
             count, padded, head_dim, gathered);
      pack_transposed(gathered, padded, head_dim, keys_t);
      gather(rows_of<T>(v, task.start + base, task.kv_head), v.stride(0), 0, 1,
             count, padded, head_dim, gathered);
      pack(gathered, padded, head_dim, capacity, width, values);
      for (int64_t token = task.queries.begin; token < task.queries.end;
           token += tile_tokens) {
        int64_t tokens = std::min(tile_tokens, task.queries.end - token);
        int64_t rows = tokens * group, padded_rows = round_up(rows, kRound);
        gather(rows_of<T>(q, task.start + token, task.kv_head * group),
               q.stride(0), q.stride(1), group, rows, padded_rows, head_dim,
               queries);
        std::fill_n(maximum, rows, -kInfinity);
        std::fill_n(total, rows, 0.f);
        int64_t first = round_down(mask.first_key(token), kPanel);
        int64_t end = mask.end_key(token + tokens - 1);
        for (int64_t key = first; key < end; key += kTile) {
          int64_t keys = std::min(kTile, round_up(end - key, kPanel));
          for (int64_t j = 0; j < keys; j += kPanel) {
            multiply(padded_rows, kPanel, head_dim, queries, head_dim,
                     keys_t + (key - base + j) * head_dim, kPanel, scores + j,
                     kTile, false);
          }
          softmax(scores, probs, rows, group, token, key, keys, mask,
                  options.scale, maximum, total, sums, head_dim, key == first);
          for (int64_t c = 0; c < head_dim; c += width) {
            multiply(padded_rows, width, keys, probs, kTile,
                     values + c * capacity + (key - base) * width, width,
                     sums + c, head_dim, key != first);
          }
        }
        for (int64_t r = 0; r < rows; ++r) {
          int64_t row = (task.start + token + r / group) * heads +
                        task.kv_head * group + r % group;
          T* to = out_data + row * head_dim;
          float inverse = 1.f / total[r];
          for (int64_t c = 0; c < head_dim; ++c) {
            store(to + c, sums[r * head_dim + c] * inverse);
          }
          lse_data[row] = maximum[r] + std::log(total[r]);
        }
      }
      (void)arena;  // lives as long as this function
    };
  });
}

template <typename T>
void backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
              const Tensor& v, const Tensor& out, const Tensor& lse,
              const Tensor& cu_seqlens, Options options, Tensor& grad_q,
              Tensor& grad_k, Tensor& grad_v) {
  constexpr bool pairs = std::is_same_v<T, BFloat16>;
  int64_t heads = q.size(1), kv_heads = k.size(1), head_dim = q.size(2);
  int64_t group = heads / kv_heads, width = panel_width(head_dim);
  int64_t tile_tokens = kTile / group;
  auto tasks = make_tasks(cu_seqlens, kv_heads, options, tile_tokens, true);
  int64_t capacity = most_keys(tasks);
  const T* out_data = out.const_data_ptr<T>();
  const float* lse_data = lse.const_data_ptr<float>();
  T* grad_q_data = grad_q.mutable_data_ptr<T>();
  T* grad_k_data = grad_k.mutable_data_ptr<T>();
  T* grad_v_data = grad_v.mutable_data_ptr<T>();

  run<T>(tasks, [&] {
    auto arena = std::make_shared<Arena>();
    T* keys = arena->take<T>(capacity * head_dim);
    T* keys_t = arena->take<T>(capacity * head_dim);
    T* values = arena->take<T>(capacity * head_dim);
    float* keys_grad = arena->take<float>(capacity * head_dim);
    float* values_grad = arena->take<float>(capacity * head_dim);
    // of a tile of queries: as they are, transposed panels, panels
    T* queries = arena->take<T>(kTile * head_dim);
    T* queries_t = arena->take<T>(kTile * head_dim);
    T* queries_packed = arena->take<T>(kTile * head_dim);
    T* grads = arena->take<T>(kTile * head_dim);
    T* grads_t = arena->take<T>(kTile * head_dim);
    T* grads_packed = arena->take<T>(kTile * head_dim);
    float* queries_grad_t = arena->take<float>(kTile * head_dim);
    float* row_lse = arena->take<float>(kTile);
    float* delta = arena->take<float>(kTile);
    // of a tile, keys x rows
    float* scores = arena->take<float>(kTile * kTile);
    float* probs_grad = arena->take<float>(kTile * kTile);
    T* probs = arena->take<T>(kTile * kTile);
    T* scores_grad = arena->take<T>(kTile * kTile);
    T* scores_grad_packed = arena->take<T>(kTile * kTile);

    return [=, &grad_out, &q, &k, &v](const Task& task) {
      Mask mask{task.length, options.window, options.causal};
      int64_t base = round_down(task.keys.begin, kTile);
      int64_t present = task.keys.end - base, padded = round_up(present, kRound);
      gather(rows_of<T>(k, task.start + base, task.kv_head), k.stride(0), 0, 1,
             present, padded, head_dim, keys);
      gather(rows_of<T>(v, task.start + base, task.kv_head), v.stride(0), 0, 1,
             present, padded, head_dim, values);
      transpose_blocks(keys, padded, head_dim, keys_t);
      std::fill_n(keys_grad, padded * head_dim, 0.f);
      std::fill_n(values_grad, padded * head_dim, 0.f);
      for (int64_t token = round_down(task.queries.begin, tile_tokens);
           token < task.queries.end; token += tile_tokens) {
        int64_t tokens = std::min(tile_tokens, task.length - token);
        int64_t rows = tokens * group, padded_rows = round_up(rows, kPanel);
        int64_t head = task.kv_head * group;
        auto row_of = [&](int64_t r) {
          return (task.start + token + r / group) * heads + head + r % group;
        };
        gather(rows_of<T>(q, task.start + token, head), q.stride(0),
               q.stride(1), group, rows, padded_rows, head_dim, queries);
        gather(rows_of<T>(grad_out, task.start + token, head),
               grad_out.stride(0), grad_out.stride(1), group, rows, padded_rows,
               head_dim, grads);
        pack_transposed(queries, padded_rows, head_dim, queries_t);
        pack_transposed(grads, padded_rows, head_dim, grads_t);
        pack(queries, padded_rows, head_dim, kTile, width, queries_packed);
        pack(grads, padded_rows, head_dim, kTile, width, grads_packed);
        for (int64_t r = 0; r < rows; ++r) {
          row_lse[r] = lse_data[row_of(r)];
          // sum over keys of P * dP, without either
          delta[r] = dot(grads + r * head_dim,
                         out_data + row_of(r) * head_dim, head_dim);
        }
        int64_t first = round_down(mask.first_key(token), kTile);
        first = std::max(first, base);
        int64_t end = mask.end_key(token + tokens - 1);
        end = std::min(end, task.keys.end);
        for (int64_t key = first; key < end; key += kTile) {
          int64_t count = std::min(kTile, round_up(end - key, kRound));
          int64_t at = (key - base) * head_dim;
          for (int64_t r = 0; r < padded_rows; r += kPanel) {
            multiply(count, kPanel, head_dim, keys + at, head_dim,
                     queries_t + r * head_dim, kPanel, scores + r, kTile,
                     false);
          }
          for (int64_t r = 0; r < padded_rows; r += kPanel) {
            multiply(count, kPanel, head_dim, values + at, head_dim,
                     grads_t + r * head_dim, kPanel, probs_grad + r, kTile,
                     false);
          }
          differentiate(scores, probs_grad, probs, scores_grad,
                        scores_grad_packed, key, count, token, tokens, group,
                        padded_rows, mask, options.scale, row_lse, delta);
          for (int64_t c = 0; task.grad_kv && c < head_dim; c += width) {
            multiply(count, width, padded_rows, probs, kTile,
                     grads_packed + c * kTile, width, values_grad + at + c,
                     head_dim, true);
          }
          for (int64_t c = 0; task.grad_kv && c < head_dim; c += width) {
            multiply(count, width, padded_rows, scores_grad, kTile,
                     queries_packed + c * kTile, width, keys_grad + at + c,
                     head_dim, true);
          }
          for (int64_t r = 0; task.grad_q && r < padded_rows; r += kPanel) {
            multiply(head_dim, kPanel, count, keys_t + at, kTile,
                     pairs ? scores_grad_packed + r * kTile : scores_grad + r,
                     pairs ? kPanel : kTile, queries_grad_t + r, kTile,
                     key != first);
          }
        }
        for (int64_t r = 0; task.grad_q && r < rows; ++r) {
          T* to = grad_q_data + row_of(r) * head_dim;
          for (int64_t c = 0; c < head_dim; ++c) {
            store(to + c, queries_grad_t[c * kTile + r]);
          }
        }
      }
      for (int64_t key = 0; task.grad_kv && key < present; ++key) {
        int64_t at =
            ((task.start + base + key) * kv_heads + task.kv_head) * head_dim;
        for (int64_t c = 0; c < head_dim; ++c) {
          store(grad_k_data + at + c, keys_grad[key * head_dim + c]);
          store(grad_v_data + at + c, values_grad[key * head_dim + c]);
        }
      }
      (void)arena;  // lives as long as this function
    };
  });
}

// ---- Operators ------------------------------------------------------------------

bool has_bfloat16() { return blas::could_pack(at::kBFloat16); }

void check(const Tensor& q, const Tensor& k, const Tensor& v,
           const Tensor& cu_seqlens) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && k.sizes() == v.sizes() &&
                  q.size(0) == k.size(0) && q.size(2) == k.size(2),
              "packed_attention_cpu: q must be [tokens, heads, head_dim], k and "
              "v [tokens, kv_heads, head_dim], got ",
              q.sizes(), ", ", k.sizes(), " and ", v.sizes(), ".");
  TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0 &&
                  q.size(1) / k.size(1) <= kTile,
              "packed_attention_cpu: heads must be a multiple of kv_heads, at "
              "most ",
              kTile, " times as many, got ", q.size(1), " and ", k.size(1), ".");
  TORCH_CHECK(q.size(2) > 0 && q.size(2) % kRound == 0,
              "packed_attention_cpu: head_dim must be a multiple of ", kRound,
              ", got ", q.size(2), ".");
  TORCH_CHECK(q.scalar_type() == k.scalar_type() &&
                  q.scalar_type() == v.scalar_type() &&
                  (q.scalar_type() == at::kFloat ||
                   (q.scalar_type() == at::kBFloat16 && has_bfloat16())),
              "packed_attention_cpu: q, k and v must be float32, or bfloat16 on "
              "a CPU with AMX, got ",
              q.scalar_type(), ", ", k.scalar_type(), " and ", v.scalar_type(),
              ".");
  TORCH_CHECK(cu_seqlens.scalar_type() == at::kInt && cu_seqlens.dim() == 1 &&
                  cu_seqlens.numel() > 0 && cu_seqlens.is_contiguous(),
              "packed_attention_cpu: cu_seqlens must be a contiguous int32 "
              "tensor of shape [num_seqs + 1].");
  const int32_t* offsets = cu_seqlens.const_data_ptr<int32_t>();
  int64_t count = cu_seqlens.numel();
  TORCH_CHECK(offsets[0] == 0 && offsets[count - 1] == q.size(0) &&
                  std::is_sorted(offsets, offsets + count),
              "packed_attention_cpu: cu_seqlens must rise from 0 to the number "
              "of tokens, ",
              q.size(0), ".");
}

// Any strides of tokens and heads will do.
Tensor with_dense_heads(const Tensor& x) {
  return x.stride(-1) == 1 ? x : x.contiguous();
}

Tensor like(const Tensor& x) { return at::empty(x.sizes(), x.options()); }

// Returns the output, and the log-sum-exp of the scores, float32 [tokens, heads].
std::tuple<Tensor, Tensor> packed_attention_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
    double scale, bool causal, int64_t window) {
  check(q, k, v, cu_seqlens);
  Tensor out = like(q);
  Tensor lse =
      at::empty({q.size(0), q.size(1)}, q.options().dtype(at::kFloat));
  auto run_forward =
      q.scalar_type() == at::kFloat ? forward<float> : forward<BFloat16>;
  run_forward(with_dense_heads(q), with_dense_heads(k), with_dense_heads(v),
              cu_seqlens, {static_cast<float>(scale), causal, window}, out, lse);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_cpu_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens,
    double scale, bool causal, int64_t window) {
  check(q, k, v, cu_seqlens);
  TORCH_CHECK(grad_out.sizes() == q.sizes() &&
                  grad_out.scalar_type() == q.scalar_type(),
              "packed_attention_cpu: the output's gradient must be like q.");
  Tensor grad_q = like(q), grad_k = like(k), grad_v = like(v);
  auto run_backward =
      q.scalar_type() == at::kFloat ? backward<float> : backward<BFloat16>;
  run_backward(with_dense_heads(grad_out), with_dense_heads(q),
               with_dense_heads(k), with_dense_heads(v), out.contiguous(),
               lse.contiguous(), cu_seqlens,
               {static_cast<float>(scale), causal, window}, grad_q, grad_k,
               grad_v);
  return {grad_q, grad_k, grad_v};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm, library) {
  library.def("packed_attention_cpu_has_bfloat16() -> bool", has_bfloat16);
  library.def(
      "packed_attention_cpu(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, "
      "float scale, bool causal, int window) -> (Tensor, Tensor)");
  library.def(
      "packed_attention_cpu_backward(Tensor grad_out, Tensor q, Tensor k, "
      "Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens, float scale, "
      "bool causal, int window) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(vllm, CPU, library) {
  library.impl("packed_attention_cpu", packed_attention_cpu);
  library.impl("packed_attention_cpu_backward", packed_attention_cpu_backward);
}
