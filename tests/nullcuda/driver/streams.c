// Streams, which are in order by nature, events, and captures, which only count what they hold.
#include "nullcuda.h"
#include <time.h>

typedef struct Stream {
    Capture *capture;
    int priority;
    unsigned flags;
    struct Stream *next;
} Stream;
typedef struct Event {
    double ms;
    Capture *capture;
} Event;

static Stream null_streams[3], *streams;
int n_captures;
static int n_global_captures;
static unsigned long long capture_ids;
static __thread int capture_mode = cudaStreamCaptureModeGlobal;
static __thread int own_captures;

static Stream *stream_of(void *s) { return (uintptr_t)s <= 2 ? &null_streams[(uintptr_t)s] : (Stream *)s; }
Capture *capture_of(void *s) { return stream_of(s)->capture; }

int in_capture(void *s) {
    Capture *c = capture_of(s);
    if (c) c->nodes++;
    return c != NULL;
}

int forbidden(const char *what) {
    if (!n_captures || capture_mode == cudaStreamCaptureModeRelaxed) return OK;
    if (own_captures || (capture_mode == cudaStreamCaptureModeGlobal && n_global_captures))
        return refuse(cudaErrorStreamCaptureUnsupported, "%s while a stream is being captured", what);
    return OK;
}

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) {
    if ((uintptr_t)s <= 1) return result(refuse(cudaErrorStreamCaptureImplicit, "capture of the legacy stream"));
    if (capture_of(s)) return result(refuse(cudaErrorIllegalState, "the stream is being captured already"));
    Capture *c = calloc(1, sizeof *c);
    c->id = ++capture_ids;
    c->mode = mode;
    c->origin = s;
    stream_of(s)->capture = c;
    n_captures++;
    own_captures++;
    if (mode == cudaStreamCaptureModeGlobal) n_global_captures++;
    return OK;
}
EXPORT cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t s, cudaGraph_t g, const cudaGraphNode_t *d,
                                                 const cudaGraphEdgeData *e, size_t n, enum cudaStreamCaptureMode mode) {
    return cudaStreamBeginCapture(s, mode);
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
    Capture *c = capture_of(s);
    if (!c || c->origin != (void *)s) return result(refuse(cudaErrorIllegalState, "the stream is not being captured"));
    for (Stream *t = streams; t; t = t->next)
        if (t->capture == c) t->capture = NULL;
    for (int i = 0; i < 3; i++)
        if (null_streams[i].capture == c) null_streams[i].capture = NULL;
    n_captures--;
    own_captures--;
    if (c->mode == cudaStreamCaptureModeGlobal) n_global_captures--;
    *graph = c->broken ? NULL : (cudaGraph_t)c;
    return result(c->broken ? refuse(cudaErrorStreamCaptureInvalidated, "the capture was broken before") : OK);
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
    *status = capture_of(s) ? (capture_of(s)->broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive)
                            : cudaStreamCaptureStatusNone;
    return OK;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                            cudaGraph_t *graph, const cudaGraphNode_t **deps, const cudaGraphEdgeData **edges,
                                            size_t *n) {
    Capture *c = capture_of(s);
    if (status) cudaStreamIsCapturing(s, status);
    if (id) *id = c ? c->id : 0;
    if (graph) *graph = (cudaGraph_t)c;
    if (deps) *deps = NULL;
    if (edges) *edges = NULL;
    if (n) *n = 0;
    return OK;
}
EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    int old = capture_mode;
    capture_mode = *mode;
    *mode = (enum cudaStreamCaptureMode)old;
    return OK;
}
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long f) {
    *exec = (cudaGraphExec_t)graph;
    return OK;
}
EXPORT cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long f) {
    *exec = (cudaGraphExec_t)graph;
    return OK;
}
// Whoever computes what the kernels do not (host/on_host.cpp) records it in a capture and does it again at each launch.
static void (*replay)(void *graph);
EXPORT void nullcuda_on_replay(void (*f)(void *)) { replay = f; }
static void (*forget)(void *graph);
EXPORT void nullcuda_on_destroy(void (*f)(void *)) { forget = f; }
EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    nullcuda_called("cudaGraphExecDestroy");
    if (forget) forget(exec);
    return OK;
}
EXPORT void *nullcuda_capture(void *stream) { return capture_of(stream); }
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) {
    nullcuda_called("cudaGraphLaunch");
    if (replay) replay(exec);
    return OK;
}
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *n) {
    Capture *c = (Capture *)graph;
    if (!nodes) *n = c->nodes;
    else
        for (size_t i = 0; i < *n; i++) nodes[i] = (cudaGraphNode_t)c;
    return OK;
}
EXPORT cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t *d, cudaGraphEdgeData *e, size_t *n) {
    *n = 0;
    return OK;
}

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) {
    Stream *n = calloc(1, sizeof *n);
    n->flags = flags;
    n->priority = priority;
    pthread_mutex_lock(&lock);
    n->next = streams;
    streams = n;
    pthread_mutex_unlock(&lock);
    *s = (cudaStream_t)n;
    return OK;
}
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) {
    return cudaStreamCreateWithPriority(s, flags, 0);
}
EXPORT cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithPriority(s, 0, 0); }
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) {
    *p = stream_of(s)->priority;
    return OK;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    Capture *c = capture_of(s);
    if (c) {
        c->broken = 1;
        return result(refuse(cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize of a stream that is being captured"));
    }
    return OK;
}
EXPORT cudaError_t cudaStreamQuery(cudaStream_t s) { return cudaStreamSynchronize(s); }
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) {
    *e = calloc(1, sizeof(Event));
    return OK;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t e) {
    free(e);
    return OK;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned f) {
    Event *x = (Event *)e;
    x->capture = capture_of(s);
    x->ms = now_ms();
    return OK;
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaEventRecordWithFlags(e, s, 0); }
static int captured_event(cudaEvent_t e, const char *what) {
    for (Stream *t = streams; t; t = t->next)
        if (((Event *)e)->capture && t->capture == ((Event *)e)->capture)
            return refuse(cudaErrorCapturedEvent, "%s of an event that is being captured", what);
    return OK;
}
EXPORT cudaError_t cudaEventQuery(cudaEvent_t e) {
    int s = captured_event(e, "cudaEventQuery");
    return result(s ? s : forbidden("cudaEventQuery"));
}
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t e) { return result(captured_event(e, "cudaEventSynchronize")); }
EXPORT cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
    *ms = (float)(((Event *)b)->ms - ((Event *)a)->ms);
    return OK;
}
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned f) {
    Event *x = (Event *)e;
    if (x->capture && !captured_event(e, "")) return OK; // of a capture that is over
    if (x->capture) stream_of(s)->capture = x->capture;
    return OK;
}
EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *data) {
    if (!in_capture(s)) f(data);
    return OK;
}
EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void *data, unsigned flags) {
    f(s, cudaSuccess, data);
    return OK;
}
