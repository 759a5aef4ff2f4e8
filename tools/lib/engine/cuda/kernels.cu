// All kernels of the CUDA backend in one unit, compiled to kernels.ptx by
// `make kernels`; tools/lib/engine/src/cuda/ holds the host code that launches
// them. Operations and shapes are those of the `Backend` trait; the CPU backend
// is what each is checked against.
#include "device.cuh"

#include "nf4.cu"
#include "random.cu"
#include "thin.cu"
#include "adapter.cu"
#include "outputs.cu"
#include "rows.cu"
#include "dora.cu"
#include "attention.cu"
#include "loss.cu"
#include "optimiser.cu"
#include "sampling.cu"
