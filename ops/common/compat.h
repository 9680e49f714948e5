// What differs between the versions of torch that las_mm is built against (2.1 and newer), and
// nothing else; las_mm/compat.py is its twin in Python.
#pragma once

#include <ATen/Context.h>
#include <torch/version.h>

#include <string>

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

namespace las_mm {

// Whether float32 convolutions may be TF32. Newer versions keep a setting per kind of operation and
// raise when asked for one of all kinds that differ.
template <class Operation>
bool allows_tf32(bool (at::Context::*ask)(Optional<Operation>) const) {
  return (at::globalContext().*ask)(Operation::CONV);
}
inline bool allows_tf32(bool (at::Context::*ask)(const std::string&) const) {
  return (at::globalContext().*ask)("conv");
}
inline bool allows_tf32(bool (at::Context::*ask)() const) { return (at::globalContext().*ask)(); }

}  // namespace las_mm
