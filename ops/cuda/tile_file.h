// The rule by which this process chooses tiles: the built-in one, or that of a file for tuning a
// card without a build: $LAS_MM_CUDA_TILES, lines of "capability least_rows large_waves
// medium_waves" as in tiles.cuh, the newest capability first; '#' begins a comment.
#pragma once

#include <c10/util/Exception.h>

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/tiles.cuh"

namespace las_mm::cuda {

inline std::vector<TileRule> read_tile_rules(const char* path) {
  std::ifstream file(path);
  TORCH_CHECK_VALUE(file, "LAS_MM_CUDA_TILES: cannot read ", path);
  std::vector<TileRule> rules;
  std::string line;
  while (std::getline(file, line)) {
    std::istringstream words(line.substr(0, line.find('#')));
    std::string rest;
    TileRule rule{};
    if (!(words >> std::ws) || words.eof()) continue;
    TORCH_CHECK_VALUE(
        words >> rule.capability >> rule.least_rows >> rule.large_waves >> rule.medium_waves &&
            !(words >> rest),
        "LAS_MM_CUDA_TILES: a line of ", path,
        " must be 'capability least_rows large_waves medium_waves', got '", line, "'");
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
