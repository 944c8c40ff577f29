// A CUDA device that is not there. This file: which card it pretends to be, and what it says of itself.
// Memory is anonymous host memory without reservation, copies and memsets are made, kernels do nothing. What a driver would
// refuse (a launch without threads, too much shared memory, code for another architecture, out of memory, a synchronisation
// within a capture, memory that is not the device's) is refused, and said on stderr. See ../README.md.
#include "nullcuda.h"
#include <strings.h>

struct Card card;
__thread int current;

static const struct {
    const char *key, *name;
    int cc, sms, gib, l2_mb, bus_bits, clock_khz, mem_khz;
} MODELS[] = {
    {"h100", "NVIDIA H100 80GB HBM3 (null)", 90, 132, 80, 50, 5120, 1980000, 2619000},
    {"h200", "NVIDIA H200 (null)", 90, 132, 141, 50, 6144, 1980000, 3201000},
    {"a100", "NVIDIA A100-SXM4-80GB (null)", 80, 108, 80, 40, 5120, 1410000, 1593000},
    {"a10", "NVIDIA A10 (null)", 86, 72, 24, 6, 384, 1695000, 6251000},
    {"3090", "NVIDIA GeForce RTX 3090 (null)", 86, 82, 24, 6, 384, 1695000, 9751000},
    {"4090", "NVIDIA GeForce RTX 4090 (null)", 89, 128, 24, 72, 384, 2520000, 10501000},
    {"l4", "NVIDIA L4 (null)", 89, 58, 24, 48, 192, 2040000, 6251000},
    {"5090", "NVIDIA GeForce RTX 5090 (null)", 120, 170, 32, 96, 512, 2407000, 14001000},
    {"b200", "NVIDIA B200 (null)", 100, 148, 180, 126, 8192, 1965000, 3996000},
    {"t4", "Tesla T4 (null)", 75, 40, 16, 4, 256, 1590000, 5001000},
};

static int smem_of(int cc) { // KiB that a block may opt in to
    switch (cc) {
    case 75: return 64;
    case 80:
    case 87: return 163;
    case 86:
    case 89:
    case 120:
    case 121: return 99;
    default: return 227;
    }
}

static int env_int(const char *name, int otherwise) {
    const char *s = getenv(name);
    return s && *s ? atoi(s) : otherwise;
}

static int visible_of(int installed) { // CUDA_VISIBLE_DEVICES is counted, not read: all devices are alike
    const char *list = getenv("CUDA_VISIBLE_DEVICES");
    if (!list) return installed;
    int n = 0, within = 0; // an entry
    for (const char *p = list; *p; p++) {
        if (*p == ',') within = 0;
        else if (*p == '-' && !within) break; // -1 ends the list
        else if (!within) {
            within = 1;
            n++;
        }
    }
    return n < installed ? n : installed;
}

__attribute__((constructor)) static void start(void) {
    const char *key = getenv("NULLCUDA_GPU");
    int n_models = sizeof MODELS / sizeof *MODELS, m = 0;
    while (key && *key && m < n_models && strcasecmp(key, MODELS[m].key)) m++;
    if (m == n_models) {
        fprintf(stderr, "[nullcuda] there is no card '%s'\n", key);
        _exit(2);
    }
    card.name = MODELS[m].name;
    card.cc = MODELS[m].cc;
    card.sms = MODELS[m].sms;
    const char *gib = getenv("NULLCUDA_MEM_GB");
    card.memory = (size_t)((gib && *gib ? atof(gib) : MODELS[m].gib) * 0.99 * (1 << 30));
    int kib = smem_of(card.cc);
    card.smem_block = kib * 1024;
    card.smem_sm = card.cc == 75 ? kib * 1024 : (kib + 1) * 1024;
    card.threads_sm = (card.cc == 86 || card.cc == 89 || card.cc == 120 || card.cc == 121) ? 1536 : card.cc == 75 ? 1024 : 2048;
    card.l2_mb = MODELS[m].l2_mb;
    card.bus_bits = MODELS[m].bus_bits;
    card.clock_khz = MODELS[m].clock_khz;
    card.mem_khz = MODELS[m].mem_khz;
    card.installed = env_int("NULLCUDA_DEVICES", 1);
    if (card.installed > MAX_DEVICES) card.installed = MAX_DEVICES;
    card.visible = visible_of(card.installed);
    card.log = getenv("NULLCUDA_LOG");
    if (card.log && *card.log) atexit(write_log);
}

int attribute(int a, int dev) {
    switch (a) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 2147483647;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 49152;
    case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY: return 65536;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_PITCH: return 2147483647;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return card.clock_khz;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return card.mem_khz;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return card.bus_bits;
    case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT: return 512;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return card.sms;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return card.l2_mb << 20;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return card.threads_sm;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return card.smem_sm;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return card.smem_block;
    case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK: return card.cc >= 80 ? 1024 : 0;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return card.cc / 10;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return card.cc % 10;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID: return dev + 1;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: return 3;
    case CU_DEVICE_ATTRIBUTE_GPU_OVERLAP:
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_GLOBAL_L1_CACHE_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_LOCAL_L1_CACHE_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY:
    case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH:
    case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_FUNCTION_POINTERS:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM: return 1;
    case CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH: return card.cc >= 90;
    default: return 0;
    }
}

EXPORT cudaError_t cudaGetDeviceCount(int *n) {
    *n = card.visible;
    return result(card.visible ? OK : cudaErrorNoDevice);
}
EXPORT cudaError_t cudaGetDevice(int *d) {
    *d = current;
    return OK;
}
EXPORT cudaError_t cudaSetDevice(int d) {
    if (d < 0 || d >= card.visible) return result(refuse(cudaErrorInvalidDevice, "cudaSetDevice(%d) of %d", d, card.visible));
    current = d;
    return OK;
}
EXPORT cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) {
    *v = attribute(a, d);
    return OK;
}
EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
    if (d < 0 || d >= card.visible) return result(cudaErrorInvalidDevice);
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "%s", card.name);
    memset(&p->uuid, 0x11 + d, sizeof p->uuid);
    p->totalGlobalMem = card.memory;
    p->sharedMemPerBlock = 49152;
    p->regsPerBlock = 65536;
    p->warpSize = 32;
    p->memPitch = 2147483647;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->totalConstMem = 65536;
    p->major = card.cc / 10;
    p->minor = card.cc % 10;
    p->textureAlignment = 512;
    p->texturePitchAlignment = 32;
    p->multiProcessorCount = card.sms;
    p->canMapHostMemory = p->concurrentKernels = p->unifiedAddressing = p->streamPrioritiesSupported = p->cooperativeLaunch =
        p->managedMemory = 1;
    p->hostRegisterSupported = p->memoryPoolsSupported = p->unifiedFunctionPointers = p->globalL1CacheSupported =
        p->localL1CacheSupported = 1;
    p->pciBusID = d + 1;
    p->asyncEngineCount = 3;
    p->memoryBusWidth = card.bus_bits;
    p->l2CacheSize = card.l2_mb << 20;
    p->maxThreadsPerMultiProcessor = card.threads_sm;
    p->sharedMemPerMultiprocessor = card.smem_sm;
    p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlockOptin = card.smem_block;
    p->maxBlocksPerMultiProcessor = 32;
    p->reservedSharedMemPerBlock = 1024;
    p->clusterLaunch = card.cc >= 90;
    p->ECCEnabled = 1;
    return OK;
}
EXPORT cudaError_t cudaDriverGetVersion(int *v) {
    *v = 13000;
    return OK;
}
EXPORT cudaError_t cudaRuntimeGetVersion(int *v) {
    *v = 13000;
    return OK;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int d, int p) {
    *can = d != p;
    return OK;
}
EXPORT cudaError_t cudaDeviceGetPCIBusId(char *s, int n, int d) {
    snprintf(s, n, "0000:%02X:00.0", d + 1);
    return OK;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return OK;
}
EXPORT cudaError_t cudaDeviceSynchronize(void) {
    return result(
        n_captures ? refuse(cudaErrorStreamCaptureUnsupported, "cudaDeviceSynchronize while a stream is being captured") : OK);
}
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned v, unsigned long long flags,
                                                    enum cudaDriverEntryPointQueryResult *found) {
    char text[256];
    for (int n = 4; n >= 1; n--) {
        snprintf(text, sizeof text, n > 1 ? "%s_v%d" : "%s", name, n);
        if ((*f = dlsym(RTLD_DEFAULT, text))) break;
    }
    if (found) *found = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    if (!*f && getenv("NULLCUDA_TRACE")) say("no driver function %s", name);
    return OK;
}
EXPORT cudaError_t cudaGetDriverEntryPoint(const char *name, void **f, unsigned long long flags,
                                           enum cudaDriverEntryPointQueryResult *found) {
    return cudaGetDriverEntryPointByVersion(name, f, 13000, flags, found);
}
EXPORT cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int d) {
    *pool = (cudaMemPool_t)(uintptr_t)(d + 1);
    return OK;
}
