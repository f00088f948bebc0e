// cuBLAS, cuDNN, NCCL and NVML of the pretended GPU: handles, streams, versions. build.py generates
// the other functions: Create and Destroy, and one launch for each function that computes.
#include <cudnn_graph.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#define API extern "C" __attribute__((visibility("default"), used))
API int pretended_launch(const char* name, void* stream);

static std::mutex mutex;
static std::map<void*, void*> stream_of;
API int pretended_set_stream(void* handle, void* stream) {
  std::lock_guard<std::mutex> guard(mutex);
  return stream_of[handle] = stream, 0;
}
API int pretended_get_stream(void* handle, void** stream) {
  std::lock_guard<std::mutex> guard(mutex);
  return *stream = stream_of[handle], 0;
}
API int pretended_library(const char* name, void* handle) {
  void* stream;
  pretended_get_stream(handle, &stream);
  return pretended_launch(name, stream);
}
API int cublasSetStream_v2(void* h, void* s) { return pretended_set_stream(h, s); }
API int cublasGetStream_v2(void* h, void** s) { return pretended_get_stream(h, s); }
API cudnnStatus_t cudnnSetStream(cudnnHandle_t h, cudaStream_t s) {
  return (cudnnStatus_t)pretended_set_stream(h, s);
}
API cudnnStatus_t cudnnGetStream(cudnnHandle_t h, cudaStream_t* s) {
  return (cudnnStatus_t)pretended_get_stream(h, (void**)s);
}

API int cublasGetVersion_v2(void*, int* v) { return *v = 130000, 0; }
API size_t cublasLtGetVersion() { return 130000; }
API int cublasGetMathMode(void*, int* mode) { return *mode = 0, 0; }
API int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0, 0; }
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int,
                                       void* result, int* found) {
  memset(result, 0, 96);  // one cublasLtMatmulHeuristicResult_t: status 0, no workspace
  return *found = 1, 0;
}
API int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*,
                       const void*, const void*, void*, void*, void*, const void*, void*, size_t,
                       void* stream) {
  return pretended_launch("cublasLtMatmul", stream);
}

API size_t cudnnGetVersion() { return CUDNN_VERSION; }
API size_t cudnnGetCudartVersion() { return 13000; }
API const char* cudnnGetErrorString(cudnnStatus_t) { return "error of the pretended cuDNN"; }
API void cudnnGetLastErrorString(char* text, size_t n) { memset(text, 0, n ? 1 : 0); }
API cudnnStatus_t cudnnGetProperty(libraryPropertyType name, int* v) {
  *v = name == 0 ? CUDNN_MAJOR : name == 1 ? CUDNN_MINOR : CUDNN_PATCHLEVEL;
  return CUDNN_STATUS_SUCCESS;
}
API cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t,
                                               cudnnBackendDescriptor_t* d) {
  *d = calloc(1, 1024);
  return CUDNN_STATUS_SUCCESS;
}
// One plan for everything, with no workspace and no numerical notes.
API cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t, cudnnBackendAttributeName_t,
                                           cudnnBackendAttributeType_t type, int64_t wanted,
                                           int64_t* count, void* out) {
  bool none = type == CUDNN_TYPE_NUMERICAL_NOTE || type == CUDNN_TYPE_BEHAVIOR_NOTE;
  bool wide = type == CUDNN_TYPE_INT64 || type == CUDNN_TYPE_DOUBLE || type == CUDNN_TYPE_HANDLE ||
              type == CUDNN_TYPE_VOID_PTR;
  size_t bytes = type == CUDNN_TYPE_BOOLEAN || type == CUDNN_TYPE_CHAR ? 1 : wide ? 8 : 4;
  if (count) *count = !none;
  if (out && wanted > 0 && !none && type != CUDNN_TYPE_BACKEND_DESCRIPTOR) memset(out, 0, bytes);
  return CUDNN_STATUS_SUCCESS;
}
API int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void*, int, int, void*, void*,
                                                                 void*, void*, void*, size_t* n) {
  return *n = 0, 0;
}
API int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void*, int, int, void*, void*, void*,
                                                          void*, void*, void*, void*, size_t* n) {
  return *n = 0, 0;
}
API int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void*, int, int, void*, void*,
                                                             size_t* n) {
  return *n = 0, 0;
}

struct Communicator {
  int ranks, rank;
};
struct UniqueId {
  char bytes[128];
};
API int ncclGetVersion(int* v) { return *v = 22800, 0; }
API int ncclGetUniqueId(UniqueId* id) { return memset(id, 7, sizeof *id), 0; }
API int ncclCommInitRankConfig(void** c, int ranks, UniqueId, int rank, void*) {
  return *c = new Communicator{ranks, rank}, 0;
}
API int ncclCommInitRank(void** c, int ranks, UniqueId id, int rank) {
  return ncclCommInitRankConfig(c, ranks, id, rank, nullptr);
}
API int ncclCommInitRankScalable(void** c, int ranks, int rank, int, UniqueId* id, void*) {
  return ncclCommInitRankConfig(c, ranks, *id, rank, nullptr);
}
API int ncclCommGetAsyncError(void*, int* error) { return *error = 0, 0; }
API int ncclCommCount(void* c, int* n) { return *n = ((Communicator*)c)->ranks, 0; }
API int ncclCommUserRank(void* c, int* n) { return *n = ((Communicator*)c)->rank, 0; }
API int ncclCommCuDevice(void* c, int* n) { return ncclCommUserRank(c, n); }
API const char* ncclGetErrorString(int) { return "error of the pretended NCCL"; }
API const char* ncclGetLastError(void*) { return ""; }
API int ncclAllReduce(const void*, void*, size_t, int, int, void*, void* stream) {
  return pretended_launch("ncclAllReduce", stream);
}
API int ncclBroadcast(const void*, void*, size_t, int, int, void*, void* stream) {
  return pretended_launch("ncclBroadcast", stream);
}
API int ncclAllGather(const void*, void*, size_t, int, void*, void* stream) {
  return pretended_launch("ncclAllGather", stream);
}
API int ncclReduceScatter(const void*, void*, size_t, int, int, void*, void* stream) {
  return pretended_launch("ncclReduceScatter", stream);
}

struct Memory {
  unsigned long long total, free, used;
};
API int nvmlDeviceGetCount_v2(unsigned* n) { return (int)cudaGetDeviceCount((int*)n); }
API int nvmlDeviceGetHandleByIndex_v2(unsigned i, void** h) {
  return *h = (void*)(uintptr_t)(i + 1), 0;
}
API int nvmlDeviceGetHandleByUUID(const char*, void** h) { return *h = (void*)1, 0; }
API int nvmlDeviceGetHandleByPciBusId_v2(const char*, void** h) { return *h = (void*)1, 0; }
API int nvmlDeviceGetName(void*, char* s, unsigned n) {
  return snprintf(s, n, "Pretended GPU"), 0;
}
API int nvmlSystemGetDriverVersion(char* s, unsigned n) { return snprintf(s, n, "0.0"), 0; }
API int nvmlDeviceGetMemoryInfo(void*, Memory* m) {
  size_t free, total;
  cudaMemGetInfo(&free, &total);
  return *m = {total, free, total - free}, 0;
}
API int nvmlDeviceGetClockInfo(void*, int, unsigned* mhz) { return *mhz = 1, 0; }
API int nvmlDeviceGetMaxClockInfo(void*, int, unsigned* mhz) { return *mhz = 1, 0; }
API int nvmlDeviceGetPowerUsage(void*, unsigned* milliwatts) { return *milliwatts = 1, 0; }
API int nvmlDeviceGetTemperature(void*, int, unsigned* degrees) { return *degrees = 1, 0; }
