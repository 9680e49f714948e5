#include "cpu/image_groups.h"

#include <algorithm>
#include <numeric>


namespace las_mm::cpu {
namespace {

// Outputs of a task for which the weights are read once more; fewer would wait for them.
constexpr int64_t kTaskOutputs = 192;
// How much longer than with evenly shared work the last thread may take: what images apart save.
constexpr double kMostUneven = 1.1;

// The work of the busiest thread if each takes the next task when it is free.
int64_t longest(const std::vector<int64_t>& outputs, const std::vector<int64_t>& firsts,
                int64_t threads) {
  std::vector<int64_t> busy(threads);
  for (size_t i = 0; i + 1 < firsts.size(); ++i) {
    *std::min_element(busy.begin(), busy.end()) +=
        std::accumulate(outputs.begin() + firsts[i], outputs.begin() + firsts[i + 1], int64_t{0});
  }
  return *std::max_element(busy.begin(), busy.end());
}

}  // namespace

std::vector<int64_t> outputs_of_images(const MaskGeometry& g, int64_t images,
                                       const at::Tensor& patches) {
  std::vector<int64_t> outputs(images, g.rows.size * g.columns.size);
  if (!patches.defined()) return outputs;
  const bool* decisions = patches.const_data_ptr<bool>();
  for (int64_t n = 0; n < images; ++n) {
    outputs[n] = count_outputs(g, decisions + n * patches.stride(0));
  }
  return outputs;
}

std::vector<int64_t> share_images(const std::vector<int64_t>& outputs, int64_t threads) {
  const auto images = static_cast<int64_t>(outputs.size());
  if (images < threads) return {0, images};
  const int64_t all = std::accumulate(outputs.begin(), outputs.end(), int64_t{0});
  const int64_t tasks = std::clamp(all / kTaskOutputs / threads * threads, threads, images);
  std::vector<int64_t> firsts;
  for (int64_t task = 0; task <= tasks; ++task) firsts.push_back(images * task / tasks);
  if (longest(outputs, firsts, threads) * threads > kMostUneven * all) return {0, images};
  return firsts;
}

}  // namespace las_mm::cpu
