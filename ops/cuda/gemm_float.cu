// The convolution kernels for float features; a file of their own, as they take long to compile.
#include "cuda/device.h"

namespace las_mm::cuda {

template void gemm<false, float, Device>(Device&, GemmParams<float>);
template void gemm<true, float, Device>(Device&, GemmParams<float>);
template void selected_gemm<float, Device>(Device&, GemmParams<float>);

}  // namespace las_mm::cuda
