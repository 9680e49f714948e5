// The rule by which this process chooses tiles: the built-in one, or that of a file for tuning a
// card without a build: $LAS_MM_CUDA_TILES, lines of "capability least_rows large_waves
// medium_waves" as in tiles.cuh, the newest capability first; '#' begins a comment.
#pragma once

#include <c10/util/Exception.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda/tiles.cuh"

namespace las_mm::cuda {

// By the C library: streams of C++ crashed where the extension was built by another compiler than
// PyTorch (a segmentation fault at the first product).
inline std::vector<TileRule> read_tile_rules(const char* path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path, "r"), &std::fclose);
  TORCH_CHECK_VALUE(file, "LAS_MM_CUDA_TILES: cannot read ", path);
  std::vector<TileRule> rules;
  char line[256];
  while (std::fgets(line, sizeof(line), file.get()) != nullptr) {
    line[std::strcspn(line, "#\n")] = '\0';
    if (line[std::strspn(line, " \t\r")] == '\0') continue;
    TileRule rule{};
    char rest = 0;
    const int found = std::sscanf(line, "%d %lf %lf %lf %c", &rule.capability, &rule.least_rows,
                                  &rule.large_waves, &rule.medium_waves, &rest);
    TORCH_CHECK_VALUE(found == 4, "LAS_MM_CUDA_TILES: a line of ", path,
                      " must be 'capability least_rows large_waves medium_waves', got '", line,
                      "'");
    rules.push_back(rule);
  }
  return rules;
}

inline const TileRule* tile_rule(int capability) {
  static const char* const path = std::getenv("LAS_MM_CUDA_TILES");
  if (path == nullptr || *path == '\0') return built_in_rule(capability);
  static const std::vector<TileRule> rules = read_tile_rules(path);
  for (const TileRule& rule : rules) {
    if (capability >= rule.capability) return &rule;
  }
  return built_in_rule(capability);
}

}  // namespace las_mm::cuda
