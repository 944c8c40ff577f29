// Kernels: registered by programs or read from cubins; a launch is checked, and does nothing.
#include "nullcuda.h"

static int runs_here(const Module *m) {
    if (!m || (!m->n_elf && !m->n_ptx)) return 1;
    for (int i = 0; i < m->n_elf; i++)
        if (m->elf[i] / 10 == card.cc / 10 && m->elf[i] % 10 <= card.cc % 10) return 1;
    for (int i = 0; i < m->n_ptx; i++)
        if (m->ptx[i] <= card.cc) return 1;
    return 0;
}

static int launch(Kernel *k, const void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                  size_t smem, void *s) {
    const char *name = k && k->name ? k->name : "an unknown kernel";
    pthread_mutex_lock(&lock);
    if (!k) k = kernel(f, 1);
    k->launches++;
    Capture *c = capture_of(s);
    if (c) {
        c->nodes++;
        k->captured++;
    }
    pthread_mutex_unlock(&lock);
    if (!gx || !gy || !gz || !bx || !by || !bz)
        return refuse(cudaErrorInvalidConfiguration, "%s: grid %u %u %u of %u %u %u threads", name, gx, gy, gz, bx, by, bz);
    if (gx > 2147483647u || gy > 65535 || gz > 65535 || bx > 1024 || by > 1024 || bz > 64 || bx * by * bz > 1024)
        return refuse(cudaErrorInvalidConfiguration, "%s: grid %u %u %u of %u %u %u threads", name, gx, gy, gz, bx, by, bz);
    size_t most = k->dynamic_smem ? (size_t)k->dynamic_smem : 49152;
    if (smem > most || smem + k->static_smem > (size_t)card.smem_block)
        return refuse(cudaErrorInvalidValue, "%s: %zu bytes of dynamic and %d of static shared memory, %zu allowed", name, smem,
                      k->static_smem, most);
    if (((k->registers + 7) & ~7) * ((bx * by * bz + 31) & ~31u) > 65536)
        return refuse(cudaErrorLaunchOutOfResources, "%s: %d registers for each of %u threads", name, k->registers,
                      bx * by * bz);
    if (!runs_here(k->module))
        return refuse(cudaErrorNoKernelImageForDevice, "%s: no code for sm_%d (first code: sm_%d)", name, card.cc,
                      k->module->n_elf ? k->module->elf[0] : -1);
    return OK;
}

// A program's code: a wrapper points to a container of entries, each for an architecture.
EXPORT void **__cudaRegisterFatBinary(void *wrapper) {
    struct {
        int magic, version;
        const char *data;
        void *file;
    } *w = wrapper;
    Module *m = calloc(1, sizeof *m);
    const char *p = w->data;
    if (w->magic == 0x466243b1 && p && *(unsigned *)p == 0xba55ed50) {
        uint16_t header = *(uint16_t *)(p + 6);
        uint64_t size = *(uint64_t *)(p + 8);
        const char *end = p + header + size;
        for (p += header; p + 32 < end;) {
            uint16_t kind = *(uint16_t *)p;
            uint32_t head = *(uint32_t *)(p + 4), arch = *(uint32_t *)(p + 28);
            uint64_t body = *(uint64_t *)(p + 8);
            if (!head) break;
            if (kind == 2 && m->n_elf < 32) m->elf[m->n_elf++] = arch;
            if (kind == 1 && m->n_ptx < 16) m->ptx[m->n_ptx++] = arch;
            p += head + body;
        }
    }
    return (void **)m;
}
EXPORT void __cudaRegisterFatBinaryEnd(void **h) {}
EXPORT void __cudaUnregisterFatBinary(void **h) {}
EXPORT char __cudaInitModule(void **h) { return 1; }
EXPORT void __cudaRegisterVar(void **h, char *v, char *a, const char *n, int e, size_t s, int c, int g) {}
EXPORT void __cudaRegisterFunction(void **h, const char *host, char *dev, const char *name, int limit, void *a, void *b,
                                   void *c, void *d, int *e) {
    pthread_mutex_lock(&lock);
    Kernel *k = kernel(host, 1);
    k->name = (char *)name;
    k->module = (Module *)h;
    pthread_mutex_unlock(&lock);
}
static Kernel *find(const void *f) {
    pthread_mutex_lock(&lock);
    Kernel *k = kernel(f, 0);
    pthread_mutex_unlock(&lock);
    return k;
}
static __thread struct {
    dim3 g, b;
    size_t smem;
    void *s;
} pushed[16];
static __thread int n_pushed;
EXPORT unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t smem, struct CUstream_st *s) {
    if (n_pushed < 16) {
        pushed[n_pushed].g = g;
        pushed[n_pushed].b = b;
        pushed[n_pushed].smem = smem;
        pushed[n_pushed].s = s;
        n_pushed++;
    }
    return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *g, dim3 *b, size_t *smem, void *s) {
    if (!n_pushed) return cudaErrorMissingConfiguration;
    n_pushed--;
    *g = pushed[n_pushed].g;
    *b = pushed[n_pushed].b;
    *smem = pushed[n_pushed].smem;
    *(void **)s = pushed[n_pushed].s;
    return OK;
}
EXPORT cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **args, size_t smem, cudaStream_t s) {
    return result(launch(find(f), f, g.x, g.y, g.z, b.x, b.y, b.z, smem, s));
}
EXPORT cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3 g, dim3 b, void **args, size_t smem, cudaStream_t s) {
    return cudaLaunchKernel(f, g, b, args, smem, s);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **args) {
    return cudaLaunchKernel(f, c->gridDim, c->blockDim, args, c->dynamicSmemBytes, c->stream);
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t *k, const void *f) {
    *k = (cudaKernel_t)f;
    return OK;
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void **args, size_t smem, cudaStream_t s) {
    return cudaLaunchKernel((const void *)k, g, b, args, smem, s);
}
static int set_attribute(Kernel *k, int attr, int v, const char *name) {
    if (!k || attr != cudaFuncAttributeMaxDynamicSharedMemorySize) return OK;
    if (v + k->static_smem > card.smem_block)
        return refuse(cudaErrorInvalidValue, "%s wants %d bytes of shared memory, sm_%d has %d", k->name ? k->name : name, v,
                      card.cc, card.smem_block);
    k->dynamic_smem = v;
    return OK;
}
EXPORT cudaError_t cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute a, int v) {
    return result(set_attribute(find(f), a, v, "a kernel"));
}
EXPORT cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t f, enum cudaFuncAttribute a, int v, int d) {
    return cudaFuncSetAttribute((const void *)f, a, v);
}
EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
    Kernel *k = find(f);
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->ptxVersion = a->binaryVersion = card.cc;
    a->maxDynamicSharedSizeBytes = k && k->dynamic_smem ? k->dynamic_smem : 49152;
    return result(
        k && !runs_here(k->module) ? refuse(cudaErrorNoKernelImageForDevice, "%s: no code for sm_%d", k->name, card.cc) : OK);
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t smem,
                                                                          unsigned flags) {
    int x = card.threads_sm / (b ? b : 1), y = smem ? card.smem_sm / (int)(smem + 1024) : 32;
    *n = x < y ? x : y;
    if (*n > 32) *n = 32;
    return OK;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int b, size_t smem) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, f, b, smem, 0);
}
EXPORT cudaError_t cudaOccupancyMaxActiveClusters(int *n, const void *f, const cudaLaunchConfig_t *c) {
    *n = card.sms / 2;
    return OK;
}
EXPORT cudaError_t cudaLibraryLoadData(cudaLibrary_t *l, const void *code, enum cudaJitOption *jo, void **jv, unsigned n,
                                       enum cudaLibraryOption *lo, void **lv, unsigned m) {
    *l = calloc(1, 8);
    return OK;
}
EXPORT cudaError_t cudaLibraryGetKernel(cudaKernel_t *k, cudaLibrary_t l, const char *name) {
    Kernel *n = kernel(calloc(1, 1), 1);
    n->name = strdup(name);
    *k = (cudaKernel_t)n->key;
    return OK;
}
// Modules of the driver: of a cubin, which is an ELF file, registers, shared memory and architecture are read.
typedef struct Cubin {
    Module module;
    const char *image;
} Cubin;
static int elf_numbers(const char *e, const char *kernel_name, Kernel *k) {
    const Elf64_Ehdr *h = (const Elf64_Ehdr *)e;
    const Elf64_Shdr *s = (const Elf64_Shdr *)(e + h->e_shoff);
    const char *names = e + s[h->e_shstrndx].sh_offset;
    char section[1024];
    const Elf64_Sym *symbols = NULL;
    const char *strings = NULL;
    size_t n_symbols = 0;
    for (int i = 0; i < h->e_shnum; i++)
        if (s[i].sh_type == SHT_SYMTAB) {
            symbols = (const Elf64_Sym *)(e + s[i].sh_offset);
            n_symbols = s[i].sh_size / sizeof *symbols;
            strings = e + s[s[i].sh_link].sh_offset;
        }
    int found = 0;
    for (int i = 0; i < h->e_shnum; i++) {
        const char *name = names + s[i].sh_name;
        snprintf(section, sizeof section, ".nv.shared.%s", kernel_name);
        if (!strcmp(name, section)) k->static_smem = (int)s[i].sh_size;
        snprintf(section, sizeof section, ".text.%s", kernel_name);
        if (!strcmp(name, section)) found = 1;
        if (strcmp(name, ".nv.info")) continue;
        const unsigned char *p = (const unsigned char *)e + s[i].sh_offset, *end = p + s[i].sh_size;
        while (p + 4 <= end) {
            int format = p[0], attr = p[1], size = p[2] | p[3] << 8;
            if (format != 4) {
                p += 4;
                continue;
            }
            if (attr == 0x2f && size == 8) { // EIATTR_REGCOUNT
                unsigned symbol = *(unsigned *)(p + 4), regs = *(unsigned *)(p + 8);
                if (symbols && symbol < n_symbols && !strcmp(strings + symbols[symbol].st_name, kernel_name))
                    k->registers = (int)regs;
            }
            p += 4 + size;
        }
    }
    return found;
}
EXPORT CUresult cuModuleLoadData(CUmodule *m, const void *image) {
    Cubin *c = calloc(1, sizeof *c);
    if (!memcmp(image, ELFMAG, 4)) {
        const Elf64_Ehdr *h = image;
        c->image = image;
        unsigned arch = h->e_ident[EI_ABIVERSION] >= 8 ? (h->e_flags >> 8) & 0xff : h->e_flags & 0xff;
        size_t size = h->e_shoff + h->e_shnum * sizeof(Elf64_Shdr);
        const Elf64_Shdr *s = (const Elf64_Shdr *)((const char *)image + h->e_shoff);
        for (int i = 0; i < h->e_shnum; i++)
            if (s[i].sh_type != SHT_NOBITS && s[i].sh_offset + s[i].sh_size > size) size = s[i].sh_offset + s[i].sh_size;
        c->image = memcpy(malloc(size), image, size);
        if (arch >= 50 && (arch / 10 != (unsigned)card.cc / 10 || arch % 10 > (unsigned)card.cc % 10))
            return (CUresult)refuse(CUDA_ERROR_NO_BINARY_FOR_GPU, "a cubin for sm_%u on sm_%d", arch, card.cc);
    }
    *m = (CUmodule)c;
    return OK;
}
EXPORT CUresult cuModuleLoadDataEx(CUmodule *m, const void *image, unsigned n, CUjit_option *o, void **v) {
    return cuModuleLoadData(m, image);
}
EXPORT CUresult cuModuleLoad(CUmodule *m, const char *path) {
    *m = calloc(1, sizeof(Cubin));
    return OK;
}
EXPORT CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
    Cubin *c = (Cubin *)m;
    pthread_mutex_lock(&lock);
    Kernel *k = kernel(calloc(1, 1), 1);
    k->name = strdup(name);
    pthread_mutex_unlock(&lock);
    if (c->image && !elf_numbers(c->image, name, k))
        return (CUresult)refuse(CUDA_ERROR_NOT_FOUND, "no kernel %s in the cubin", name);
    *f = (CUfunction)k->key;
    return OK;
}
EXPORT CUresult cuLibraryLoadData(CUlibrary *l, const void *code, CUjit_option *jo, void **jv, unsigned n, CUlibraryOption *lo,
                                  void **lv, unsigned q) {
    return cuModuleLoadData((CUmodule *)l, code);
}
EXPORT CUresult cuLibraryGetKernel(CUkernel *k, CUlibrary l, const char *name) {
    return cuModuleGetFunction((CUfunction *)k, (CUmodule)l, name);
}
EXPORT CUresult cuLibraryGetModule(CUmodule *m, CUlibrary l) {
    *m = (CUmodule)l;
    return OK;
}
EXPORT CUresult cuKernelGetFunction(CUfunction *f, CUkernel k) {
    *f = (CUfunction)k;
    return OK;
}
EXPORT CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
    Kernel *k = find(f);
    switch (a) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *v = k ? k->registers : 32; break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *v = k ? k->static_smem : 0; break;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: {
        int r = k ? (k->registers + 7) & ~7 : 32, t = 65536 / (r ? r : 1) / 32 * 32;
        *v = t < 1024 ? t : 1024;
        break;
    }
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *v = k && k->dynamic_smem ? k->dynamic_smem : 49152; break;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION:
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION: *v = card.cc; break;
    default: *v = 0;
    }
    return OK;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) {
    return (CUresult)set_attribute(find(f), (int)a, v, "a kernel");
}
EXPORT CUresult cuKernelSetAttribute(CUfunction_attribute a, int v, CUkernel k, CUdevice d) {
    return cuFuncSetAttribute((CUfunction)k, a, v);
}
EXPORT CUresult cuKernelGetAttribute(int *v, CUfunction_attribute a, CUkernel k, CUdevice d) {
    return cuFuncGetAttribute(v, a, (CUfunction)k);
}
EXPORT CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                               unsigned smem, CUstream s, void **p, void **x) {
    return (CUresult)launch(find(f), f, gx, gy, gz, bx, by, bz, smem, s);
}
EXPORT CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                          unsigned bz, unsigned smem, CUstream s, void **p) {
    return cuLaunchKernel(f, gx, gy, gz, bx, by, bz, smem, s, p, NULL);
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **x) {
    return cuLaunchKernel(f, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ, c->sharedMemBytes,
                          c->hStream, p, x);
}
EXPORT CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) {
    *n = card.sms / 2;
    return OK;
}
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction f, int b, size_t smem) {
    return (CUresult)cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, f, b, smem, 0);
}
