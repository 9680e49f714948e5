// The convolution kernels for bf16 features; a file of their own, as they take long to compile.
#include "cuda/device.h"

namespace las_mm::cuda {

template void gemm<false, bf16, Device>(Device&, GemmParams<bf16>);
template void gemm<true, bf16, Device>(Device&, GemmParams<bf16>);
template void selected_gemm<bf16, Device>(Device&, GemmParams<bf16>);

}  // namespace las_mm::cuda
