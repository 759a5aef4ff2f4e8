// What the scheduler and the memory check share; never seen by kernels.
#pragma once

using u32 = unsigned int;
using u64 = unsigned long long;
#include "runtime.h"

#include <string>

// The kernels' names for the indices are the fields of others here.
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace cpu {

constexpr int MAX_THREADS = 1024;

enum class Order : unsigned { Forward, Reverse, Random, Newest };

extern size_t dynamic_shared_size;
extern Shared *all_shared;
// Counted up at each barrier of the block, and of a thread's warp: two accesses
// are ordered if a count changed between them.
extern unsigned block_epoch, warp_epochs[MAX_THREADS];
// Whether the kernel that runs reports its accesses.
extern bool checking;

// Ends the launch with this error; the threads of the block are abandoned.
[[noreturn]] void fail(const std::string &text);
bool on_own_stack(const void *p);
// An access by the current thread.
void note(const void *p, size_t size, bool write);

} // namespace cpu
