// What differs between the versions of torch that las_mm is built against (2.1 and newer), and
// nothing else; las_mm/compat.py is its twin in Python.
#pragma once

#include <torch/version.h>

// The optional that the dispatcher takes from Python: torch's own class before 2.5.
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 5
#include <c10/util/Optional.h>

namespace las_mm {
template <class T>
using Optional = c10::optional<T>;
using c10::nullopt;
}  // namespace las_mm
#else
#include <optional>

namespace las_mm {
template <class T>
using Optional = std::optional<T>;
using std::nullopt;
}  // namespace las_mm
#endif
