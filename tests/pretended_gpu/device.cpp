// CUDA runtime and driver without a GPU. Host code is real, stream capture follows CUDA's rules,
// memory is counted, and kernels do nothing. Functions that are not here return 0 (build.py).
#include <dlfcn.h>
#include <driver_types.h>
#include <pthread.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <vector_types.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#define API extern "C" __attribute__((visibility("default"), used))
#define LOCK std::lock_guard<std::recursive_mutex> guard(mutex)

enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONFIGURATION = 9, INVALID_DEVICE = 101 };
enum { UNSUPPORTED = 801, CAPTURE_UNSUPPORTED = 900, INVALIDATED = 901, UNJOINED = 904 };
enum { CROSS_STREAM = 905, IMPLICIT = 906 };
enum Status { NONE, ACTIVE, BROKEN };
enum Mode { GLOBAL, THREAD_LOCAL, RELAXED };
enum { LEGACY_HANDLE = 1, PER_THREAD_HANDLE = 2 };

using Counts = std::map<std::string, long>;

struct Graph {
  long id;
  Counts nodes;
};

struct Stream {
  long id;
  int priority;
  Status status;
  int mode;
  bool origin;
  Graph* graph;
  pthread_t thread;
  long work, joined;  // captured work so far, and how much of it another stream waits for
};

struct Event {
  bool recorded, captured;
  double milliseconds;
  Stream* stream;
  Graph* graph;
  long work;
};

struct Function {
  std::string name;
};

static std::recursive_mutex mutex;
static Stream legacy{};
static std::set<Stream*> streams{&legacy};
static long next_id = 1;
static Counts counts;
static std::unordered_map<const void*, Function*> functions;
struct Block {
  size_t bytes;
  int device;  // -1: pinned host memory
};
static std::map<uintptr_t, Block> blocks;
static std::map<uint64_t, size_t> handles;  // physical memory of cuMemCreate
static size_t used[64], peak[64];
static thread_local int device = 0, last_error = 0, thread_mode = GLOBAL;

static double setting(const char* name, double otherwise) {
  const char* text = getenv(name);
  return text ? atof(text) : otherwise;
}
static size_t capacity() {
  static size_t bytes = setting("PRETENDED_GPU_GIB", 139.8) * (1ull << 30);
  return bytes;
}
static int capability() {
  static int value = setting("PRETENDED_GPU_CAPABILITY", 90);
  return value;
}
static int devices() {
  static int value = setting("PRETENDED_GPU_COUNT", 1);
  return value;
}
static int fail(int error) { return last_error = error; }
static Stream* stream_of(void* handle) {
  bool is_default = (uintptr_t)handle <= PER_THREAD_HANDLE;
  return is_default || !streams.count((Stream*)handle) ? &legacy : (Stream*)handle;
}
static double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
}

// ---- what happened: counted by kind and name; captured work counts at each replay ----
static void note(const char* kind, const std::string& name, Stream* stream = nullptr) {
  Counts& into = stream && stream->status == ACTIVE ? stream->graph->nodes : counts;
  ++into[std::string(kind) + "\t" + name];
}
static void warn(const char* kind, const std::string& text) {
  note(kind, text);
  fprintf(stderr, "[pretended GPU] %s: %s\n", kind, text.c_str());
}
static void invalidate(Graph* graph, const std::string& why) {
  for (Stream* s : streams)
    if (s->graph == graph && s->status) s->status = BROKEN;
  warn("invalidated", why);
}
static Stream* capture_of_this_thread() {
  for (Stream* s : streams)
    if (s->status && s->origin && pthread_equal(s->thread, pthread_self())) return s;
  return nullptr;
}
// A call that CUDA forbids while a capture runs, depending on the modes of capture and thread.
static int forbidden(const char* call) {
  if (thread_mode == RELAXED) return 0;
  for (Stream* s : streams) {
    bool mine = pthread_equal(s->thread, pthread_self());
    if (s->status != ACTIVE || !s->origin || s->mode == RELAXED) continue;
    if (!mine && (s->mode == THREAD_LOCAL || thread_mode == THREAD_LOCAL)) continue;
    invalidate(s->graph, call);
    return fail(CAPTURE_UNSUPPORTED);
  }
  return 0;
}
// Work on a stream. Work of a capturing thread on another stream would be missing in the graph.
static int work(const char* kind, const std::string& name, Stream* stream) {
  if (stream->status == BROKEN) return fail(INVALIDATED);
  Stream* capture = capture_of_this_thread();
  if (capture && capture->status == ACTIVE && stream->status == NONE)
    warn("not captured", name + " on stream " + std::to_string(stream->id));
  if (stream->status == ACTIVE) ++stream->work;
  note(kind, name, stream);
  return 0;
}
static int synchronize(const char* call) {
  if (int error = forbidden(call)) return error;
  note("sync", call);
  return 0;
}

API void pretended_reset() {
  LOCK;
  counts.clear();
  std::copy(used, used + 64, peak);
}
API const char* pretended_counts() {
  LOCK;
  static std::string text;
  text.clear();
  for (auto& [name, count] : counts) text += std::to_string(count) + "\t" + name + "\n";
  return text.c_str();
}
API size_t pretended_peak() { return peak[device]; }
API int pretended_launch(const char* name, void* stream) {
  LOCK;
  return work("library", name, stream_of(stream));
}
API int pretended_unknown(const char* name) {
  static bool verbose = getenv("PRETENDED_GPU_VERBOSE");
  if (verbose) fprintf(stderr, "[pretended GPU] %s\n", name);
  return 0;
}

// ---- devices ----
API int cudaGetDeviceCount(int* n) { return *n = devices(), 0; }
API int cudaGetDevice(int* d) { return *d = device, 0; }
API int cudaSetDevice(int d) {
  if (d < 0 || d >= devices()) return fail(INVALID_DEVICE);
  return device = d, 0;
}
API int cudaDriverGetVersion(int* v) { return *v = setting("PRETENDED_GPU_CUDA", 13000), 0; }
API int cudaRuntimeGetVersion(int* v) { return cudaDriverGetVersion(v); }
API int cudaGetLastError() {
  int error = last_error;
  last_error = 0;
  return error;
}
API int cudaPeekAtLastError() { return last_error; }
API const char* cudaGetErrorString(int error) {
  switch (error) {
    case 0: return "no error";
    case OUT_OF_MEMORY: return "out of memory";
    case INVALID_CONFIGURATION: return "invalid configuration argument";
    case INVALID_DEVICE: return "invalid device ordinal";
    case CAPTURE_UNSUPPORTED: return "operation not permitted when stream is capturing";
    case INVALIDATED: return "operation failed due to a previous error during capture";
    case UNJOINED: return "capturing stream has unjoined work";
    case CROSS_STREAM: return "dependency created on uncaptured work in another stream";
    case IMPLICIT: return "operation would make the legacy stream depend on a capturing stream";
    default: return "error of the pretended GPU";
  }
}
API const char* cudaGetErrorName(int error) { return cudaGetErrorString(error); }
static int attribute(int name) {
  bool hopper = capability() >= 90;
  static const std::map<int, int> same = {
      {1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, INT32_MAX}, {6, 65535}, {7, 65535}, {8, 49152},
      {9, 65536}, {10, 32}, {12, 65536}, {13, 1980000}, {14, 512}, {31, 1}, {36, 3201000},
      {37, 6144}, {39, 2048}, {40, 3}, {41, 1}, {82, 65536}, {83, 1}, {95, 1}, {102, 1}, {106, 32},
      {115, 1}};
  switch (name) {
    case 16: return hopper ? 132 : 108;                   // multiprocessors
    case 38: return hopper ? 60 << 20 : 40 << 20;         // L2
    case 75: return capability() / 10;
    case 76: return capability() % 10;
    case 81: return hopper ? 233472 : 167936;             // shared memory of a multiprocessor
    case 97: return hopper ? 232448 : 166912;             // and of a block
    case 120: return hopper;                              // clusters
  }
  auto found = same.find(name);
  return found == same.end() ? 0 : found->second;
}
API int cudaDeviceGetAttribute(int* v, int name, int) { return *v = attribute(name), 0; }
API int cudaGetDeviceProperties(cudaDeviceProp* p, int d) {
  memset((void*)p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "Pretended GPU");
  memset(p->uuid.bytes, d + 1, 16);
  p->totalGlobalMem = capacity();
  p->major = capability() / 10;
  p->minor = capability() % 10;
  p->multiProcessorCount = attribute(16);
  p->l2CacheSize = attribute(38);
  p->sharedMemPerBlock = attribute(8);
  p->sharedMemPerBlockOptin = attribute(97);
  p->sharedMemPerMultiprocessor = attribute(81);
  p->reservedSharedMemPerBlock = 1024;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = attribute(39);
  p->maxBlocksPerMultiProcessor = 32;
  for (int i = 0; i < 3; ++i) p->maxThreadsDim[i] = attribute(2 + i);
  for (int i = 0; i < 3; ++i) p->maxGridSize[i] = attribute(5 + i);
  p->concurrentKernels = p->unifiedAddressing = p->managedMemory = p->cooperativeLaunch = 1;
  p->asyncEngineCount = 3;
  p->totalConstMem = 65536;
  p->memoryBusWidth = 6144;
  p->pciBusID = 1 + d;
  return 0;
}
API int cudaGetDeviceProperties_v2(cudaDeviceProp* p, int d) {
  return cudaGetDeviceProperties(p, d);
}
API int cudaDeviceGetPCIBusId(char* s, int n, int d) {
  return snprintf(s, n, "0000:%02x:00.0", d + 1), 0;
}
API int cudaDeviceCanAccessPeer(int* v, int, int) { return *v = 0, 0; }
API int cudaDeviceGetStreamPriorityRange(int* low, int* high) {
  if (low) *low = 0;
  if (high) *high = -5;
  return 0;
}
API int cudaDeviceSynchronize() { LOCK; return synchronize("cudaDeviceSynchronize"); }

// ---- memory: addresses without pages; all of it reads as zero ----
static int take(size_t n) {
  if (used[device] + n > capacity()) return fail(OUT_OF_MEMORY);
  used[device] += n;
  peak[device] = std::max(peak[device], used[device]);
  return 0;
}
static size_t span(size_t n) { return (n + (2 << 20) - 1) & ~(size_t)((2 << 20) - 1); }
static void* reserve(size_t n, int owner) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  size_t align = 2 << 20;
  int access = owner < 0 ? PROT_READ | PROT_WRITE : PROT_NONE;
  char* raw = (char*)mmap(nullptr, span(n) + align, access, flags, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  char* start = (char*)(((uintptr_t)raw + align - 1) & ~(uintptr_t)(align - 1));
  if (start > raw) munmap(raw, start - raw);
  if (start < raw + align) munmap(start + span(n), raw + align - start);
  blocks[(uintptr_t)start] = {n, owner};
  return start;
}
static size_t give_back(uintptr_t start) {
  size_t bytes = blocks.at(start).bytes;
  munmap((void*)start, span(bytes));
  blocks.erase(start);
  return bytes;
}
static Block* block_of(const void* p) {
  auto found = blocks.upper_bound((uintptr_t)p);
  if (found == blocks.begin()) return nullptr;
  --found;
  return (uintptr_t)p < found->first + found->second.bytes ? &found->second : nullptr;
}
static bool on_device(const void* p) {
  Block* block = block_of(p);
  return block && block->device >= 0;
}
API int cudaMalloc(void** p, size_t n) {
  LOCK;
  if (int error = forbidden("cudaMalloc")) return error;
  if (int error = take(n)) return error;
  *p = reserve(n, device);
  note("memory", "cudaMalloc");
  return *p ? 0 : fail(OUT_OF_MEMORY);
}
API int cudaFree(void* p) {
  LOCK;
  if (!p) return 0;
  if (int error = forbidden("cudaFree")) return error;
  auto found = blocks.find((uintptr_t)p);
  if (found == blocks.end()) return fail(INVALID_VALUE);
  int owner = found->second.device;
  used[owner] -= give_back(found->first);
  note("memory", "cudaFree");
  return 0;
}
API int cudaMallocAsync(void** p, size_t n, void*) { return cudaMalloc(p, n); }
API int cudaFreeAsync(void* p, void*) { return cudaFree(p); }
API int cudaHostAlloc(void** p, size_t n, unsigned) {
  LOCK;
  if (int error = forbidden("cudaHostAlloc")) return error;
  *p = reserve(n, -1);
  return *p ? 0 : fail(OUT_OF_MEMORY);
}
API int cudaFreeHost(void* p) {
  LOCK;
  if (blocks.count((uintptr_t)p)) give_back((uintptr_t)p);
  return 0;
}
API int cudaMemGetInfo(size_t* free, size_t* total) {
  LOCK;
  *total = capacity();
  *free = *total - used[device];
  return 0;
}
API int cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  LOCK;
  Block* block = block_of(p);
  memset((void*)a, 0, sizeof *a);
  a->device = block ? block->device : -1;
  a->type = cudaMemoryTypeUnregistered;
  if (!block) return 0;
  a->type = block->device < 0 ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  a->devicePointer = (void*)p;
  if (block->device < 0) a->hostPointer = (void*)p;
  return 0;
}
// The host reads zeros from the device: what it finds does not depend on earlier work.
static int copy(void* to, const void* from, size_t n, Stream* stream) {
  static const char* names[] = {"host to host", "host to device", "device to host", "on device"};
  bool to_device = on_device(to), from_device = on_device(from);
  if (int error = work("copy", names[2 * from_device + to_device], stream)) return error;
  if (from_device && !to_device && !block_of(to)) note("sync", "copy to pageable memory", stream);
  if (stream->status != NONE || to_device) return 0;
  from_device ? memset(to, 0, n) : memmove(to, from, n);
  return 0;
}
API int cudaMemcpyAsync(void* to, const void* from, size_t n, int, void* stream) {
  LOCK;
  return copy(to, from, n, stream_of(stream));
}
API int cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t n, void* stream) {
  LOCK;
  return copy(to, from, n, stream_of(stream));
}
API int cudaMemcpy(void* to, const void* from, size_t n, int) {
  LOCK;
  if (int error = synchronize("cudaMemcpy")) return error;
  return copy(to, from, n, &legacy);
}
API int cudaMemcpy2DAsync(void*, size_t, const void*, size_t, size_t, size_t, int, void* stream) {
  LOCK;
  return work("copy", "2D", stream_of(stream));
}
API int cudaMemsetAsync(void*, int, size_t, void* stream) {
  LOCK;
  return work("set", "memset", stream_of(stream));
}
API int cudaMemset(void* p, int value, size_t n) { return cudaMemsetAsync(p, value, n, nullptr); }
API int cudaGetSymbolAddress(void** p, const void*) {
  static char symbol[1 << 16];
  return *p = symbol, 0;
}

// ---- virtual memory: expandable segments ----
API int cuMemAddressReserve(uint64_t* p, size_t n, size_t, uint64_t, uint64_t) {
  LOCK;
  *p = (uint64_t)reserve(n, device);
  return *p ? 0 : OUT_OF_MEMORY;
}
API int cuMemAddressFree(uint64_t p, size_t) { LOCK; return give_back(p), 0; }
API int cuMemCreate(uint64_t* handle, size_t n, const void*, uint64_t) {
  LOCK;
  if (take(n)) return OUT_OF_MEMORY;
  handles[*handle = next_id++] = n;
  note("memory", "cuMemCreate");
  return 0;
}
API int cuMemRelease(uint64_t handle) {
  LOCK;
  used[device] -= handles.at(handle);
  handles.erase(handle);
  note("memory", "cuMemRelease");
  return 0;
}
API int cuMemMap(uint64_t p, size_t n, size_t, uint64_t handle, uint64_t) {
  LOCK;
  Block* block = block_of((void*)p);
  return block && block == block_of((void*)(p + n - 1)) && handles.count(handle) ? 0
                                                                               : INVALID_VALUE;
}
API int cuMemGetAllocationGranularity(size_t* n, const void*, int) { return *n = 2 << 20, 0; }

// ---- streams and events ----
API int cudaStreamCreateWithPriority(void** p, unsigned, int priority) {
  LOCK;
  if (int error = forbidden("cudaStreamCreate")) return error;
  Stream* stream = new Stream{};
  stream->id = next_id++;
  stream->priority = priority;
  streams.insert(stream);
  return *p = stream, 0;
}
API int cudaStreamCreateWithFlags(void** p, unsigned flags) {
  return cudaStreamCreateWithPriority(p, flags, 0);
}
API int cudaStreamCreate(void** p) { return cudaStreamCreateWithPriority(p, 0, 0); }
API int cudaStreamDestroy(void* p) { LOCK; return streams.erase((Stream*)p), 0; }
API int cudaStreamGetPriority(void* p, int* v) { LOCK; return *v = stream_of(p)->priority, 0; }
static int ask(void* p, const char* call) {
  Stream* stream = stream_of(p);
  if (!stream->status) return forbidden(call);
  invalidate(stream->graph, call);
  return fail(CAPTURE_UNSUPPORTED);
}
API int cudaStreamQuery(void* p) { LOCK; return ask(p, "cudaStreamQuery"); }
API int cudaStreamSynchronize(void* p) {
  LOCK;
  int error = ask(p, "cudaStreamSynchronize");
  return error ? error : synchronize("cudaStreamSynchronize");
}
API int cudaEventCreateWithFlags(void** p, unsigned) { return *p = new Event{}, 0; }
API int cudaEventCreate(void** p) { return cudaEventCreateWithFlags(p, 0); }
API int cudaEventDestroy(void* p) { return delete (Event*)p, 0; }
API int cudaEventRecordWithFlags(void* p, void* handle, unsigned) {
  LOCK;
  Stream* s = stream_of(handle);
  *(Event*)p = Event{true, s->status == ACTIVE, now(), s, s->graph, s->work};
  return 0;
}
API int cudaEventRecord(void* p, void* s) { return cudaEventRecordWithFlags(p, s, 0); }
static int ask_event(void* p, const char* call) {
  Event* event = (Event*)p;
  if (!event->captured) return forbidden(call);
  invalidate(event->graph, std::string(call) + " of a captured event");
  return fail(CAPTURE_UNSUPPORTED);
}
API int cudaEventQuery(void* p) { LOCK; return ask_event(p, "cudaEventQuery"); }
API int cudaEventSynchronize(void* p) {
  LOCK;
  int error = ask_event(p, "cudaEventSynchronize");
  return error ? error : synchronize("cudaEventSynchronize");
}
API int cudaEventElapsedTime(float* ms, void* from, void* to) {
  *ms = ((Event*)to)->milliseconds - ((Event*)from)->milliseconds;
  return 0;
}
API int cudaEventElapsedTime_v2(float* ms, void* a, void* b) {
  return cudaEventElapsedTime(ms, a, b);
}
API int cudaStreamWaitEvent(void* handle, void* p, unsigned) {
  LOCK;
  Stream* s = stream_of(handle);
  Event* event = (Event*)p;
  if (!event->recorded) return 0;
  if (s->status == ACTIVE && !event->captured) {
    invalidate(s->graph, "wait for work that is not captured");
    return fail(CROSS_STREAM);
  }
  if (!event->captured || event->stream == s) return 0;
  if (s->status == ACTIVE) {
    event->stream->joined = std::max(event->stream->joined, event->work);
  } else if (event->stream->status == ACTIVE) {  // the stream joins the capture
    *s = Stream{s->id, s->priority, ACTIVE, event->stream->mode, false, event->graph,
                event->stream->thread, 0, 0};
  }
  return 0;
}

// ---- capture and graphs ----
API int cudaStreamIsCapturing(void* p, int* status) {
  LOCK;
  return *status = stream_of(p)->status, 0;
}
API int cuStreamIsCapturing(void* p, int* status) { return cudaStreamIsCapturing(p, status); }
API int cudaStreamGetCaptureInfo_v2(void* p, int* status, uint64_t* id, void** graph,
                                    const void** nodes, size_t* n) {
  LOCK;
  Stream* s = stream_of(p);
  *status = s->status;
  if (id && s->graph) *id = s->graph->id;
  if (graph) *graph = s->graph;
  if (nodes) *nodes = nullptr;
  if (n) *n = 0;
  return 0;
}
API int cudaStreamGetCaptureInfo(void* p, int* status, uint64_t* id, void** graph,
                                 const void** nodes, const void** edges, size_t* n) {
  if (edges) *edges = nullptr;
  return cudaStreamGetCaptureInfo_v2(p, status, id, graph, nodes, n);
}
API int cudaThreadExchangeStreamCaptureMode(int* mode) { return std::swap(*mode, thread_mode), 0; }
API int cudaStreamBeginCapture(void* p, int mode) {
  LOCK;
  Stream* s = stream_of(p);
  if (s == &legacy || s->status) return fail(CAPTURE_UNSUPPORTED);
  *s = Stream{s->id, s->priority, ACTIVE, mode, true, new Graph{next_id++, {}}, pthread_self(),
              0, 0};
  return 0;
}
API int cudaStreamEndCapture(void* p, void** graph) {
  LOCK;
  Stream* origin = stream_of(p);
  if (!origin->status || !origin->origin) return fail(CAPTURE_UNSUPPORTED);
  int error = origin->status == BROKEN ? INVALIDATED : 0;
  *graph = origin->graph;
  for (Stream* s : streams) {
    if (s->graph != *graph) continue;
    if (s != origin && s->work > s->joined && !error) error = UNJOINED;
    s->status = NONE;
    s->graph = nullptr;
  }
  if (error) *graph = nullptr;
  return error ? fail(error) : 0;
}
API int cudaGraphInstantiate(void** executable, void* graph, uint64_t) {
  return *executable = graph, 0;
}
API int cudaGraphInstantiateWithFlags(void** e, void* graph, uint64_t) { return *e = graph, 0; }
API int cudaGraphGetNodes(void* graph, void**, size_t* n) {
  *n = 0;
  for (auto& [name, count] : ((Graph*)graph)->nodes) *n += count;
  return 0;
}
API int cudaGraphLaunch(void* graph, void* p) {
  LOCK;
  if (int error = work("replay", "graph", stream_of(p))) return error;
  for (auto& [name, count] : ((Graph*)graph)->nodes) counts[name] += count;
  return 0;
}

// ---- kernels ----
static int launch(const std::string& name, dim3 grid, dim3 block, void* stream) {
  LOCK;
  uint64_t threads = (uint64_t)block.x * block.y * block.z, groups = (uint64_t)grid.x * grid.y * grid.z;
  bool fits = grid.x <= INT32_MAX && grid.y <= 65535 && grid.z <= 65535 && threads <= 1024;
  if (!groups || !threads || !fits) {
    warn("invalid launch", name + " of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) +
                               " x " + std::to_string(grid.z) + " blocks of " +
                               std::to_string(threads) + " threads");
    return fail(INVALID_CONFIGURATION);
  }
  return work("kernel", name, stream_of(stream));
}
struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
static thread_local std::vector<Configuration> configurations;
API void** __cudaRegisterFatBinary(void*) {
  static void* handle[1];
  return handle;
}
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*,
                                void*, void*, void*, int*) {
  LOCK;
  functions[host] = new Function{name};
}
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  return configurations.push_back({grid, block, shared, stream}), 0;
}
API int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void** stream) {
  Configuration top = configurations.back();
  configurations.pop_back();
  *grid = top.grid;
  *block = top.block;
  *shared = top.shared;
  *stream = top.stream;
  return 0;
}
API int __cudaGetKernel(void** kernel, const void* host) {
  LOCK;
  Function*& function = functions[host];
  if (!function) function = new Function{"unregistered"};
  return *kernel = function, 0;
}
API int __cudaLaunchKernel(void* kernel, dim3 grid, dim3 block, void**, size_t, void* stream) {
  return launch(((Function*)kernel)->name, grid, block, stream);
}
API int cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void**, size_t, void* stream) {
  void* kernel;
  __cudaGetKernel(&kernel, host);
  return launch(((Function*)kernel)->name, grid, block, stream);
}
API int cudaLaunchCooperativeKernel(const void* host, dim3 grid, dim3 block, void** arguments,
                                    size_t shared, void* stream) {
  return cudaLaunchKernel(host, grid, block, arguments, shared, stream);
}
API int cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* host, void** arguments) {
  return cudaLaunchKernel(host, c->gridDim, c->blockDim, arguments, 0, c->stream);
}
API int cudaLaunchHostFunc(void* p, void (*function)(void*), void* data) {
  LOCK;
  Stream* stream = stream_of(p);
  if (stream->status == NONE) function(data);
  return work("kernel", "host function", stream);
}
API int cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset((void*)a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->ptxVersion = a->binaryVersion = capability();
  a->maxDynamicSharedSizeBytes = 49152;
  return 0;
}
API int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t,
                                                               unsigned) {
  return *n = 2, 0;
}
API int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) {
  return *n = 2, 0;
}

// ---- driver ----
static int context;
API int cuDriverGetVersion(int* v) { return cudaDriverGetVersion(v); }
API int cuDeviceGetCount(int* n) { return *n = devices(), 0; }
API int cuDeviceGet(int* d, int ordinal) { return *d = ordinal, 0; }
API int cuDeviceGetAttribute(int* v, int name, int) { return *v = attribute(name), 0; }
API int cuDeviceGetName(char* s, int n, int) { return snprintf(s, n, "Pretended GPU"), 0; }
API int cuDeviceTotalMem_v2(size_t* n, int) { return *n = capacity(), 0; }
API int cuCtxGetCurrent(void** c) { return *c = &context, 0; }
API int cuCtxPopCurrent(void** c) { return (c ? *c = &context : nullptr), 0; }
API int cuCtxGetDevice(int* d) { return *d = device, 0; }
API int cuDevicePrimaryCtxRetain(void** c, int) { return *c = &context, 0; }
API int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  return *active = 1, 0;
}
API int cuGetErrorString(int error, const char** s) { return *s = cudaGetErrorString(error), 0; }
API int cuGetErrorName(int error, const char** s) { return *s = cudaGetErrorString(error), 0; }
API int cuModuleLoadData(void** m, const void*) { return *m = &context, 0; }
API int cuModuleLoadDataEx(void** m, const void*, unsigned, void*, void*) {
  return *m = &context, 0;
}
API int cuModuleLoad(void** m, const char*) { return *m = &context, 0; }
API int cuModuleGetFunction(void** f, void*, const char* name) {
  return *f = new Function{std::string("triton ") + name}, 0;
}
API int cuFuncGetAttribute(int* v, int name, void*) {
  return *v = name == 0 ? 1024 : name == 4 ? 32 : 0, 0;  // threads of a block, registers
}
API int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                       unsigned bz, unsigned, void* stream, void**, void**) {
  return launch(((Function*)f)->name, dim3{gx, gy, gz}, dim3{bx, by, bz}, stream);
}
struct DriverLaunch {
  unsigned gx, gy, gz, bx, by, bz, shared;
  void* stream;
};
API int cuLaunchKernelEx(const DriverLaunch* c, void* f, void**, void**) {
  return cuLaunchKernel(f, c->gx, c->gy, c->gz, c->bx, c->by, c->bz, 0, c->stream, 0, 0);
}
API int cuPointerGetAttribute(void* out, int name, uint64_t p) {
  LOCK;
  Block* block = block_of((void*)p);
  if (!block) return INVALID_VALUE;
  if (name == 2) return *(int*)out = block->device < 0 ? 1 : 2, 0;  // memory type
  return *(uint64_t*)out = name == 3 ? p : 0, 0;                    // device pointer
}
API int cuOccupancyMaxActiveClusters(int* n, void*, void*) { return *n = 1, 0; }
static int unsupported() { return UNSUPPORTED; }
API int cuGetProcAddress_v2(const char* name, void** p, int, uint64_t, int* status) {
  *p = dlsym(RTLD_DEFAULT, name);
  if (!*p) *p = dlsym(RTLD_DEFAULT, (std::string(name) + "_v2").c_str());
  if (!*p) {
    pretended_unknown(name);
    *p = (void*)unsupported;
  }
  if (status) *status = 0;
  return 0;
}
// NVRTC asks for a table of libcuda's internals, and works without it.
API int cuGetExportTable(const void** table, const void*) { return *table = nullptr, UNSUPPORTED; }
API int cudaGetDriverEntryPointByVersion(const char* name, void** p, unsigned, uint64_t,
                                         int* status) {
  return cuGetProcAddress_v2(name, p, 0, 0, status);
}
API int cudaGetDriverEntryPoint(const char* name, void** p, uint64_t, int* status) {
  return cuGetProcAddress_v2(name, p, 0, 0, status);
}
