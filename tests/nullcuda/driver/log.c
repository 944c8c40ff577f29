// What was called, what went wrong, and what is said of it.
#include "nullcuda.h"

pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void say(const char *format, ...) {
    char text[2048];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    fprintf(stderr, "[nullcuda] %s\n", text);
}

// A hash table of kernels, and the counts of functions without a definition of their own.
static Kernel **table;
static size_t table_size, table_used;
static struct Count {
    const char *name;
    long n;
} counts[4096];
static int n_counts;

static Kernel **place(const void *key) {
    size_t i = ((uintptr_t)key * 0x9E3779B97F4A7C15ull) >> 20;
    for (i %= table_size; table[i] && table[i]->key != key; i = (i + 1) % table_size) {}
    return &table[i];
}

Kernel *kernel(const void *key, int make) {
    if (table_used * 2 >= table_size) {
        size_t old = table_size;
        Kernel **t = table;
        table_size = old ? old * 4 : 1 << 16;
        table = calloc(table_size, sizeof *table);
        for (size_t i = 0; i < old; i++)
            if (t[i]) *place(t[i]->key) = t[i];
        free(t);
    }
    Kernel **p = place(key);
    if (!*p && make) {
        *p = calloc(1, sizeof **p);
        (*p)->key = key;
        (*p)->registers = 32;
        table_used++;
    }
    return *p;
}

int nullcuda_called(const char *name) {
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < n_counts && counts[i].name != name) i++;
    if (i == n_counts && n_counts < 4096) counts[n_counts++] = (struct Count){name, 0};
    if (i < 4096) counts[i].n++;
    pthread_mutex_unlock(&lock);
    return OK;
}

static int by_launches(const void *a, const void *b) {
    long x = (*(Kernel **)a)->launches, y = (*(Kernel **)b)->launches;
    return x < y ? 1 : x > y ? -1 : 0;
}

void write_log(void) {
    char path[4096];
    snprintf(path, sizeof path, "%s.%d", card.log, getpid());
    FILE *f = fopen(path, "w");
    if (!f) return;
    fprintf(f, "device %s cc %d, peak bytes of device 0: %zu (%.2f GiB)\n\nkernel launches (of those within captures)\n",
            card.name, card.cc, peak[0], peak[0] / 1073741824.0);
    Kernel **list = malloc((table_used + 1) * sizeof *list);
    size_t n = 0;
    for (size_t i = 0; i < table_size; i++)
        if (table[i] && table[i]->launches && table[i]->key != table[i]) list[n++] = table[i];
    qsort(list, n, sizeof *list, by_launches);
    for (size_t i = 0; i < n; i++)
        fprintf(f, "%8ld %8ld  %s\n", list[i]->launches, list[i]->captured, list[i]->name ? list[i]->name : "?");
    fprintf(f, "\ncalls without a definition of their own\n");
    for (int i = 0; i < n_counts; i++) fprintf(f, "%8ld  %s\n", counts[i].n, counts[i].name);
    fclose(f);
}

int refuse(int status, const char *format, ...) {
    char text[2048];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    say("REFUSED (%d): %s", status, text);
    return status;
}

static __thread int last_error;
cudaError_t result(int status) {
    if (status) last_error = status;
    return (cudaError_t)status;
}

EXPORT cudaError_t cudaGetLastError(void) {
    int e = last_error;
    last_error = 0;
    return (cudaError_t)e;
}
EXPORT cudaError_t cudaPeekAtLastError(void) { return (cudaError_t)last_error; }

const char *words(int e) {
    switch (e) {
    case 0: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    case cudaErrorLaunchOutOfResources: return "too many resources requested for launch";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
    default: return "an error of the null device";
    }
}
EXPORT const char *cudaGetErrorString(cudaError_t e) { return words(e); }
EXPORT const char *cudaGetErrorName(cudaError_t e) { return words(e); }
