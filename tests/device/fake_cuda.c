/* A CUDA driver without a GPU, for tests: device memory is malloc'ed, work is really deferred.
 *
 * - A device address is a host address with a high bit set, so that mixing the two up is caught, not forgiven. Mapped
 *   host memory has one of its own kind, with another bit.
 * - Copies and launches wait in their stream until it is waited for: a missing synchronize gives old bytes.
 * - Errors of deferred work come out of the synchronize, as on a GPU.
 * Environment, read at each call: FAKE_CUDA_DEVICES (1), FAKE_CUDA_NAME, FAKE_CUDA_CAPABILITY ("8.7"),
 * FAKE_CUDA_INTEGRATED (0), FAKE_CUDA_FAIL ("cuMemAlloc_v2:2" makes that call answer 2), FAKE_CUDA_CRASH (cuInit aborts).
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define TAG (UINT64_C(1) << 62)
#define MAPPED_TAG (UINT64_C(1) << 61)
#define OK 0
#define INVALID_VALUE 1
#define OUT_OF_MEMORY 2
#define NOT_INITIALIZED 3
#define INVALID_CONTEXT 201
#define INVALID_HANDLE 400
#define NOT_READY 600
#define ILLEGAL_ADDRESS 700
#define CAPTURE_UNSUPPORTED 900
#define MOST 256

typedef int (*Work)(void *);
typedef struct { int kind; uint64_t to, from; size_t size; Work work; void *argument; struct Event *event; } Op;
enum { TO_DEVICE, FROM_DEVICE, CALL, RECORD };
typedef struct Stream { Op ops[MOST]; int count, capturing; } Stream;
typedef struct Event { int recorded, done; double at_ms; Stream *stream; } Event;
typedef struct { Op ops[MOST]; int count; } Graph;
typedef struct { uint64_t address; size_t size; int host, mapped; } Block;

static Block blocks[MOST];
static int initialized, retained, live;
static void *current;
static char context;

static int planned(const char *name) {
  const char *plan = getenv("FAKE_CUDA_FAIL");
  size_t length = strlen(name);
  return plan && !strncmp(plan, name, length) && plan[length] == ':' ? atoi(plan + length + 1) : OK;
}
#define START(name) do { int code = planned(#name); if (code) return code; \
                         if (!initialized) return NOT_INITIALIZED; } while (0)
#define IN_CONTEXT(name) do { START(name); if (!current) return INVALID_CONTEXT; } while (0)

static Block *find(uint64_t address, size_t size, int host) {
  for (int i = 0; i < MOST; i++)
    if (blocks[i].address && blocks[i].host == host && address >= blocks[i].address &&
        address + size <= blocks[i].address + blocks[i].size)
      return &blocks[i];
  return NULL;
}
static int keep(uint64_t address, size_t size, int host, int mapped) {
  for (int i = 0; i < MOST; i++)
    if (!blocks[i].address) { blocks[i] = (Block){address, size, host, mapped}; live++; return OK; }
  return OUT_OF_MEMORY;
}
static double now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}
static int perform(Op *op) {
  switch (op->kind) {
  case TO_DEVICE:
    if (!find(op->to, op->size, 0) || !find(op->from, op->size, 1)) return ILLEGAL_ADDRESS;
    memcpy((void *)(uintptr_t)(op->to & ~TAG), (void *)(uintptr_t)op->from, op->size);
    return OK;
  case FROM_DEVICE:
    if (!find(op->from, op->size, 0) || !find(op->to, op->size, 1)) return ILLEGAL_ADDRESS;
    memcpy((void *)(uintptr_t)op->to, (void *)(uintptr_t)(op->from & ~TAG), op->size);
    return OK;
  case CALL:
    return op->work(op->argument);
  default:
    op->event->at_ms = now_ms();
    op->event->done = 1;
    return OK;
  }
}
static int put(Stream *stream, Op op) {
  if (!stream || stream->count == MOST) return INVALID_HANDLE;
  stream->ops[stream->count++] = op;
  return OK;
}
static int drain(Stream *stream) {
  int code = OK, count = stream->count;
  stream->count = 0;
  for (int i = 0; i < count && !code; i++) code = perform(&stream->ops[i]);
  return code;
}

/* For the tests and the fake TensorRT. */
int fake_live(void) { return live + retained; }
void fake_forget(void) { live = 0; }
int fake_enqueue(void *stream, Work work, void *argument) {
  return put(stream, (Op){.kind = CALL, .work = work, .argument = argument});
}
void *fake_host(uint64_t address, size_t size) {
  if (address & MAPPED_TAG) {
    address &= ~MAPPED_TAG;
    return find(address, size, 1) ? (void *)(uintptr_t)address : NULL;
  }
  return find(address, size, 0) ? (void *)(uintptr_t)(address & ~TAG) : NULL;
}

int cuInit(unsigned flags) {
  if (getenv("FAKE_CUDA_CRASH")) abort();
  int code = planned("cuInit");
  if (code || flags) return code ? code : INVALID_VALUE;
  initialized = 1;
  return OK;
}
int cuGetErrorName(int code, const char **text) {
  static const struct { int code; const char *name; } names[] = {
      {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"}, {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
      {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED"}, {100, "CUDA_ERROR_NO_DEVICE"},
      {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"}, {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
      {NOT_READY, "CUDA_ERROR_NOT_READY"}, {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
      {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    if (names[i].code == code) { *text = names[i].name; return OK; }
  *text = NULL;
  return INVALID_VALUE;
}
int cuDriverGetVersion(int *version) { *version = 12060; return planned("cuDriverGetVersion"); }
int cuDeviceGetCount(int *count) {
  START(cuDeviceGetCount);
  const char *text = getenv("FAKE_CUDA_DEVICES");
  *count = text ? atoi(text) : 1;
  return OK;
}
int cuDeviceGet(int *device, int index) { START(cuDeviceGet); *device = index; return OK; }
int cuDeviceGetName(char *name, int size, int device) {
  START(cuDeviceGetName);
  const char *text = getenv("FAKE_CUDA_NAME");
  snprintf(name, size, "%s", text ? text : "Fake Orin");
  return OK;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  START(cuDeviceGetAttribute);
  const char *text = getenv("FAKE_CUDA_CAPABILITY");
  int major = 8, minor = 7;
  if (text) sscanf(text, "%d.%d", &major, &minor);
  const char *integrated = getenv("FAKE_CUDA_INTEGRATED");
  *value = attribute == 75 ? major : attribute == 76 ? minor : attribute == 18 ? atoi(integrated ? integrated : "0") : -1;
  return *value < 0 ? INVALID_VALUE : OK;
}
int cuDeviceTotalMem_v2(size_t *size, int device) { START(cuDeviceTotalMem_v2); *size = 1 << 30; return OK; }
int cuDevicePrimaryCtxRetain(void **out, int device) {
  START(cuDevicePrimaryCtxRetain);
  retained++;
  *out = &context;
  return OK;
}
int cuDevicePrimaryCtxRelease_v2(int device) { START(cuDevicePrimaryCtxRelease_v2); retained--; return OK; }
int cuCtxGetCurrent(void **out) { START(cuCtxGetCurrent); *out = current; return OK; }
int cuCtxSetCurrent(void *wanted) { START(cuCtxSetCurrent); current = wanted; return OK; }
int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
  IN_CONTEXT(cuMemGetInfo_v2);
  *free_bytes = 1 << 29;
  *total = 1 << 30;
  return OK;
}
int cuMemAlloc_v2(uint64_t *address, size_t size) {
  IN_CONTEXT(cuMemAlloc_v2);
  if (!size) return INVALID_VALUE;
  *address = (uint64_t)(uintptr_t)malloc(size) | TAG;
  memset((void *)(uintptr_t)(*address & ~TAG), 0xff, size);
  return keep(*address, size, 0, 0);
}
int cuMemFree_v2(uint64_t address) {
  IN_CONTEXT(cuMemFree_v2);
  Block *block = find(address, 1, 0);
  if (!block || block->address != address) return INVALID_VALUE;
  free((void *)(uintptr_t)(address & ~TAG));
  block->address = 0;
  live--;
  return OK;
}
int cuMemHostAlloc(void **out, size_t size, unsigned flags) {
  IN_CONTEXT(cuMemHostAlloc);
  if (!size || flags & ~7u) return INVALID_VALUE;
  *out = calloc(size, 1);
  return keep((uint64_t)(uintptr_t)*out, size, 1, flags & 2);
}
int cuMemFreeHost(void *address) {
  IN_CONTEXT(cuMemFreeHost);
  Block *block = find((uint64_t)(uintptr_t)address, 1, 1);
  if (!block) return INVALID_VALUE;
  free(address);
  block->address = 0;
  live--;
  return OK;
}
int cuMemHostGetDevicePointer_v2(uint64_t *out, void *address, unsigned flags) {
  IN_CONTEXT(cuMemHostGetDevicePointer_v2);
  Block *block = find((uint64_t)(uintptr_t)address, 1, 1);
  if (flags || !block || !block->mapped) return INVALID_VALUE;
  *out = (uint64_t)(uintptr_t)address | MAPPED_TAG;
  return OK;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, void *from, size_t size, void *stream) {
  IN_CONTEXT(cuMemcpyHtoDAsync_v2);
  return put(stream, (Op){.kind = TO_DEVICE, .to = to, .from = (uint64_t)(uintptr_t)from, .size = size});
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *stream) {
  IN_CONTEXT(cuMemcpyDtoHAsync_v2);
  return put(stream, (Op){.kind = FROM_DEVICE, .to = (uint64_t)(uintptr_t)to, .from = from, .size = size});
}
int cuStreamCreate(void **out, unsigned flags) {
  IN_CONTEXT(cuStreamCreate);
  *out = calloc(1, sizeof(Stream));
  live++;
  return flags == 1 ? OK : INVALID_VALUE;
}
int cuStreamSynchronize(void *stream) {
  IN_CONTEXT(cuStreamSynchronize);
  if (!stream) return INVALID_HANDLE;
  return ((Stream *)stream)->capturing ? CAPTURE_UNSUPPORTED : drain(stream);
}
int cuStreamDestroy_v2(void *stream) { IN_CONTEXT(cuStreamDestroy_v2); free(stream); live--; return OK; }
int cuEventCreate(void **out, unsigned flags) {
  IN_CONTEXT(cuEventCreate);
  *out = calloc(1, sizeof(Event));
  live++;
  return OK;
}
int cuEventRecord(void *event, void *stream) {
  IN_CONTEXT(cuEventRecord);
  *(Event *)event = (Event){1, 0, 0, stream};
  return put(stream, (Op){.kind = RECORD, .event = event});
}
int cuEventSynchronize(void *event) {
  IN_CONTEXT(cuEventSynchronize);
  Event *e = event;
  return !e->recorded ? INVALID_HANDLE : e->done ? OK : drain(e->stream);
}
int cuEventElapsedTime(float *ms, void *start, void *end) {
  IN_CONTEXT(cuEventElapsedTime);
  Event *a = start, *b = end;
  if (!a->recorded || !b->recorded) return INVALID_HANDLE;
  if (!a->done || !b->done) return NOT_READY;
  *ms = (float)(b->at_ms - a->at_ms);
  return OK;
}
int cuEventDestroy_v2(void *event) { IN_CONTEXT(cuEventDestroy_v2); free(event); live--; return OK; }
int cuStreamBeginCapture_v2(void *stream, int mode) {
  IN_CONTEXT(cuStreamBeginCapture_v2);
  Stream *s = stream;
  if (s->capturing || s->count) return INVALID_VALUE;
  s->capturing = 1;
  return OK;
}
int cuStreamEndCapture(void *stream, void **out) {
  IN_CONTEXT(cuStreamEndCapture);
  Stream *s = stream;
  if (!s->capturing) return INVALID_VALUE;
  Graph *graph = calloc(1, sizeof(Graph));
  memcpy(graph->ops, s->ops, sizeof(Op) * s->count);
  graph->count = s->count;
  s->count = s->capturing = 0;
  *out = graph;
  live++;
  return OK;
}
int cuGraphInstantiateWithFlags(void **out, void *graph, uint64_t flags) {
  IN_CONTEXT(cuGraphInstantiateWithFlags);
  Graph *copy = malloc(sizeof(Graph));
  memcpy(copy, graph, sizeof(Graph));
  *out = copy;
  live++;
  return OK;
}
int cuGraphLaunch(void *graph, void *stream) {
  IN_CONTEXT(cuGraphLaunch);
  Graph *g = graph;
  for (int i = 0; i < g->count; i++) {
    int code = put(stream, g->ops[i]);
    if (code) return code;
  }
  return OK;
}
int cuGraphExecDestroy(void *graph) { IN_CONTEXT(cuGraphExecDestroy); free(graph); live--; return OK; }
int cuGraphDestroy(void *graph) { IN_CONTEXT(cuGraphDestroy); free(graph); live--; return OK; }
