// The inner loops, written once over a vector type `V`; kernels_*.cpp instantiate them between
// LAS_MM_TARGET_BEGIN and LAS_MM_TARGET_END. Everything here has internal linkage (each including
// file wraps it in an anonymous namespace), so no instance leaks into another instruction set.
//
// V has: kLanes, kRows (rows of a tile), kVectors (registers per row of a tile), Reg, zero, set1,
// load/store of float and bf16 with a partial form for n < kLanes values, add, sub, mul, max, max_nan (a
// NaN in either operand stays), fma, sum, compress (16 columns of 4 bytes, those of the bits set first); and Bf16Step, how a pair of bfloat16 channels is multiplied.

// One step along the input channels for element type T: a value, or a pair of bfloat16.
template <typename V, typename T>
struct Step;

template <typename V>
struct Step<V, float> {
  static constexpr int kDepth = 1;
  using A = typename V::Reg;
  using B = typename V::Reg;
  static inline A load_a(const float* p) { return V::set1(*p); }
  static inline A load_a_last(const float* p) { return V::set1(*p); }
  static inline B load_b(const float* p) { return V::load(p); }
  static inline typename V::Reg multiply(A a, B b, typename V::Reg sum) {
    return V::fma(a, b, sum);
  }
};

template <typename V>
struct Step<V, bf16> : V::Bf16Step {
  static constexpr int kDepth = 2;
};

// max keeps its second operand where either is NaN; a NaN has to stay one here.
template <typename V>
inline typename V::Reg relu(typename V::Reg value) {
  return V::max(V::zero(), value);
}

constexpr int kLine = 64;  // bytes of a cache line

// Output values of a tile will be needed in a while, and may be as far away as main memory.
template <typename T, int kRows>
inline void prefetch_targets(const Panel<T>& p, int64_t first_row, int64_t column, int columns) {
  for (int i = 0; i < kRows; ++i) {
    const T* row = p.out[first_row + i] + column;
    for (int j = 0; j < columns; j += kLine / static_cast<int>(sizeof(T))) {
      __builtin_prefetch(row + j, 1);
    }
    if (p.residual == nullptr || p.residual[first_row + i] == p.out[first_row + i]) continue;
    const T* other = p.residual[first_row + i] + column;
    for (int j = 0; j < columns; j += kLine / static_cast<int>(sizeof(T))) {
      __builtin_prefetch(other + j);
    }
  }
}

template <typename V, typename T, int kRows, int kVectors>
inline void tile(const Panel<T>& p, int64_t first_row, int first_column) {
  using S = Step<V, T>;
  using Reg = typename V::Reg;
  constexpr int kColumns = kVectors * V::kLanes;
  const int64_t weight_stride = int64_t{p.width} * S::kDepth;
  constexpr int64_t kBlock = kLine / sizeof(T);  // input channels of a cache line
  prefetch_targets<T, kRows>(p, first_row, p.column + first_column, kColumns);
  Reg sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sums[i][j] = V::zero();
  }
  for (int s = 0; s < p.segment_count; ++s) {
    const Segment<T>& segment = p.segments[s];
    const T* rows[kRows];
    const T* next[kRows];  // the rows of the next tile: their pages are no neighbours of these
    const int64_t last = p.rows - 1;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = first_row + i, after = row + kRows;
      rows[i] = segment.rows[row] + segment.offset;
      next[i] = segment.rows[after < last ? after : last] + segment.offset;
    }
    const T* weights = segment.weights + first_column * S::kDepth;
    const int64_t whole = segment.depth - segment.depth % S::kDepth;
    for (int64_t block = 0; block < whole; block += kBlock) {
      const int64_t end = block + kBlock < whole ? block + kBlock : whole;
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) __builtin_prefetch(next[i] + block);
      for (int64_t k = block; k < end; k += S::kDepth) {
        typename S::B b[kVectors];
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
          const T* line = weights + j * V::kLanes * S::kDepth;
          b[j] = S::load_b(line);
          __builtin_prefetch(line + 16 * weight_stride);  // measured: 8 to 32 steps are alike
        }
        weights += weight_stride;
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const typename S::A a = S::load_a(rows[i] + k);
#pragma GCC unroll 8
          for (int j = 0; j < kVectors; ++j) sums[i][j] = S::multiply(a, b[j], sums[i][j]);
        }
      }
    }
    if (whole != segment.depth) {  // the last channel of an odd number of bfloat16
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        const typename S::B b = S::load_b(weights + j * V::kLanes * S::kDepth);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          sums[i][j] = S::multiply(S::load_a_last(rows[i] + whole), b, sums[i][j]);
        }
      }
    }
  }
  const int valid = p.valid - first_column;
  if (valid >= kColumns) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const int column = first_column + j * V::kLanes;
      const Reg bias = p.bias ? V::load(p.bias + column) : V::zero();
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        Reg value = V::add(sums[i][j], bias);
        const int64_t at = p.column + column;
        if (p.residual) value = V::add(value, V::load(p.residual[first_row + i] + at));
        if (p.relu) value = relu<V>(value);
        V::store(p.out[first_row + i] + at, value);
      }
    }
    return;
  }
  for (int j = 0; j < kVectors && j * V::kLanes < valid; ++j) {
    const int column = first_column + j * V::kLanes;
    const int n = valid - j * V::kLanes < V::kLanes ? valid - j * V::kLanes : V::kLanes;
    const Reg bias = p.bias ? V::load_part(p.bias + column, n) : V::zero();
    for (int i = 0; i < kRows; ++i) {
      Reg value = V::add(sums[i][j], bias);
      const int64_t at = p.column + column;
      if (p.residual) value = V::add(value, V::load_part(p.residual[first_row + i] + at, n));
      if (p.relu) value = relu<V>(value);
      V::store_part(p.out[first_row + i] + at, value, n);
    }
  }
}

template <typename V, typename T, int kVectors, int kRows = V::kRows>
inline void tile_rows(const Panel<T>& p, int rows, int64_t first_row, int first_column) {
  if (rows == kRows) {
    tile<V, T, kRows, kVectors>(p, first_row, first_column);
  } else if constexpr (kRows > 1) {
    tile_rows<V, T, kVectors, kRows - 1>(p, rows, first_row, first_column);
  }
}

template <typename V, typename T, int kVectors = V::kVectors>
inline void tile_columns(const Panel<T>& p, int rows, int64_t first_row, int column) {
  if (p.width - column >= kVectors * V::kLanes) {
    tile_rows<V, T, kVectors>(p, rows, first_row, column);
  } else if constexpr (kVectors > 1) {
    tile_columns<V, T, kVectors - 1>(p, rows, first_row, column);
  }
}

template <typename V, typename T>
void panel(const Panel<T>& p) {
  // Equal blocks: 8 rows are done as 4 + 4, since a block of 2 would wait for its weights.
  const int64_t blocks = (p.rows + V::kRows - 1) / V::kRows;
  int64_t row = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t end = p.rows * (block + 1) / blocks;
    for (int column = 0; column < p.width; column += V::kVectors * V::kLanes) {
      tile_columns<V, T>(p, static_cast<int>(end - row), row, column);
    }
    row = end;
  }
}

// Calls f(offset, count) for the channels, in steps of a register; the last may be partial.
#define LAS_MM_FOR_LANES(offset, count, channels)                                       \
  for (int64_t offset = 0, count; (count = (channels)-offset < V::kLanes ? (channels)-offset \
                                                                         : V::kLanes) > 0;   \
       offset += V::kLanes)

template <typename V, typename T>
inline typename V::Reg load_lanes(const T* p, int64_t n) {
  return n == V::kLanes ? V::load(p) : V::load_part(p, static_cast<int>(n));
}

template <typename V, typename T>
inline void store_lanes(T* p, typename V::Reg value, int64_t n) {
  if (n == V::kLanes) {
    V::store(p, value);
  } else {
    V::store_part(p, value, static_cast<int>(n));
  }
}

#include "cpu/winograd_templates.h"

template <typename V, typename T>
float dot(const T* x, int64_t positions, int64_t stride, int64_t channels, const float* weight) {
  constexpr int kChains = 4;  // independent sums hide the latency of fma
  typename V::Reg sums[kChains];
  for (auto& sum : sums) sum = V::zero();
  const int64_t whole = channels - channels % (kChains * V::kLanes);
  for (int64_t i = 0; i < positions; ++i, x += stride) {
    for (int64_t c = 0; c < whole; c += kChains * V::kLanes) {
#pragma GCC unroll 4
      for (int j = 0; j < kChains; ++j) {
        const int64_t at = c + j * V::kLanes;
        sums[j] = V::fma(V::load(x + at), V::load(weight + at), sums[j]);
      }
    }
    LAS_MM_FOR_LANES(rest, n, channels - whole) {
      const int64_t at = whole + rest;
      sums[0] = V::fma(load_lanes<V>(x + at, n), load_lanes<V>(weight + at, n), sums[0]);
    }
  }
  return V::sum(V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));
}

template <typename V, typename T>
void max_rows(const T* const* rows, int count, int64_t channels, T* out) {
  LAS_MM_FOR_LANES(c, n, channels) {
    typename V::Reg value = load_lanes<V>(rows[0] + c, n);
    for (int i = 1; i < count; ++i) value = V::max_nan(value, load_lanes<V>(rows[i] + c, n));
    store_lanes<V>(out + c, value, n);
  }
}

template <typename V>
void select_columns(const Move* moves, int move_count, const int32_t* rows, int64_t count,
                    int64_t end, char* out, int64_t stride) {
  constexpr int64_t kAhead = 8;  // rows
  for (int64_t i = 0; i < count; ++i, out += stride) {
    const int64_t row = rows == nullptr ? i : rows[i];
    const int64_t next = i + kAhead < count ? (rows == nullptr ? i + kAhead : rows[i + kAhead]) : row;
    for (int m = 0; m < move_count; ++m) {
      const Move& move = moves[m];
      __builtin_prefetch(move.from + next * move.stride);
      // Columns beyond the wanted ones are overwritten by what comes next.
      V::compress(move.from + row * move.stride, move.lanes, out + move.to);
    }
    if (end < stride) std::memset(out + end, 0, stride - end);
  }
}

// One column of four 16-value registers at a time, so that sums stay in registers.
template <typename V, typename T>
void sum_positions(const T* x, int64_t positions, int64_t stride, int64_t channels, float* sum) {
  constexpr int kWide = 4;
  int64_t c = 0;
  for (; c + kWide * V::kLanes <= channels; c += kWide * V::kLanes) {
    typename V::Reg sums[kWide];
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) sums[j] = V::load(sum + c + j * V::kLanes);
    for (int64_t i = 0; i < positions; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) {
        sums[j] = V::add(sums[j], V::load(x + i * stride + c + j * V::kLanes));
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) V::store(sum + c + j * V::kLanes, sums[j]);
  }
  LAS_MM_FOR_LANES(rest, n, channels - c) {
    typename V::Reg value = load_lanes<V>(sum + c + rest, n);
    for (int64_t i = 0; i < positions; ++i) {
      value = V::add(value, load_lanes<V>(x + i * stride + c + rest, n));
    }
    store_lanes<V>(sum + c + rest, value, n);
  }
}

template <typename V, typename T>
void scale_channels(T* x, const float* scale, int64_t channels) {
  LAS_MM_FOR_LANES(c, n, channels) {
    store_lanes<V>(x + c, V::mul(load_lanes<V>(x + c, n), load_lanes<V>(scale + c, n)), n);
  }
}

template <typename V, typename T, bool kOne>
inline void norm_rows(const T* const* rows, int count, const float* scale, const float* shift,
                      int64_t channels, T* out) {
  const T* first = rows[0];
  const typename V::Reg share = V::set1(1.0f / static_cast<float>(count));
  LAS_MM_FOR_LANES(c, n, channels) {
    const typename V::Reg a = load_lanes<V>(scale + c, n), b = load_lanes<V>(shift + c, n);
    typename V::Reg sum = relu<V>(V::fma(load_lanes<V>(first + c, n), a, b));
    for (int i = 1; !kOne && i < count; ++i) {
      sum = V::add(sum, relu<V>(V::fma(load_lanes<V>(rows[i] + c, n), a, b)));
    }
    store_lanes<V>(out + c, kOne ? sum : V::mul(sum, share), n);
  }
}

template <typename V, typename T>
void norm_relu(const T* const* rows, int count, const float* scale, const float* shift,
               int64_t channels, T* out) {
  if (count == 1) return norm_rows<V, T, true>(rows, 1, scale, shift, channels, out);
  norm_rows<V, T, false>(rows, count, scale, shift, channels, out);
}

template <typename V>
constexpr Kernels make_kernels() {
  return {&panel<V, float>,    &panel<V, bf16>,       &winograd_input<V>,
          &winograd_output<V>, &dot<V, float>,        &dot<V, bf16>,
          &max_rows<V, float>, &max_rows<V, bf16>, &select_columns<V>,
          &sum_positions<V, float>, &sum_positions<V, bf16>,
          &scale_channels<V, float>, &scale_channels<V, bf16>,
          &norm_relu<V, float>, &norm_relu<V, bf16>};
}
