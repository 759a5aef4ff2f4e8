// Looks at every memory access of the kernels: inside a device buffer, or in
// shared memory with a barrier between it and the accesses of other threads?
//
// The compiler's instrumentation for its thread sanitizer calls a function at
// each load and store. That library is not linked; the functions are ours. One
// run in any order finds a race, since what is compared is barriers, not time.
#include "internal.h"

#include <map>
#include <vector>

extern "C" __attribute__((weak)) char __executable_start, _end; // of a program; a library has none

namespace cpu {

namespace {

struct Access {
  unsigned block_epoch, warp_epoch;
  int thread;
};

// The accesses to a byte of shared memory that later ones are compared with: the
// last write, and the last readers, of two different warps or threads.
struct History {
  Access write{0, 0, -1}, read{0, 0, -1}, other_read{0, 0, -1};
};

std::map<uintptr_t, size_t> buffers; // on the device: base → size
std::map<const unsigned char *, std::vector<History>> histories;

bool ordered(const Access &a) {
  const int me = current->number;
  if (a.thread < 0 || a.thread == me || a.block_epoch != block_epoch) return true;
  return a.thread / 32 == me / 32 && a.warp_epoch != warp_epochs[me];
}

void shared_access(const unsigned char *base, size_t total, size_t offset, size_t size, bool write) {
  auto &history = histories[base];
  history.resize(total);
  const Access now{block_epoch, warp_epochs[current->number], current->number};
  for (size_t i = offset; i < offset + size; i++) {
    History &h = history[i];
    if (!ordered(h.write))
      fail(std::string("race in shared memory: a ") + (write ? "write" : "read") + " after a write by thread " +
           std::to_string(h.write.thread) + " without a barrier");
    if (write && !(ordered(h.read) && ordered(h.other_read)))
      fail("race in shared memory: a write after a read by another thread without a barrier");
    if (write) {
      h.write = now;
    } else if (h.read.thread / 32 == now.thread / 32 || h.read.block_epoch != now.block_epoch) {
      // Of two lanes of one warp the later stays: the warp's next barrier orders both.
      h.read = now;
    } else {
      h.other_read = now;
    }
  }
}

} // namespace

void note(const void *p, size_t size, bool write) {
  if (!checking || !current) return;
  auto byte = static_cast<const unsigned char *>(p);
  if (byte >= dynamic_shared && byte + size <= dynamic_shared + dynamic_shared_size)
    return shared_access(dynamic_shared, dynamic_shared_size, byte - dynamic_shared, size, write);
  for (Shared *s = all_shared; s; s = s->next)
    if (byte >= s->bytes && byte + size <= s->bytes + s->size)
      return shared_access(s->bytes, s->size, byte - s->bytes, size, write);
  if (on_own_stack(p)) return;
  const auto at = reinterpret_cast<uintptr_t>(p);
  if (p >= &__executable_start && p < &_end) return; // constants, and the runtime's own
  auto buffer = buffers.upper_bound(at);
  if (buffer == buffers.begin() || at + size > std::prev(buffer)->first + std::prev(buffer)->second)
    fail(std::string("a ") + (write ? "write" : "read") + " of " + std::to_string(size) +
         " bytes outside every buffer");
  if (size <= 16 && at % size) fail("an access that is not aligned to its size");
}

} // namespace cpu

using cpu::note;

extern "C" {
void cuda_on_cpu_buffer(uintptr_t base, size_t size) { cpu::buffers[base] = size; }
void cuda_on_cpu_free(uintptr_t base) { cpu::buffers.erase(base); }

#define ACCESS(n)                                                                                  \
  void __tsan_read##n(void *p) { note(p, n, false); }                                              \
  void __tsan_write##n(void *p) { note(p, n, true); }                                              \
  void __tsan_unaligned_read##n(void *p) { note(p, n, false); }                                    \
  void __tsan_unaligned_write##n(void *p) { note(p, n, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void *p, size_t n) { note(p, n, false); }
void __tsan_write_range(void *p, size_t n) { note(p, n, true); }
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
