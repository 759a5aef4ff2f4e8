// A stand-in for libcuda.so.1 and libcublasLt.so.12: the functions that
// engine::cuda::Nvidia calls, on the runtime beside this file. So the code that
// talks to NVIDIA's libraries is executed in CI as well, against what their manuals
// say; what they do beyond that only a GPU shows.
//
// CUDA_STAND_IN makes it unfit: `old` (driver), `none` (no GPU), `old, none`, `ancient` (GPU),
// `poolless` (memory), `full`, `filling` (after 20 allocations), `stumbling` (refuses to launch add_noise),
// `crowded` (no page-locked memory that the GPU sees), `swamped` (none at all), `another` (by its
// name), for graphs `uncaptured`, `uninstantiated`, `not uploaded`; `tallied` says at the end
// how often its stream was waited for. `hollow` is one of another kind: it has an H200's memory, which is never
// touched, and looks at what it is asked for, but does none of it and reads as zeros. So the
// host's side of a model of any size is run here: what it allocates, and how long it takes to ask.
#include "internal.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include <sys/mman.h>

extern "C" const char *cuda_on_cpu_launch(const char *, const unsigned *, const unsigned *, size_t, void **,
                                          const size_t *, int, unsigned, bool);
extern "C" void cuda_on_cpu_arguments(const char *, void (*)(void *, size_t), void *);

namespace {

enum Result {
  Success = 0,
  Invalid = 1,
  OutOfMemory = 2,
  NoDevice = 100,
  NotFound = 500,
  NotReady = 600,
  LaunchFailed = 719,
  CaptureUnsupported = 900
};

bool unfit(const char *how) {
  const char *set = getenv("CUDA_STAND_IN");
  return set && !strcmp(set, how);
}

const bool hollow = unfit("hollow");

struct Tally {
  size_t waits = 0;
  ~Tally() {
    if (unfit("tallied")) fprintf(stderr, "stand-in for libcuda: its stream was waited for %zu times\n", waits);
  }
} tally;

int the_context, the_module;
thread_local int *current_context;
std::map<std::string, std::string> functions; // stable addresses: a handle is a name
std::map<const void *, int> shared_limit;
std::map<void *, size_t> memory;
size_t used, most_used, hoarded;
std::set<void *> page_locked;

// Whether these bytes are all of one allocation.
bool inside(const void *at, size_t bytes) {
  auto after = memory.upper_bound(const_cast<void *>(at));
  if (after == memory.begin()) return false;
  const auto &[base, size] = *--after;
  return (const char *)at + bytes <= (char *)base + size;
}
std::mutex one; // call at a time, of those that change what is above or run

// What a stream is given is done at once, unless it is captured.
using Graph = std::vector<std::function<int()>>;
struct Stream {
  Graph *capturing = nullptr;
};
std::set<void *> streams;
int give(void *stream, std::function<int()> work) {
  if (!streams.count(stream)) return Invalid;
  Graph *to = static_cast<Stream *>(stream)->capturing;
  if (!to) return work();
  return to->push_back(std::move(work)), Success;
}
bool captured(void *stream) { return streams.count(stream) && static_cast<Stream *>(stream)->capturing; }

// Copies from page-locked memory are done late, when something needs them: memory
// that was used again before its event passed shows by then.
struct Upload {
  void *to;
  const void *from;
  size_t bytes;
};
std::vector<Upload> uploads;
void settle() {
  for (const Upload &u : uploads) memcpy(u.to, u.from, u.bytes);
  uploads.clear();
}

} // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))
// Every call below needs the context to be current in the calling thread.
#define IN_CONTEXT                                                                                 \
  if (current_context != &the_context) return 201

EXPORTED int cuDriverGetVersion(int *version) {
  *version = unfit("old") || unfit("old, none") ? 12020 : 12040;
  return Success;
}
EXPORTED int cuInit(unsigned) { return unfit("none") || unfit("old, none") ? NoDevice : Success; }
EXPORTED int cuGetErrorName(int code, const char **text) {
  *text = code == LaunchFailed ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR";
  return Success;
}
EXPORTED int cuGetErrorString(int code, const char **text) {
  *text = code == LaunchFailed ? "unspecified launch failure" : "an error";
  return Success;
}
EXPORTED int cuDeviceGetCount(int *count) { return *count = 1, Success; }
EXPORTED int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal ? Invalid : Success; }
EXPORTED int cuDeviceGetName(char *name, int size, int) {
  return snprintf(name, size, unfit("another") ? "another stand-in" : "stand-in"), Success;
}
EXPORTED int cuDeviceGetAttribute(int *value, int attribute, int) {
  const std::map<int, int> has{{75, unfit("ancient") ? 7 : 8}, {76, 5}, {115, !unfit("poolless")}};
  const auto found = has.find(attribute);
  if (found == has.end()) return Invalid;
  return *value = found->second, Success;
}
EXPORTED int cuDevicePrimaryCtxRetain(void **context, int) { return *context = &the_context, Success; }
EXPORTED int cuDevicePrimaryCtxRelease_v2(int) { return Success; }
EXPORTED int cuCtxSetCurrent(void *context) { return current_context = static_cast<int *>(context), Success; }
EXPORTED int cuDeviceGetDefaultMemPool(void **pool, int) { return *pool = &the_context, Success; }
EXPORTED int cuMemPoolSetAttribute(void *, int attribute, void *) { return attribute == 4 ? Success : Invalid; }
EXPORTED int cuMemPoolGetAttribute(void *, int attribute, void *value) {
  std::lock_guard lock(one);
  *static_cast<uint64_t *>(value) = most_used;
  return attribute == 8 ? Success : Invalid;
}
// What was freed stays taken until then.
EXPORTED int cuMemPoolTrimTo(void *, size_t) {
  std::lock_guard lock(one);
  return hoarded = 0, Success;
}
EXPORTED int cuStreamCreate(void **stream, unsigned flags) {
  std::lock_guard lock(one);
  streams.insert(*stream = new Stream);
  return flags == 1 ? Success : Invalid;
}
EXPORTED int cuStreamSynchronize(void *stream) {
  std::lock_guard lock(one);
  if (captured(stream)) return CaptureUnsupported;
  tally.waits++;
  return settle(), Success;
}
EXPORTED int cuStreamDestroy_v2(void *stream) {
  std::lock_guard lock(one);
  if (!streams.erase(stream)) return Invalid;
  return delete static_cast<Stream *>(stream), Success;
}

// Graphs: what a stream was given is done when one is launched, as often as it is. The
// arguments of kernels, factors of products and so on are those of the time of the capture.
thread_local bool capturing = false;
EXPORTED int cuStreamBeginCapture_v2(void *stream, int) {
  std::lock_guard lock(one);
  if (!streams.count(stream) || captured(stream)) return Invalid;
  if (unfit("uncaptured")) return CaptureUnsupported;
  static_cast<Stream *>(stream)->capturing = new Graph;
  return capturing = true, Success;
}
EXPORTED int cuStreamEndCapture(void *stream, void **graph) {
  std::lock_guard lock(one);
  if (!captured(stream)) return Invalid;
  *graph = std::exchange(static_cast<Stream *>(stream)->capturing, nullptr);
  return capturing = false, Success;
}
EXPORTED int cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
  if (unfit("uninstantiated")) return OutOfMemory;
  *executable = new Graph(*static_cast<Graph *>(graph));
  return flags ? Invalid : Success;
}
EXPORTED int cuGraphDestroy(void *graph) { return delete static_cast<Graph *>(graph), Success; }
EXPORTED int cuGraphExecDestroy(void *executable) { return delete static_cast<Graph *>(executable), Success; }
EXPORTED int cuGraphUpload(void *, void *stream) {
  std::lock_guard lock(one);
  if (unfit("not uploaded")) return OutOfMemory;
  return streams.count(stream) && !captured(stream) ? Success : Invalid;
}
EXPORTED int cuGraphLaunch(void *executable, void *stream) {
  IN_CONTEXT;
  std::lock_guard lock(one);
  if (!streams.count(stream) || captured(stream)) return Invalid;
  settle();
  for (const auto &work : *static_cast<Graph *>(executable))
    if (const int problem = work()) return problem;
  return Success;
}

// An event has not passed when it is asked for the first time. Its time is that of its
// recording, unless it is of those that have none (flag 2).
struct Event {
  unsigned flags;
  bool asked;
  std::optional<std::chrono::steady_clock::time_point> at;
};
EXPORTED int cuEventCreate(void **event, unsigned flags) { return *event = new Event{flags}, Success; }
EXPORTED int cuEventRecord(void *event, void *stream) {
  std::lock_guard lock(one);
  if (captured(stream)) return CaptureUnsupported;
  static_cast<Event *>(event)->at = std::chrono::steady_clock::now();
  return Success;
}
EXPORTED int cuEventElapsedTime(float *milliseconds, void *from, void *to) {
  const Event &a = *static_cast<Event *>(from), &b = *static_cast<Event *>(to);
  if ((a.flags | b.flags) & 2 || !a.at || !b.at) return Invalid;
  *milliseconds = std::chrono::duration<float, std::milli>(*b.at - *a.at).count();
  return Success;
}
EXPORTED int cuEventQuery(void *event) {
  std::lock_guard lock(one);
  if (!std::exchange(static_cast<Event *>(event)->asked, true)) return NotReady;
  return settle(), Success;
}
EXPORTED int cuEventSynchronize(void *) {
  std::lock_guard lock(one);
  return settle(), Success;
}
EXPORTED int cuEventDestroy_v2(void *event) { return delete static_cast<Event *>(event), Success; }

EXPORTED int cuModuleLoadData(void **module, const void *image) {
  IN_CONTEXT;
  *module = &the_module;
  return strstr(static_cast<const char *>(image), ".target sm_80") ? Success : Invalid;
}
EXPORTED int cuModuleUnload(void *) { return Success; }
EXPORTED int cuModuleGetFunction(void **function, void *module, const char *name) {
  std::lock_guard lock(one);
  *function = &(functions[name] = name);
  return module == &the_module ? Success : NotFound;
}
EXPORTED int cuFuncSetAttribute(void *function, int attribute, int value) {
  std::lock_guard lock(one);
  shared_limit[function] = value;
  return attribute == 8 && value <= 99 << 10 ? Success : Invalid;
}
EXPORTED int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                            unsigned bz, unsigned shared, void *stream, void **args, void **) {
  IN_CONTEXT;
  std::lock_guard lock(one);
  if (shared > 48 << 10 && (int)shared > shared_limit[function]) return Invalid;
  const char *name = static_cast<std::string *>(function)->c_str();
  std::vector<std::vector<char>> values;
  struct Copy {
    decltype(values) *to;
    void **from;
  } copy{&values, args};
  cuda_on_cpu_arguments(
      name,
      [](void *context, size_t size) {
        Copy &copy = *static_cast<Copy *>(context);
        const char *from = static_cast<char *>(copy.from[copy.to->size()]);
        copy.to->emplace_back(from, from + size);
      },
      &copy);
  const bool fits = gx && gx <= 0x7fffffff && gy && gy <= 0xffff && gz && gz <= 0xffff && bx && bx <= 1024;
  if (!fits || by != 1 || bz != 1) return Invalid;
  if (unfit("stumbling") && !strcmp(name, "add_noise")) return LaunchFailed;
  if (hollow) return give(stream, [] { return Success; });
  return give(stream, [=]() mutable {
    settle();
    const unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
    std::vector<void *> args;
    for (auto &value : values) args.push_back(value.data());
    const char *problem = cuda_on_cpu_launch(name, grid, block, shared, args.data(), nullptr, 0, 0, false);
    if (problem) fprintf(stderr, "stand-in for libcuda: %s\n", problem);
    return problem ? LaunchFailed : Success;
  });
}

// A device of 1 GiB, or of an H200's.
EXPORTED int cuMemGetInfo_v2(size_t *free, size_t *total) {
  IN_CONTEXT;
  std::lock_guard lock(one);
  *total = hollow ? size_t(143771) << 20 : size_t(1) << 30;
  *free = *total - std::min(*total, used + hoarded);
  return Success;
}
EXPORTED int cuMemAllocAsync(void **address, size_t bytes, void *) {
  IN_CONTEXT;
  if (unfit("full") && bytes < 16 << 20) return OutOfMemory;
  static std::atomic<int> allocations = 0;
  if (unfit("filling") && ++allocations > 20) return OutOfMemory;
  if (hollow) {
    *address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*address == MAP_FAILED) return OutOfMemory;
  } else {
    *address = aligned_alloc(256, (bytes + 255) / 256 * 256);
    memset(*address, 0xff, bytes);
  }
  std::lock_guard lock(one);
  memory[*address] = bytes;
  hoarded -= std::min(hoarded, bytes);
  most_used = std::max(most_used, used += bytes);
  return Success;
}
EXPORTED int cuMemFreeAsync(void *address, void *) {
  IN_CONTEXT;
  std::lock_guard lock(one);
  settle();
  const auto found = memory.find(address);
  if (found == memory.end()) return Invalid;
  const size_t bytes = found->second;
  used -= bytes, hoarded += bytes;
  memory.erase(found);
  if (hollow) return munmap(address, bytes) ? Invalid : Success;
  return free(address), Success;
}
EXPORTED int cuMemsetD8Async(void *at, unsigned char value, size_t bytes, void *stream) {
  std::lock_guard lock(one);
  if (hollow) return inside(at, bytes) ? give(stream, [] { return Success; }) : Invalid;
  return give(stream, [=] { return settle(), memset(at, value, bytes), Success; });
}
EXPORTED int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
  std::lock_guard lock(one);
  if (captured(stream)) return CaptureUnsupported;
  if (hollow) return inside(to, bytes) ? Success : Invalid;
  if (page_locked.count(const_cast<void *>(from))) return uploads.push_back({to, from, bytes}), Success;
  settle();
  return memcpy(to, from, bytes), Success;
}
EXPORTED int cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
  std::lock_guard lock(one);
  if (captured(stream)) return CaptureUnsupported;
  if (hollow) return memset(to, 0, bytes), inside(from, bytes) ? Success : Invalid;
  settle();
  return memcpy(to, from, bytes), Success;
}
EXPORTED int cuMemHostAlloc(void **at, size_t bytes, unsigned flags) {
  if (unfit("swamped") || (unfit("crowded") && flags & 2)) return OutOfMemory;
  std::lock_guard lock(one);
  return page_locked.insert(*at = malloc(bytes)), Success;
}
EXPORTED int cuMemFreeHost(void *at) {
  std::lock_guard lock(one);
  return page_locked.erase(at), free(at), Success;
}

// cuBLASLt thinks in columns: element (i, j) of a matrix is at i + j · ld.
struct Layout {
  int type; // 0: f32, 14: bf16
  uint64_t rows, cols;
  int64_t ld;
  float get(const void *base, uint64_t i, uint64_t j) const {
    const uint64_t at = i + j * ld;
    if (type == 0) return static_cast<const float *>(base)[at];
    return as_float((u32) static_cast<const uint16_t *>(base)[at] << 16);
  }
};
struct Descriptor {
  int transposed[2];
};

EXPORTED size_t cublasLtGetVersion() { return 120400; }
EXPORTED int cublasLtCreate(void **handle) { return *handle = &the_context, 0; }
EXPORTED int cublasLtDestroy(void *) { return 0; }
EXPORTED int cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  if (ld < (int64_t)rows) return 7;
  return *layout = new Layout{type, rows, cols, ld}, 0;
}
EXPORTED int cublasLtMatmulDescCreate(void **desc, int compute, int scale) {
  return *desc = new Descriptor{}, compute == 68 && scale == 0 ? 0 : 7;
}
EXPORTED int cublasLtMatmulDescSetAttribute(void *desc, int attribute, const void *value, size_t size) {
  if ((attribute != 3 && attribute != 4) || size != 4) return 7;
  return memcpy(&static_cast<Descriptor *>(desc)->transposed[attribute - 3], value, 4), 0;
}
EXPORTED int cublasLtMatmulPreferenceCreate(void **preference) { return *preference = &the_context, 0; }
EXPORTED int cublasLtMatmulPreferenceSetAttribute(void *, int attribute, const void *value, size_t size) {
  // Partial sums in f32 alone.
  if (attribute == 3) return size == 4 && *static_cast<const unsigned *>(value) == 2 ? 0 : 7;
  return (attribute == 1 && size == 8) || (attribute >= 5 && attribute <= 8 && size == 4) ? 0 : 7;
}
EXPORTED int cublasLtMatmulPreferenceDestroy(void *) { return 0; }
EXPORTED int cublasLtMatrixLayoutDestroy(void *layout) { return delete static_cast<Layout *>(layout), 0; }
EXPORTED int cublasLtMatmulDescDestroy(void *desc) { return delete static_cast<Descriptor *>(desc), 0; }

// As the library's struct: the algorithm is opaque.
struct Heuristic {
  uint64_t algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
EXPORTED int cublasLtMatmulAlgoGetHeuristic(void *, void *, void *, void *, void *, void *, void *, int wanted,
                                            Heuristic *found, int *count) {
  if (capturing) return 14; // as versions from CUDA 13.3 on
  memset(found, 0, sizeof *found);
  return *count = wanted, 0;
}
// By the manual: identifier, tile, parts of a split sum, stages; and the cluster, of two bytes.
EXPORTED int cublasLtMatmulAlgoConfigGetAttribute(const uint64_t *algorithm, int attribute, void *value, size_t size,
                                                  size_t *written) {
  const size_t own = attribute == 8 ? 2 : 4;
  if (!algorithm || size != own) return 7;
  memset(value, 0, size);
  *static_cast<unsigned char *>(value) = attribute == 0 ? 66 : attribute == 2 ? 1 : 0;
  return *written = own, 0;
}
EXPORTED int cublasLtMatmul(void *, void *description, const float *alpha, const void *a, Layout *la, const void *b,
                            Layout *lb, const float *beta, const void *c, Layout *lc, void *d, Layout *ld, void *,
                            void *, size_t, void *stream) {
  IN_CONTEXT;
  const auto &t = static_cast<Descriptor *>(description)->transposed;
  const bool ta = t[0], tb = t[1];
  const uint64_t m = ta ? la->cols : la->rows, k = ta ? la->rows : la->cols;
  const uint64_t n = tb ? lb->rows : lb->cols;
  if (!m || !n || !k) return 7; // the library does not say what it makes of these
  if ((tb ? lb->cols : lb->rows) != k || ld->rows != m || ld->cols != n || lc->rows != m || lc->cols != n) return 7;
  if (hollow) {
    std::lock_guard lock(one);
    const auto is_inside = [](const void *at, const Layout *l) {
      return inside(at, ((l->cols - 1) * l->ld + l->rows) * (l->type == 0 ? 4 : 2));
    };
    if (!is_inside(a, la) || !is_inside(b, lb) || !is_inside(c, lc) || !is_inside(d, ld)) return 7;
    return give(stream, [] { return 0; });
  }
  auto product = [=, alpha = *alpha, beta = *beta] {
    // A column's sums side by side, each in the order of k.
    std::vector<float> left(m * k), right(n * k), sums(m);
    for (uint64_t i = 0; i < m; i++)
      for (uint64_t l = 0; l < k; l++) left[l * m + i] = ta ? la->get(a, l, i) : la->get(a, i, l);
    for (uint64_t j = 0; j < n; j++)
      for (uint64_t l = 0; l < k; l++) right[j * k + l] = tb ? lb->get(b, j, l) : lb->get(b, l, j);
    for (uint64_t j = 0; j < n; j++) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (uint64_t l = 0; l < k; l++)
        for (uint64_t i = 0; i < m; i++) sums[i] += left[l * m + i] * right[j * k + l];
      for (uint64_t i = 0; i < m; i++) {
        const float sum = alpha * sums[i] + (beta != 0 ? beta * lc->get(c, i, j) : 0);
        const uint64_t at = i + j * ld->ld;
        if (ld->type == 0)
          static_cast<float *>(d)[at] = sum;
        else
          static_cast<uint16_t *>(d)[at] = (uint16_t)to_bf16(sum);
      }
    }
  };
  std::unique_lock lock(one);
  if (captured(stream)) return give(stream, [=] { return settle(), product(), 0; });
  if (!streams.count(stream)) return 7;
  settle();
  lock.unlock(); // it may take long, and changes nothing that is everybody's
  product();
  return 0;
}
