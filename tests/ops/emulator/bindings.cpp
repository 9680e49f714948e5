// The ops' sequences of kernels in the emulator, for tests/ops/emulated.py (ctypes). Compiled for
// one type of features at a time: -DLAS_MM_ELEMENT=float, half or bf16.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/channel_sequences.cuh"
#include "cuda/sequences.cuh"

namespace {

using namespace las_mm::cuda;
using Element = LAS_MM_ELEMENT;

// What tests/ops/emulated.py passes; absent arrays are null.
struct Call {
  // How to run.
  int64_t capability, multiprocessors, allow_tf32;
  int64_t tile;    // 0, 1, 2: a TileShape; -1: what the table says
  int64_t blocks;  // that run at once
  int64_t seed;
  // Geometry; conv1 turns (height, width) into (hidden_height, hidden_width).
  int64_t images, height, width, hidden_height, hidden_width;
  int64_t first_stride, stride, dilation, granularity;
  int64_t c_in, hidden, c_out, groups, downsample, shortcut_channels, offset_images;
  void *x, *mask, *shortcut, *out;
  void *weights[4], *biases[4];
  int64_t weight_sizes[4];
  void *masker_weight, *masker_bias, *offset;
  void* rates;
  int64_t squeezed, together;
  void *excitation[4], *channel_mask, *constants[2];
};

struct Launch {
  char name[160];
  int64_t blocks;
  int64_t load_bytes, store_bytes, sectors_read, sectors_written, multiply_adds;
};

std::vector<Launch> launches;
std::string report;

class Device {
 public:
  explicit Device(const Call& call)
      : gpu{static_cast<int>(call.capability), static_cast<int>(call.multiprocessors),
            call.allow_tf32 != 0, is_deep(static_cast<int>(call.capability))},
        call_(call) {}

  const Gpu gpu;

  template <class T>
  Global<T> allocate(int64_t count, const char* name) {
    return emulator::allocate<T>(count, name);
  }

  template <class T>
  void zero(const Global<T>& memory, int64_t count) {
    std::memset(memory.data, 0, count * sizeof(T));
    emulator::mark_initialised(memory);
  }

  TileShape choose_tile(int64_t rows, int64_t columns, int64_t groups) const {
    if (call_.tile >= 0) return static_cast<TileShape>(call_.tile);
    const TileRule* rule = built_in_rule(gpu.capability);
    return las_mm::cuda::choose_tile(gpu, rule, rows, columns, groups);
  }

  template <class Kernel>
  void launch(int64_t blocks, const typename Kernel::Params& params) {
    if (blocks <= 0 || !emulator::errors().empty()) return;
    emulator::emulate<Kernel>(std::min(blocks, call_.blocks), params);
    const auto& c = emulator::last_launch();
    Launch launch{};
    const std::string name = __PRETTY_FUNCTION__;
    const size_t at = name.find("Kernel = ");
    name.copy(launch.name, sizeof(launch.name) - 1, at == std::string::npos ? 0 : at + 9);
    launch.blocks = std::min(blocks, call_.blocks);
    launch.load_bytes = c.traffic.load_bytes;
    launch.store_bytes = c.traffic.store_bytes;
    launch.sectors_read = c.traffic.sectors_read;
    launch.sectors_written = c.traffic.sectors_written;
    launch.multiply_adds = c.multiply_adds;
    launches.push_back(launch);
  }

 private:
  const Call& call_;
};

template <class T>
Global<T> wrap(void* data, int64_t count, const char* name) {
  return emulator::wrap(static_cast<T*>(data), count, name);
}

// The arrays of a call, bounded by the sizes that they must have.
struct Arrays {
  explicit Arrays(const Call& c)
      : geometry(mask_geometry(c.images, c.hidden_height, c.hidden_width, c.stride, c.dilation,
                               c.granularity)) {
    const int64_t patches = int64_t{geometry.images} * geometry.rows * geometry.columns;
    x = wrap<Element>(c.x, c.images * c.height * c.width * c.c_in, "x");
    mask = wrap<uint8_t>(c.mask, patches, "mask");
    masker.weight = wrap<Element>(c.masker_weight, 2 * c.c_in, "masker_weight");
    masker.bias = wrap<Element>(c.masker_bias, 2, "masker_bias");
    masker.offset =
        wrap<float>(c.offset, c.offset_images * geometry.rows * geometry.columns, "offset");
    masker.offset_images = static_cast<int>(c.offset_images);
    rates = wrap<float>(c.rates, 2, "rates");
    const char* names[] = {"weights[0]", "weights[1]", "weights[2]", "weights[3]"};
    const char* bias_names[] = {"biases[0]", "biases[1]", "biases[2]", "biases[3]"};
    for (int i = 0; i < 4; ++i) {
      weights[i] = wrap<Element>(c.weights[i], c.weight_sizes[i], names[i]);
      biases[i] = wrap<float>(c.biases[i], i < 2 ? c.hidden : c.c_out, bias_names[i]);
    }
  }

  MaskGeometry geometry;
  Global<Element> x;
  Global<uint8_t> mask;
  Masker<Element> masker;
  Global<float> rates;
  Global<const Element> weights[4];
  Global<const float> biases[4];
};

void begin(const Call& call) {
  emulator::reset();
  emulator::clear();
  emulator::seed(call.seed);
  launches.clear();
}

const char* end() {
  report.clear();
  for (const std::string& error : emulator::errors()) report += error + "\n";
  return report.c_str();
}

int small(int64_t value) { return static_cast<int>(value); }

Bottleneck<Element> bottleneck(const Call* c, const Arrays& a) {
  Bottleneck<Element> b{};
  b.geometry = a.geometry;
  b.mask = a.mask;
  b.x = a.x;
  b.height = small(c->height);
  b.width = small(c->width);
  b.c_in = small(c->c_in);
  b.first_stride = small(c->first_stride);
  b.hidden = small(c->hidden);
  b.c_out = small(c->c_out);
  b.groups = small(c->groups);
  for (int i = 0; i < 4; ++i) {
    b.weights[i] = a.weights[i];
    b.biases[i] = a.biases[i];
  }
  b.downsample = c->downsample != 0;
  const int64_t outputs = a.geometry.outputs();
  b.shortcut = wrap<Element>(c->shortcut, outputs * c->shortcut_channels, "shortcut");
  b.shortcut_channels = small(c->shortcut_channels);
  b.out = c->out == c->x ? a.x : wrap<Element>(c->out, outputs * c->c_out, "out");
  const int64_t sizes[] = {c->squeezed * c->hidden, c->squeezed, c->hidden * c->squeezed, c->hidden};
  for (int i = 0; i < 4; ++i) {
    b.excitation.weights[i] = wrap<float>(c->excitation[i], sizes[i], "excitation");
  }
  b.excitation.squeezed = small(c->squeezed);
  return b;
}

}  // namespace

// Each returns what went wrong, or an empty string.
extern "C" {

const char* emulated_sparse_bottleneck(const Call* c) {
  begin(*c);
  Device device(*c);
  sparse_bottleneck(device, bottleneck(c, Arrays(*c)));
  return end();
}

const char* emulated_channel_bottleneck(const Call* c) {
  begin(*c);
  Device device(*c);
  ChannelSkipping skip{};
  skip.mask = wrap<uint8_t>(c->channel_mask, c->images * c->hidden / c->together, "channel_mask");
  skip.together = small(c->together);
  for (int i = 0; i < 2; ++i) {
    skip.constants[i] = wrap<float>(c->constants[i], c->hidden, "constants");
  }
  channel_bottleneck(device, bottleneck(c, Arrays(*c)), skip);
  return end();
}

const char* emulated_channel_mean(const Call* c) {
  begin(*c);
  Device device(*c);
  channel_mean(device, Arrays(*c).x, small(c->images), small(c->height), small(c->width),
               small(c->c_in), wrap<float>(c->out, c->images * c->c_in, "means"));
  return end();
}

const char* emulated_spatial_mask(const Call* c) {
  begin(*c);
  Device device(*c);
  const Arrays a(*c);
  spatial_mask(device, a.geometry, a.masker, Global<const Element>(a.x), small(c->height),
               small(c->width), small(c->c_in), small(c->first_stride), a.mask, a.rates);
  return end();
}

const char* emulated_masker_conv1x1(const Call* c) {
  begin(*c);
  Device device(*c);
  const Arrays a(*c);
  const auto hidden = wrap<Element>(c->out, a.geometry.hidden() * c->hidden, "hidden");
  masker_conv1x1(device, a.geometry, a.masker, Global<const Element>(a.x), small(c->height),
                 small(c->width), small(c->c_in), small(c->first_stride), a.weights[0],
                 a.biases[0], small(c->hidden), a.mask, a.rates, hidden);
  return end();
}

const char* emulated_gather_conv3x3(const Call* c) {  // from c_in to hidden channels
  begin(*c);
  Device device(*c);
  const Arrays a(*c);
  const auto out = wrap<Element>(c->out, a.geometry.outputs() * c->hidden, "out");
  gather_conv3x3(device, a.geometry, Global<const uint8_t>(a.mask), Global<const Element>(a.x),
                 a.weights[1], a.biases[1], small(c->c_in), small(c->hidden), small(c->groups),
                 out);
  return end();
}

const char* emulated_conv1x1_scatter_add(const Call* c) {  // from c_in to c_out channels
  begin(*c);
  Device device(*c);
  const Arrays a(*c);
  const auto residual = wrap<Element>(c->out, a.geometry.outputs() * c->c_out, "residual");
  conv1x1_scatter_add(device, a.geometry, Global<const uint8_t>(a.mask), residual,
                      Global<const Element>(a.x), a.weights[2], a.biases[2], small(c->c_in),
                      small(c->c_out));
  return end();
}

// The launches of the last call.
int64_t emulated_launches(Launch* to, int64_t room) {
  const int64_t count = std::min<int64_t>(room, launches.size());
  std::copy_n(launches.begin(), count, to);
  return launches.size();
}

}  // extern "C"
