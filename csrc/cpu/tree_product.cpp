// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project

// Matrix products on a CPU whose bits depend on nothing but the two rows that are
// multiplied: not on the other rows, their number, or the number of threads.
//
// out[m, n] is the sum over k of x[m, k] * weight[n, k]. The axis k is divided into
// `leaves` equal parts. Each part is summed in kLanes lanes, which are then added by
// halves, and the parts are summed in a binary tree. Every tile runs the same code for
// each of its elements, so that a row at the edge rounds as any other.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "multiversion.h"

namespace {

using at::BFloat16;
using at::Tensor;

constexpr int64_t kLanes = 16;
constexpr int64_t kRows = 4;      // of x in a tile
constexpr int64_t kColumns = 4;   // rows of weight in a tile
constexpr int64_t kMaxDepth = 16; // of the tree

template <typename T>
struct Lanes {
  typedef T Type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <typename T>
using Vector = typename Lanes<T>::Type;

// kLanes features from `from` on, of which those after the first `count` are zeros.
template <typename T>
INLINE void load(const T* from, int64_t count, Vector<T>& to) {
  if (count < kLanes) to = Vector<T>{};
  std::memcpy(&to, from, std::min(count, kLanes) * sizeof(T));
}
INLINE void load(const BFloat16* from, int64_t count, Vector<float>& to) {
  Vector<uint16_t> narrow{};
  if (count >= kLanes) {
    std::memcpy(&narrow, from, sizeof(narrow));
  } else {
    std::memcpy(&narrow, from, count * sizeof(BFloat16));
  }
  auto wide = __builtin_convertvector(narrow, Vector<uint32_t>) << 16;
  std::memcpy(&to, &wide, sizeof(to));
}

// Adds the lanes of each vector by halves: lane i and lane i + 8, then i and i + 4,
// i and i + 2, and the last two. `out[i]` is the sum of the lanes of `x[i]`.
template <typename Sum>
INLINE void add_lanes(const Vector<Sum>& x, Sum* out) {
  Sum lanes[kLanes];
  std::memcpy(lanes, &x, sizeof(x));
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  *out = lanes[0];
}

// The same for kLanes vectors at once. A step halves the lanes of two vectors, and puts
// what is left of them side by side.
#define LOW8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define LOW4 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define HIGH4 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
#define LOW2 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29
#define HIGH2 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31
#define LOW1 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define HIGH1 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define HALVE(x, y, LOW, HIGH)             \
  (__builtin_shufflevector(x, y, LOW) +    \
   __builtin_shufflevector(x, y, HIGH))

template <typename Sum>
INLINE void add_lanes_of_16(const Vector<Sum>* x, Sum* out) {
  Vector<Sum> a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = HALVE(x[2 * i], x[2 * i + 1], LOW8, HIGH8);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) b[i] = HALVE(a[2 * i], a[2 * i + 1], LOW4, HIGH4);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) c[i] = HALVE(b[2 * i], b[2 * i + 1], LOW2, HIGH2);
  auto sums = HALVE(c[0], c[1], LOW1, HIGH1);
  std::memcpy(out, &sums, sizeof(sums));
}

// The sums over one leaf for a tile: R rows of x by C rows of weight.
template <typename T, typename Sum, int64_t R, int64_t C>
INLINE void leaf(const T* x, int64_t x_stride, const T* weight,
                 int64_t weight_stride, int64_t size, Sum* out) {
  Vector<Sum> sums[R * C] = {};
  for (int64_t k = 0; k < size; k += kLanes) {
    int64_t count = std::min(kLanes, size - k);
    Vector<Sum> a[R], b[C];
#pragma GCC unroll 4
    for (int64_t r = 0; r < R; ++r) load(x + r * x_stride + k, count, a[r]);
#pragma GCC unroll 4
    for (int64_t c = 0; c < C; ++c) {
      load(weight + c * weight_stride + k, count, b[c]);
    }
#pragma GCC unroll 4
    for (int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int64_t c = 0; c < C; ++c) sums[r * C + c] += a[r] * b[c];
    }
  }
  if constexpr (R * C == kLanes) {
    add_lanes_of_16<Sum>(sums, out);
  } else {
    for (int64_t i = 0; i < R * C; ++i) add_lanes<Sum>(sums[i], out + i);
  }
}

template <typename T, typename Sum, int64_t R, int64_t C>
INLINE void tile(const T* x, int64_t x_stride, const T* weight,
                 int64_t weight_stride, int64_t leaf_size, int64_t leaves,
                 Sum* out, int64_t out_stride) {
  // waiting[d] is the left part of a node of depth d, from the leaves on.
  Sum waiting[kMaxDepth][R * C];
  Sum sum[R * C];
  for (int64_t index = 0; index < leaves; ++index) {
    leaf<T, Sum, R, C>(x + index * leaf_size, x_stride,
                       weight + index * leaf_size, weight_stride, leaf_size,
                       sum);
    int64_t depth = 0;
    for (int64_t at = index; at % 2 == 1; at /= 2, ++depth) {
      for (int64_t i = 0; i < R * C; ++i) sum[i] = waiting[depth][i] + sum[i];
    }
    for (int64_t i = 0; i < R * C; ++i) waiting[depth][i] = sum[i];
  }
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t c = 0; c < C; ++c) out[r * out_stride + c] = sum[r * C + c];
  }
}

template <typename T, typename Sum>
INLINE void columns(const T* x, const T* weight, int64_t rows, int64_t begin,
                    int64_t end, int64_t width, int64_t size, int64_t leaves,
                    Sum* out) {
  for (int64_t c = begin; c < end; c += kColumns) {
    const T* w = weight + c * size;
    bool whole = end - c >= kColumns;
    for (int64_t r = 0; r < rows; r += whole ? kRows : 1) {
      const T* a = x + r * size;
      Sum* to = out + r * width + c;
      int64_t leaf_size = size / leaves;
      if (whole && rows - r >= kRows) {
        tile<T, Sum, kRows, kColumns>(a, size, w, size, leaf_size, leaves, to,
                                      width);
        continue;
      }
      int64_t last = whole ? rows - r : 1;
      for (int64_t i = 0; i < last; ++i) {
        for (int64_t j = 0; j < std::min(kColumns, end - c); ++j) {
          tile<T, Sum, 1, 1>(a + i * size, size, w + j * size, size, leaf_size,
                             leaves, to + i * width + j, width);
        }
      }
    }
  }
}

#define COLUMNS(T, Sum)                                                       \
  MULTIVERSION void run(const T* x, const T* weight, int64_t rows,            \
                        int64_t begin, int64_t end, int64_t width,            \
                        int64_t size, int64_t leaves, Sum* out) {             \
    columns(x, weight, rows, begin, end, width, size, leaves, out);           \
  }
COLUMNS(float, float)
COLUMNS(BFloat16, float)
COLUMNS(double, double)
#undef COLUMNS

template <typename T, typename Sum>
void multiply(const Tensor& x, const Tensor& weight, int64_t leaves,
              const Tensor& out) {
  int64_t rows = x.size(0), width = weight.size(0), size = x.size(1);
  const T* x_data = x.const_data_ptr<T>();
  const T* weight_data = weight.const_data_ptr<T>();
  Sum* out_data = out.mutable_data_ptr<Sum>();
  int64_t work = std::max<int64_t>(1, rows * size);
  int64_t grain = std::max<int64_t>(1, (1 << 18) / work);
  int64_t blocks = (width + kColumns - 1) / kColumns;
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    run(x_data, weight_data, rows, begin * kColumns,
        std::min(width, end * kColumns), width, size, leaves, out_data);
  });
}

// x [rows, size], weight [width, size] -> [rows, width] in float32, or in float64
// for float64.
Tensor tree_product_cpu(const Tensor& x, const Tensor& weight, int64_t leaves) {
  TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) &&
                  x.scalar_type() == weight.scalar_type(),
              "tree_product_cpu: x must be [rows, size] and weight [width, size] "
              "of one dtype, got ",
              x.sizes(), " ", x.scalar_type(), " and ", weight.sizes(), " ",
              weight.scalar_type(), ".");
  TORCH_CHECK(leaves > 0 && (leaves & (leaves - 1)) == 0 &&
                  leaves < (int64_t(1) << kMaxDepth) && x.size(1) % leaves == 0,
              "tree_product_cpu: leaves must be a power of two that divides ",
              x.size(1), ", got ", leaves, ".");
  auto dtype = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor out = at::empty({x.size(0), weight.size(0)}, x.options().dtype(dtype));
  Tensor a = x.contiguous(), b = weight.contiguous();
  switch (x.scalar_type()) {
    case at::kFloat:
      multiply<float, float>(a, b, leaves, out);
      break;
    case at::kBFloat16:
      multiply<BFloat16, float>(a, b, leaves, out);
      break;
    case at::kDouble:
      multiply<double, double>(a, b, leaves, out);
      break;
    default:
      multiply<float, float>(a.to(at::kFloat), b.to(at::kFloat), leaves, out);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm, library) {
  library.def("tree_product_cpu(Tensor x, Tensor weight, int leaves) -> Tensor");
}

TORCH_LIBRARY_IMPL(vllm, CPU, library) {
  library.impl("tree_product_cpu", tree_product_cpu);
}
