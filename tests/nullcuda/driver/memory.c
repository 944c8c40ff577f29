// Device memory: host memory that is not reserved, so that what is never touched costs nothing.
#include "nullcuda.h"

size_t used[MAX_DEVICES], peak[MAX_DEVICES];
// All ranges, ordered by address.
static Range *ranges;
static size_t n_ranges, room;

static size_t after(const void *p) { // how many ranges begin at or before p
    size_t a = 0, b = n_ranges;
    while (a < b) {
        size_t m = (a + b) / 2;
        if (ranges[m].start <= (char *)p) a = m + 1;
        else b = m;
    }
    return a;
}
Range *range_of(const void *p) {
    size_t i = after(p);
    return i && (char *)p < ranges[i - 1].start + ranges[i - 1].size ? &ranges[i - 1] : NULL;
}
int is_host(const Range *range) { return range->kind == PINNED || range->kind == REGISTERED; }
static void add_range(void *p, size_t size, int device, Kind kind) {
    if (n_ranges == room) ranges = realloc(ranges, (room = room ? room * 2 : 1024) * sizeof *ranges);
    size_t i = after(p);
    memmove(ranges + i + 1, ranges + i, (n_ranges - i) * sizeof *ranges);
    ranges[i] = (Range){p, size, device, kind};
    n_ranges++;
}
static void drop_range(Range *r) {
    memmove(r, r + 1, (char *)(ranges + n_ranges) - (char *)(r + 1));
    n_ranges--;
}

static int account(int d, size_t size) {
    if (used[d] + size > card.memory)
        return refuse(cudaErrorMemoryAllocation, "out of memory: %zu MiB asked, %zu of %zu MiB in use", size >> 20,
                      used[d] >> 20, card.memory >> 20);
    used[d] += size;
    if (used[d] > peak[d]) peak[d] = used[d];
    return OK;
}
#define PAGE 4096ul
static size_t pages(size_t n) { return (n + PAGE - 1) & ~(PAGE - 1); }
int allocate(void **p, size_t size, int device, Kind kind) {
    *p = NULL;
    if (!size) return OK;
    pthread_mutex_lock(&lock);
    int status = kind == DEVICE ? account(device, (size + 511) & ~511ul) : OK;
    if (!status) {
        *p = mmap(NULL, pages(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (*p == MAP_FAILED) status = cudaErrorMemoryAllocation;
        else add_range(*p, size, device, kind);
    }
    pthread_mutex_unlock(&lock);
    return status;
}
static int release(void *p) {
    if (!p) return OK;
    pthread_mutex_lock(&lock);
    Range *r = range_of(p);
    int status = OK;
    if (!r || r->start != p || r->kind > PINNED)
        status = refuse(cudaErrorInvalidValue, "free of %p, which was not allocated", p);
    else {
        if (r->kind == DEVICE) used[r->device] -= (r->size + 511) & ~511ul;
        munmap(p, pages(r->size));
        drop_range(r);
    }
    pthread_mutex_unlock(&lock);
    return status;
}

EXPORT cudaError_t cudaMalloc(void **p, size_t n) {
    int s = forbidden("cudaMalloc");
    return result(s ? s : allocate(p, n, current, DEVICE));
}
EXPORT cudaError_t cudaMallocManaged(void **p, size_t n, unsigned f) { return cudaMalloc(p, n); }
EXPORT cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t s) { return result(allocate(p, n, current, DEVICE)); }
EXPORT cudaError_t cudaFree(void *p) {
    if (!p) return OK;
    int s = forbidden("cudaFree");
    return result(s ? s : release(p));
}
EXPORT cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return result(release(p)); }
EXPORT cudaError_t cudaHostAlloc(void **p, size_t n, unsigned f) {
    int s = forbidden("cudaHostAlloc");
    return result(s ? s : allocate(p, n, current, PINNED));
}
EXPORT cudaError_t cudaMallocHost(void **p, size_t n) { return cudaHostAlloc(p, n, 0); }
EXPORT cudaError_t cudaFreeHost(void *p) { return result(release(p)); }
EXPORT cudaError_t cudaHostRegister(void *p, size_t n, unsigned f) {
    pthread_mutex_lock(&lock);
    int status = range_of(p) ? refuse(cudaErrorHostMemoryAlreadyRegistered, "cudaHostRegister of %p twice", p) : OK;
    if (!status) add_range(p, n, current, REGISTERED);
    pthread_mutex_unlock(&lock);
    return result(status);
}
EXPORT cudaError_t cudaHostUnregister(void *p) {
    pthread_mutex_lock(&lock);
    Range *r = range_of(p);
    int status = r && r->kind == REGISTERED ? OK : refuse(cudaErrorHostMemoryNotRegistered, "cudaHostUnregister of %p", p);
    if (!status) drop_range(r);
    pthread_mutex_unlock(&lock);
    return result(status);
}
EXPORT cudaError_t cudaHostGetDevicePointer(void **d, void *p, unsigned f) {
    *d = p;
    return OK;
}
EXPORT cudaError_t cudaMemGetInfo(size_t *free_, size_t *total) {
    *total = card.memory;
    *free_ = card.memory - used[current];
    return OK;
}
EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    pthread_mutex_lock(&lock);
    Range *r = range_of(p);
    memset(a, 0, sizeof *a);
    a->type = !r ? cudaMemoryTypeUnregistered : is_host(r) ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    a->device = r ? r->device : -2;
    a->devicePointer = r ? (void *)p : NULL;
    a->hostPointer = !r || is_host(r) ? (void *)p : NULL;
    pthread_mutex_unlock(&lock);
    return OK;
}
static int is_device(const void *p) {
    pthread_mutex_lock(&lock);
    Range *r = range_of(p);
    int is = r && !is_host(r);
    pthread_mutex_unlock(&lock);
    return is;
}
static int check_copy(const void *to, const void *from, enum cudaMemcpyKind kind, size_t n) {
    if (!n) return OK;
    if ((kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice) && !is_device(to))
        return refuse(cudaErrorInvalidValue, "a copy to the device goes to %p, which is not the device's", to);
    if ((kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice) && !is_device(from))
        return refuse(cudaErrorInvalidValue, "a copy from the device comes from %p, which is not the device's", from);
    return OK;
}
EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind) {
    int s = forbidden("cudaMemcpy");
    if (!s) s = check_copy(to, from, kind, n);
    if (!s) memmove(to, from, n);
    return result(s);
}
EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t st) {
    int s = check_copy(to, from, kind, n);
    if (!s && !in_capture(st)) memmove(to, from, n);
    return result(s);
}
EXPORT cudaError_t cudaMemcpyPeerAsync(void *to, int td, const void *from, int fd, size_t n, cudaStream_t st) {
    if (!in_capture(st)) memmove(to, from, n);
    return OK;
}
EXPORT cudaError_t cudaMemcpy2DAsync(void *to, size_t tp, const void *from, size_t fp, size_t w, size_t h,
                                     enum cudaMemcpyKind kind, cudaStream_t st) {
    int s = h ? check_copy(to, from, kind, w) : OK;
    if (!s && !in_capture(st))
        for (size_t i = 0; i < h; i++) memmove((char *)to + i * tp, (const char *)from + i * fp, w);
    return result(s);
}
static void set_memory(void *p, int v, size_t n) {
    if (v == 0 && n >= 1 << 20 && is_device(p)) { // pages that are given back read as zero
        char *a = (char *)pages((uintptr_t)p), *b = (char *)(((uintptr_t)p + n) & ~(PAGE - 1));
        memset(p, 0, a - (char *)p);
        madvise(a, b - a, MADV_DONTNEED);
        memset(b, 0, (char *)p + n - b);
    } else memset(p, v, n);
}
EXPORT cudaError_t cudaMemset(void *p, int v, size_t n) {
    if (n && !is_device(p)) return result(refuse(cudaErrorInvalidValue, "cudaMemset of %p", p));
    set_memory(p, v, n);
    return OK;
}
EXPORT cudaError_t cudaMemsetAsync(void *p, int v, size_t n, cudaStream_t st) {
    if (n && !is_device(p)) return result(refuse(cudaErrorInvalidValue, "cudaMemsetAsync of %p", p));
    if (!in_capture(st)) set_memory(p, v, n);
    return OK;
}
EXPORT cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) {
    static void *some;
    if (!some) allocate(&some, 1 << 20, 0, DEVICE);
    *p = some;
    return OK;
}
// Virtual memory (cuMem...): what is unmapped cannot be touched.
typedef struct Chunk {
    size_t size;
    int device, maps, released;
} Chunk;
typedef struct Mapping {
    char *p;
    size_t size;
    Chunk *chunk;
    struct Mapping *next;
} Mapping;
static Mapping *mappings;
static void settle(Chunk *c) {
    if (c->released && !c->maps) {
        used[c->device] -= c->size;
        free(c);
    }
}
EXPORT CUresult cuMemGetAllocationGranularity(size_t *g, const CUmemAllocationProp *p, CUmemAllocationGranularity_flags f) {
    *g = 2 << 20;
    return OK;
}
EXPORT CUresult cuMemAddressReserve(CUdeviceptr *p, size_t n, size_t align, CUdeviceptr at, unsigned long long f) {
    if (align < (2 << 20)) align = 2 << 20;
    char *m = mmap(NULL, n + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    char *a = (char *)(((uintptr_t)m + align - 1) / align * align);
    if (a > m) munmap(m, a - m);
    if (m + align > a) munmap(a + n, m + align - a);
    *p = (CUdeviceptr)a;
    return OK;
}
EXPORT CUresult cuMemAddressFree(CUdeviceptr p, size_t n) {
    munmap((void *)p, n);
    return OK;
}
EXPORT CUresult cuMemCreate(CUmemGenericAllocationHandle *h, size_t n, const CUmemAllocationProp *p, unsigned long long f) {
    int d = p->location.id;
    pthread_mutex_lock(&lock);
    int s = account(d, n);
    pthread_mutex_unlock(&lock);
    if (s) return (CUresult)s;
    Chunk *c = calloc(1, sizeof *c);
    c->size = n;
    c->device = d;
    *h = (CUmemGenericAllocationHandle)c;
    return OK;
}
EXPORT CUresult cuMemMap(CUdeviceptr p, size_t n, size_t o, CUmemGenericAllocationHandle h, unsigned long long f) {
    Chunk *c = (Chunk *)h;
    if (mprotect((void *)p, n, PROT_READ | PROT_WRITE))
        return (CUresult)refuse(CUDA_ERROR_INVALID_VALUE, "cuMemMap outside of a reservation");
    Mapping *m = calloc(1, sizeof *m);
    *m = (Mapping){(char *)p, n, c, mappings};
    pthread_mutex_lock(&lock);
    mappings = m;
    c->maps++;
    add_range((void *)p, n, c->device, MAPPED);
    pthread_mutex_unlock(&lock);
    return OK;
}
EXPORT CUresult cuMemUnmap(CUdeviceptr p, size_t n) {
    pthread_mutex_lock(&lock);
    for (Mapping **m = &mappings; *m;) {
        Mapping *x = *m;
        if (x->p >= (char *)p && x->p < (char *)p + n) {
            Range *r = range_of(x->p);
            if (r) drop_range(r);
            madvise(x->p, x->size, MADV_DONTNEED);
            mprotect(x->p, x->size, PROT_NONE);
            x->chunk->maps--;
            settle(x->chunk);
            *m = x->next;
            free(x);
        } else m = &x->next;
    }
    pthread_mutex_unlock(&lock);
    return OK;
}
EXPORT CUresult cuMemRelease(CUmemGenericAllocationHandle h) {
    Chunk *c = (Chunk *)h;
    pthread_mutex_lock(&lock);
    c->released = 1;
    settle(c);
    pthread_mutex_unlock(&lock);
    return OK;
}
