// The GPU's kernels as functions.
#include "../../../sam3rt/backends/tensorrt/kernels.cu"
