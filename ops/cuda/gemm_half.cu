// The convolution kernels for half features; a file of their own, as they take long to compile.
#include "cuda/device.h"

namespace las_mm::cuda {

template void gemm<false, half, Device>(Device&, GemmParams<half>);
template void gemm<true, half, Device>(Device&, GemmParams<half>);
template void selected_gemm<half, Device>(Device&, GemmParams<half>);

}  // namespace las_mm::cuda
