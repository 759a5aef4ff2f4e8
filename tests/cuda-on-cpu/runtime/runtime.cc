// Runs a kernel's blocks one after another, the threads of a block as stackful
// coroutines with a switch of our own: a barrier or a shuffle costs some tens of
// nanoseconds, a thousand times less than threads of the system.
//
// A correct kernel computes the same whatever the order in which its threads
// run, so a check runs it in several: forward, reverse, random, and newest first
// (one warp runs far ahead of the others). What the device leaves undefined is
// made visible: shared memory starts as 0xFF (NaN), the target of an asynchronous
// copy is 0xFF until it was waited for.
#include "internal.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <new>
#include <string>
#include <vector>

#include <sys/mman.h>

namespace cpu {

Fiber *current;
uint3 block_index, block_size, grid_size;
unsigned char *dynamic_shared;
size_t dynamic_shared_size;
Shared *all_shared;
unsigned block_epoch, warp_epochs[MAX_THREADS];
bool checking;

namespace {

constexpr size_t STACK = 64 << 10, PAGE = 4096;

enum class State { Ready, Blocked, Done };

struct Copy {
  void *to;
  const void *from;
  bool valid;
  int group;
};

struct Thread : Fiber {
  State state;
  void *stack_pointer;
  const char *at; // the collective it waits in
  int group;      // copy groups committed
  std::vector<Copy> copies;
};

// What the lanes of a warp bring to a collective, and what they take from it.
struct Warp {
  alignas(16) unsigned char in[32][64], out[32][64];
  int mask[32];
  int lanes, arrived;
  const char *op;
};

Thread threads[MAX_THREADS];
Warp warps[MAX_THREADS / 32];
std::vector<int> ready;
std::vector<int> at_barrier;
size_t first_ready;
int count, alive;
Order order;
uint64_t random_state;
void *host_stack;
unsigned char *stacks;
std::string error;
Thunk run_thread;
void *function;
void **arguments;

uint64_t draw() { // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state >> 16;
}

// Saves the callee-saved registers on the stack, leaves the stack pointer in
// `*from`, and goes on where `to` was left.
extern "C" void cpu_switch(void **from, void *to);
#if defined(__x86_64__)
asm(".text\n.globl cpu_switch\n.type cpu_switch,@function\ncpu_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n"
    ".size cpu_switch,.-cpu_switch\n");
void *fresh_stack(unsigned char *top, void (*entry)()) {
  auto stack = reinterpret_cast<void **>(top);
  *--stack = nullptr; // the ABI's alignment at a function's entry
  *--stack = reinterpret_cast<void *>(entry);
  return stack - 6;
}
#elif defined(__aarch64__)
asm(".text\n.globl cpu_switch\n.type cpu_switch,%function\ncpu_switch:\n"
    "stp x19,x20,[sp,#-160]!\nstp x21,x22,[sp,#16]\nstp x23,x24,[sp,#32]\nstp x25,x26,[sp,#48]\n"
    "stp x27,x28,[sp,#64]\nstp x29,x30,[sp,#80]\nstp d8,d9,[sp,#96]\nstp d10,d11,[sp,#112]\n"
    "stp d12,d13,[sp,#128]\nstp d14,d15,[sp,#144]\n"
    "mov x2,sp\nstr x2,[x0]\nmov sp,x1\n"
    "ldp x21,x22,[sp,#16]\nldp x23,x24,[sp,#32]\nldp x25,x26,[sp,#48]\nldp x27,x28,[sp,#64]\n"
    "ldp x29,x30,[sp,#80]\nldp d8,d9,[sp,#96]\nldp d10,d11,[sp,#112]\nldp d12,d13,[sp,#128]\n"
    "ldp d14,d15,[sp,#144]\nldp x19,x20,[sp],#160\nret\n"
    ".size cpu_switch,.-cpu_switch\n");
void *fresh_stack(unsigned char *top, void (*entry)()) {
  auto stack = reinterpret_cast<void **>(top - 160);
  stack[11] = reinterpret_cast<void *>(entry); // x30: where `ret` goes
  return stack;
}
#else
#error "no coroutine switch for this processor: add one beside the others"
#endif

Thread &self() { return static_cast<Thread &>(*current); }

void wake(int i) {
  threads[i].state = State::Ready;
  ready.push_back(i);
}

int pick() {
  const size_t waiting = ready.size() - first_ready;
  size_t at = first_ready;
  if (order == Order::Random) at += draw() % waiting;
  if (order == Order::Newest) at = ready.size() - 1;
  const int chosen = ready[at];
  if (order == Order::Newest) {
    ready.pop_back();
  } else {
    ready[at] = ready[first_ready++];
  }
  if (first_ready == ready.size()) ready.clear(), first_ready = 0;
  return chosen;
}

// Leaves the current thread for the next that can run, or for the host.
void next() {
  Thread &from = self();
  if (ready.empty()) {
    if (alive) {
      std::string text = "deadlock: not all threads reach the same barrier;";
      int shown = 0;
      for (int i = 0; i < count && shown < 4; i++)
        if (threads[i].state == State::Blocked)
          text += " thread " + std::to_string(i) + " in " + threads[i].at + ",", shown++;
      fail(text + " " + std::to_string(count - alive) + " threads have finished");
    }
    cpu_switch(&from.stack_pointer, host_stack);
  }
  current = &threads[pick()];
  if (current != &from) cpu_switch(&from.stack_pointer, self().stack_pointer);
}

void entry() {
  run_thread(function, arguments);
  Thread &t = self();
  if (!t.copies.empty()) fail("a thread ends with an asynchronous copy under way");
  t.state = State::Done;
  alive--;
  next();
}

// All lanes of a warp meet; the last to come does the work.
template <class Work> void collective(const char *op, Work work) {
  Warp &w = warps[current->warp];
  if (w.arrived == 0) w.op = op;
  if (w.op != op)
    fail(std::string("the lanes of a warp diverge: ") + op + " meets " + w.op);
  self().state = State::Blocked;
  self().at = op;
  if (++w.arrived == w.lanes) {
    w.arrived = 0;
    work(w);
    for (int i = 0; i < w.lanes; i++) {
      const int lane = order == Order::Reverse ? w.lanes - 1 - i : i;
      warp_epochs[current->warp * 32 + lane]++;
      wake(current->warp * 32 + lane);
    }
  }
  next();
}

float widen(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float x;
  memcpy(&x, &wide, 4);
  return x;
}

void deliver(const Copy &c) {
  note(c.to, 16, true);
  if (c.valid) {
    memcpy(c.to, c.from, 16);
  } else {
    memset(c.to, 0, 16);
  }
}

void run_block() {
  for (Shared *s = all_shared; s; s = s->next) memset(s->bytes, 0xff, s->size);
  memset(dynamic_shared, 0xff, dynamic_shared_size);
  block_epoch++;
  alive = count;
  ready.clear();
  at_barrier.clear();
  first_ready = 0;
  for (int i = 0; i < count; i++) {
    Thread &t = threads[i];
    const unsigned u = i, x = block_size.x, y = block_size.y;
    t.index = {u % x, u / x % y, u / (x * y)};
    t.number = i;
    t.lane = i % 32;
    t.warp = i / 32;
    t.group = 0;
    t.copies.clear();
    t.stack_pointer = fresh_stack(stacks + STACK * (i + 1), entry);
    Warp &w = warps[t.warp];
    w.lanes = t.lane + 1;
    w.arrived = 0;
  }
  for (int i = 0; i < count; i++) wake(order == Order::Reverse ? count - 1 - i : i);
  current = &threads[pick()];
  cpu_switch(&host_stack, self().stack_pointer);
}

struct Kernel {
  Thunk thunk;
  void *function;
  std::vector<size_t> sizes;
};
std::map<std::string, Kernel> &kernels(bool checked) {
  static std::map<std::string, Kernel> tables[2];
  return tables[checked];
}

} // namespace

void fail(const std::string &text) {
  if (error.empty()) {
    auto at = [](uint3 v) {
      return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
    };
    error = text + "; in block " + at(block_index) + ", thread " + at(current->index);
  }
  void *abandoned;
  cpu_switch(&abandoned, host_stack);
  abort();
}

bool on_own_stack(const void *p) {
  auto base = stacks + STACK * current->number;
  return p >= base && p < base + STACK;
}

Shared::Shared(size_t size)
    : bytes(static_cast<unsigned char *>(operator new(size, std::align_val_t(256)))), size(size), next(all_shared) {
  memset(bytes, 0xff, size);
  all_shared = this;
}

// The compiler may report such an access as four of four bytes, aligned each.
void load16(void *to, const void *from) {
  note(from, 16, false);
  memcpy(to, from, 16);
}

void store16(void *to, const void *from) {
  note(to, 16, true);
  memcpy(to, from, 16);
}

void barrier() {
  Thread &t = self();
  t.state = State::Blocked;
  t.at = "sync_block";
  at_barrier.push_back(t.number);
  if ((int)at_barrier.size() == count) {
    block_epoch++;
    std::sort(at_barrier.begin(), at_barrier.end());
    if (order == Order::Reverse) std::reverse(at_barrier.begin(), at_barrier.end());
    if (order == Order::Newest) { // whole warps run ahead, another one each time
      const int first = draw() % ((count + 31) / 32) * 32;
      std::rotate(at_barrier.begin(), at_barrier.begin() + first, at_barrier.end());
    }
    for (int i : at_barrier) wake(i);
    at_barrier.clear();
  }
  next();
}

void warp_barrier() {
  collective("sync_warp", [](Warp &) {});
}

void exchange(void *value, size_t size, int mask) {
  Warp &w = warps[current->warp];
  const int lane = current->lane;
  memcpy(w.in[lane], value, size);
  w.mask[lane] = mask;
  collective("shuffle_xor", [](Warp &w) {
    for (int l = 0; l < w.lanes; l++) {
      const int from = l ^ w.mask[l];
      if (from < w.lanes)
        memcpy(w.out[l], w.in[from], 8);
      else
        memset(w.out[l], 0xff, 8); // a lane that does not exist
    }
  });
  memcpy(value, w.out[lane], size);
}

void matrices(uint32_t *out, const void *row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("load_matrices: a row is not aligned to 16 bytes");
  note(row, 16, false);
  Warp &w = warps[current->warp];
  const int lane = current->lane;
  memcpy(w.in[lane], row, 16);
  auto half = [](Warp &w, int matrix, int row, int column) { return w.in[8 * matrix + row] + 2 * column; };
  if (transposed) {
    collective("load_matrices_transposed", [&](Warp &w) {
      for (int l = 0; l < 32; l++)
        for (int m = 0; m < 4; m++)
          for (int e = 0; e < 2; e++) memcpy(w.out[l] + 4 * m + 2 * e, half(w, m, l % 4 * 2 + e, l / 4), 2);
    });
  } else {
    collective("load_matrices", [&](Warp &w) {
      for (int l = 0; l < 32; l++)
        for (int m = 0; m < 4; m++) memcpy(w.out[l] + 4 * m, half(w, m, l / 4, l % 4 * 2), 4);
    });
  }
  memcpy(out, w.out[lane], 16);
}

void multiply(float *acc, const uint32_t *a, uint32_t b0, uint32_t b1) {
  Warp &w = warps[current->warp];
  unsigned char *in = w.in[current->lane];
  memcpy(in, a, 16);
  memcpy(in + 16, &b0, 4);
  memcpy(in + 20, &b1, 4);
  memcpy(in + 32, acc, 16);
  collective("multiply", [](Warp &w) {
    float a[16][16], b[16][8], c[16][8];
    for (int l = 0; l < 32; l++) {
      const int g = l / 4, t = l % 4 * 2;
      uint16_t h[12];
      float own[4];
      memcpy(h, w.in[l], 24);
      memcpy(own, w.in[l] + 32, 16);
      for (int e = 0; e < 2; e++) {
        a[g][t + e] = widen(h[e]);
        a[g + 8][t + e] = widen(h[2 + e]);
        a[g][t + 8 + e] = widen(h[4 + e]);
        a[g + 8][t + 8 + e] = widen(h[6 + e]);
        b[t + e][g] = widen(h[8 + e]);
        b[t + 8 + e][g] = widen(h[10 + e]);
        c[g][t + e] = own[e];
        c[g + 8][t + e] = own[2 + e];
      }
    }
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < 16; k++)
        for (int j = 0; j < 8; j++) c[i][j] += a[i][k] * b[k][j];
    for (int l = 0; l < 32; l++) {
      const int g = l / 4, t = l % 4 * 2;
      const float own[4] = {c[g][t], c[g][t + 1], c[g + 8][t], c[g + 8][t + 1]};
      memcpy(w.out[l], own, 16);
    }
  });
  memcpy(acc, w.out[current->lane], 16);
}

void copy_async(void *to, const void *from, bool valid) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16)
    fail("copy_async: an address is not aligned to 16 bytes");
  note(to, 16, true);
  if (valid) note(from, 16, false);
  const Copy c{to, from, valid, self().group};
  if (order == Order::Random && draw() % 2) return deliver(c); // it may also be fast
  memset(to, 0xff, 16);
  self().copies.push_back(c);
}

void copy_commit() { self().group++; }

void copy_wait(int pending) {
  Thread &t = self();
  auto late = std::stable_partition(t.copies.begin(), t.copies.end(),
                                    [&](const Copy &c) { return c.group >= t.group - pending; });
  std::for_each(late, t.copies.end(), deliver);
  t.copies.erase(late, t.copies.end());
}

uint32_t atomic_add(uint32_t *p, uint32_t x) {
  note(p, 4, false);
  const uint32_t old = *p;
  *p += x;
  return old;
}

void add_kernel(const char *name, bool checked, Thunk thunk, void *function, const size_t *sizes, int count) {
  kernels(checked)[name] = {thunk, function, {sizes, sizes + count}};
}

} // namespace cpu

using namespace cpu;

// As cuLaunchKernel. `sizes` are those of the arguments as the caller passes
// them, or null. Gives null, or what went wrong (valid until the next call).
extern "C" const char *cuda_on_cpu_launch(const char *name, const unsigned *grid, const unsigned *block,
                                          size_t shared_bytes, void **args, const size_t *sizes,
                                          int arg_count, unsigned how, bool checked) {
  error.clear();
  auto found = kernels(checked).find(name);
  if (found == kernels(checked).end()) {
    error = std::string("no kernel is called ") + name;
    return error.c_str();
  }
  const Kernel &kernel = found->second;
  // The real interface brings no sizes.
  if (sizes && kernel.sizes != std::vector<size_t>(sizes, sizes + arg_count)) {
    error = std::string(name) + ": number or sizes of the arguments differ from the kernel's";
    return error.c_str();
  }
  const size_t size = (size_t)block[0] * block[1] * block[2];
  const size_t blocks = (size_t)grid[0] * grid[1] * grid[2];
  if (!size || size > MAX_THREADS || !blocks || grid[1] > 65535 || grid[2] > 65535 || shared_bytes > 99 << 10) {
    error = std::string(name) + ": a launch that a device refuses (block, grid or shared memory)";
    return error.c_str();
  }
  if (!stacks) {
    void *p = mmap(nullptr, STACK * MAX_THREADS, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    stacks = static_cast<unsigned char *>(p);
    for (int i = 0; i < MAX_THREADS; i++) mprotect(stacks + STACK * i, PAGE, PROT_NONE);
  }
  run_thread = kernel.thunk;
  function = kernel.function;
  arguments = args;
  grid_size = {grid[0], grid[1], grid[2]};
  block_size = {block[0], block[1], block[2]};
  count = (int)size;
  order = static_cast<Order>(how & 3);
  checking = checked;
  random_state = 0x9e3779b97f4a7c15ull * (how + 1);
  dynamic_shared_size = shared_bytes;
  std::vector<uint4> storage(shared_bytes / 16 + 9);
  auto base = reinterpret_cast<uintptr_t>(storage.data());
  dynamic_shared = reinterpret_cast<unsigned char *>((base + 127) / 128 * 128);
  std::vector<size_t> sequence(blocks);
  for (size_t i = 0; i < blocks; i++) sequence[i] = order == Order::Reverse ? blocks - 1 - i : i;
  if (order > Order::Reverse)
    for (size_t i = blocks; i > 1; i--) std::swap(sequence[i - 1], sequence[draw() % i]);
  for (size_t b : sequence) {
    block_index = {(unsigned)(b % grid[0]), (unsigned)(b / grid[0] % grid[1]), (unsigned)(b / grid[0] / grid[1])};
    run_block();
    if (!error.empty()) {
      error = std::string(name) + ": " + error;
      break;
    }
  }
  checking = false;
  return error.empty() ? nullptr : error.c_str();
}

// Calls `each` with the size of every argument of a kernel, in their order.
extern "C" void cuda_on_cpu_arguments(const char *name, void (*each)(void *, size_t), void *context) {
  auto found = kernels(false).find(name);
  if (found == kernels(false).end()) return;
  for (size_t size : found->second.sizes) each(context, size);
}
