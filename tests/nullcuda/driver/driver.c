// The driver API (cu...), most of it by the runtime API.
#include "nullcuda.h"

static __thread CUcontext context;
#define CTX(d) ((CUcontext)(uintptr_t)(0x1000 + (d)))
EXPORT CUresult cuInit(unsigned f) { return card.visible ? OK : CUDA_ERROR_NO_DEVICE; }
EXPORT CUresult cuDriverGetVersion(int *v) {
    *v = 13000;
    return OK;
}
EXPORT CUresult cuDeviceGetCount(int *n) {
    *n = card.visible;
    return OK;
}
EXPORT CUresult cuDeviceGet(CUdevice *d, int i) {
    if (i < 0 || i >= card.visible) return CUDA_ERROR_INVALID_DEVICE;
    *d = i;
    return OK;
}
EXPORT CUresult cuDeviceGetName(char *s, int n, CUdevice d) {
    snprintf(s, n, "%s", card.name);
    return OK;
}
EXPORT CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) {
    *v = attribute(a, d);
    return OK;
}
EXPORT CUresult cuDeviceTotalMem_v2(size_t *n, CUdevice d) {
    *n = card.memory;
    return OK;
}
EXPORT CUresult cuDeviceGetUuid_v2(CUuuid *u, CUdevice d) {
    memset(u, 0x11 + d, sizeof *u);
    return OK;
}
EXPORT CUresult cuDeviceComputeCapability(int *a, int *b, CUdevice d) {
    *a = card.cc / 10;
    *b = card.cc % 10;
    return OK;
}
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) {
    *c = CTX(d);
    return OK;
}
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *f, int *active) {
    *f = 0;
    *active = 1;
    return OK;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext *c) {
    *c = context ? context : CTX(current);
    return OK;
}
EXPORT CUresult cuCtxSetCurrent(CUcontext c) {
    context = c;
    return OK;
}
EXPORT CUresult cuCtxPushCurrent_v2(CUcontext c) {
    context = c;
    return OK;
}
EXPORT CUresult cuCtxPopCurrent_v2(CUcontext *c) {
    if (c) *c = CTX(current);
    return OK;
}
EXPORT CUresult cuCtxGetDevice(CUdevice *d) {
    *d = current;
    return OK;
}
EXPORT CUresult cuCtxGetLimit(size_t *v, CUlimit l) {
    *v = 1 << 20;
    return OK;
}
EXPORT CUresult cuCtxGetStreamPriorityRange(int *a, int *b) {
    *a = 0;
    *b = -5;
    return OK;
}
EXPORT CUresult cuGetErrorString(CUresult e, const char **s) {
    *s = words(e);
    return OK;
}
EXPORT CUresult cuGetErrorName(CUresult e, const char **s) { return cuGetErrorString(e, s); }
EXPORT CUresult cuGetProcAddress_v2(const char *name, void **f, int v, cuuint64_t flags, CUdriverProcAddressQueryResult *q) {
    enum cudaDriverEntryPointQueryResult r;
    cudaGetDriverEntryPointByVersion(name, f, v, flags, &r);
    if (q) *q = *f ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *f ? OK : CUDA_ERROR_NOT_FOUND;
}
#undef cuGetProcAddress
EXPORT CUresult cuGetProcAddress(const char *name, void **f, int v, cuuint64_t flags) {
    return cuGetProcAddress_v2(name, f, v, flags, NULL);
}
EXPORT CUresult cuGetExportTable(const void **t, const CUuuid *u) {
    *t = NULL;
    return CUDA_ERROR_NOT_FOUND;
}
EXPORT CUresult cuMemGetInfo_v2(size_t *a, size_t *b) {
    cudaMemGetInfo(a, b);
    return OK;
}
EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *p, size_t n) { return (CUresult)cudaMalloc((void **)p, n); }
EXPORT CUresult cuMemFree_v2(CUdeviceptr p) { return (CUresult)cudaFree((void *)p); }
EXPORT CUresult cuMemHostAlloc(void **p, size_t n, unsigned f) { return (CUresult)cudaHostAlloc(p, n, f); }
EXPORT CUresult cuMemFreeHost(void *p) { return (CUresult)cudaFreeHost(p); }
EXPORT CUresult cuMemcpyHtoD_v2(CUdeviceptr d, const void *s, size_t n) {
    return (CUresult)cudaMemcpy((void *)d, s, n, cudaMemcpyHostToDevice);
}
EXPORT CUresult cuMemcpyDtoH_v2(void *d, CUdeviceptr s, size_t n) {
    return (CUresult)cudaMemcpy(d, (void *)s, n, cudaMemcpyDeviceToHost);
}
EXPORT CUresult cuMemcpyDtoD_v2(CUdeviceptr d, CUdeviceptr s, size_t n) {
    return (CUresult)cudaMemcpy((void *)d, (void *)s, n, cudaMemcpyDeviceToDevice);
}
EXPORT CUresult cuMemcpyAsync(CUdeviceptr d, CUdeviceptr s, size_t n, CUstream st) {
    return (CUresult)cudaMemcpyAsync((void *)d, (void *)s, n, cudaMemcpyDefault, st);
}
EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr d, const void *s, size_t n, CUstream st) {
    return (CUresult)cudaMemcpyAsync((void *)d, s, n, cudaMemcpyHostToDevice, st);
}
EXPORT CUresult cuMemcpyDtoHAsync_v2(void *d, CUdeviceptr s, size_t n, CUstream st) {
    return (CUresult)cudaMemcpyAsync(d, (void *)s, n, cudaMemcpyDeviceToHost, st);
}
EXPORT CUresult cuMemsetD8_v2(CUdeviceptr p, unsigned char v, size_t n) { return (CUresult)cudaMemset((void *)p, v, n); }
EXPORT CUresult cuMemsetD32Async(CUdeviceptr p, unsigned v, size_t n, CUstream s) {
    if (!in_capture(s))
        for (size_t i = 0; i < n; i++) ((unsigned *)p)[i] = v;
    return OK;
}
EXPORT CUresult cuStreamCreate(CUstream *s, unsigned f) { return (CUresult)cudaStreamCreateWithFlags(s, f); }
EXPORT CUresult cuStreamSynchronize(CUstream s) { return (CUresult)cudaStreamSynchronize(s); }
EXPORT CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *st) {
    return (CUresult)cudaStreamIsCapturing(s, (enum cudaStreamCaptureStatus *)st);
}
EXPORT CUresult cuEventCreate(CUevent *e, unsigned f) { return (CUresult)cudaEventCreateWithFlags(e, f); }
EXPORT CUresult cuEventRecord(CUevent e, CUstream s) { return (CUresult)cudaEventRecord(e, s); }
EXPORT CUresult cuPointerGetAttribute(void *v, CUpointer_attribute a, CUdeviceptr p) {
    pthread_mutex_lock(&lock);
    Range r = {0}, *found = range_of((void *)p);
    if (found) r = *found;
    pthread_mutex_unlock(&lock);
    if (!found) return CUDA_ERROR_INVALID_VALUE;
    switch (a) {
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
    case CU_POINTER_ATTRIBUTE_HOST_POINTER: *(CUdeviceptr *)v = p; break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: *(unsigned *)v = is_host(&r) ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE; break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)v = r.device; break;
    case CU_POINTER_ATTRIBUTE_CONTEXT: *(CUcontext *)v = CTX(r.device); break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *(CUdeviceptr *)v = (CUdeviceptr)r.start; break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *(size_t *)v = r.size; break;
    default: *(int *)v = 0;
    }
    return OK;
}
EXPORT CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute *a, void **v, CUdeviceptr p) {
    for (unsigned i = 0; i < n; i++)
        if (cuPointerGetAttribute(v[i], a[i], p)) memset(v[i], 0, 4);
    return OK;
}
EXPORT CUresult cuMemGetAddressRange_v2(CUdeviceptr *b, size_t *n, CUdeviceptr p) {
    Range *r = range_of((void *)p);
    if (!r) return CUDA_ERROR_NOT_FOUND;
    if (b) *b = (CUdeviceptr)r->start;
    if (n) *n = r->size;
    return OK;
}
