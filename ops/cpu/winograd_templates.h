// The transforms of Winograd's F(2x2, 3x3); a part of kernel_templates.h.

template <typename V>
void winograd_input(const float* tile, int64_t row_stride, int64_t column_stride, int64_t channels,
                    float* out, int64_t out_stride) {
  using Reg = typename V::Reg;
  LAS_MM_FOR_LANES(c, n, channels) {
    Reg columns[4][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      Reg d[4];
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) {
        d[y] = load_lanes<V>(tile + y * row_stride + x * column_stride + c, n);
      }
      columns[0][x] = V::sub(d[0], d[2]);
      columns[1][x] = V::add(d[1], d[2]);
      columns[2][x] = V::sub(d[2], d[1]);
      columns[3][x] = V::sub(d[1], d[3]);
    }
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) {
      const Reg* d = columns[y];
      float* row = out + 4 * y * out_stride + c;
      store_lanes<V>(row, V::sub(d[0], d[2]), n);
      store_lanes<V>(row + out_stride, V::add(d[1], d[2]), n);
      store_lanes<V>(row + 2 * out_stride, V::sub(d[2], d[1]), n);
      store_lanes<V>(row + 3 * out_stride, V::sub(d[1], d[3]), n);
    }
  }
}

template <typename V>
inline void store_output(const TileTarget& to, int q, int64_t c, int64_t n, typename V::Reg value) {
  if (to.out[q] == nullptr) return;
  if (to.residual) value = V::add(value, load_lanes<V>(to.residual[q] + to.column + c, n));
  store_lanes<V>(to.out[q] + to.column + c, to.relu ? relu<V>(value) : value, n);
}

template <typename V>
void winograd_output(const float* in, int64_t in_stride, int64_t channels, const float* bias,
                     const TileTarget& to) {
  using Reg = typename V::Reg;
  LAS_MM_FOR_LANES(c, n, channels) {
    Reg rows[2][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      Reg d[4];
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) d[y] = load_lanes<V>(in + (4 * y + x) * in_stride + c, n);
      rows[0][x] = V::add(V::add(d[0], d[1]), d[2]);
      rows[1][x] = V::sub(V::sub(d[1], d[2]), d[3]);
    }
    const Reg shift = load_lanes<V>(bias + c, n);
#pragma GCC unroll 2
    for (int y = 0; y < 2; ++y) {
      const Reg* d = rows[y];
      const Reg left = V::add(V::add(V::add(d[0], d[1]), d[2]), shift);
      const Reg right = V::add(V::sub(V::sub(d[1], d[2]), d[3]), shift);
      store_output<V>(to, 2 * y, c, n, left);
      store_output<V>(to, 2 * y + 1, c, n, right);
    }
  }
}
