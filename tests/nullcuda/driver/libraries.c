// cuBLAS, cuDNN and the others: what they must return for torch to go on. They compute nothing.
#include "nullcuda.h"

#define HANDLE(function)                                                                                                       \
    EXPORT int function(void **h) {                                                                                            \
        *h = calloc(1, 4096);                                                                                                  \
        return OK;                                                                                                             \
    }
HANDLE(cublasCreate_v2)
HANDLE(cublasLtCreate)
HANDLE(cudnnCreate)
HANDLE(cusparseCreate)
HANDLE(cusolverDnCreate)
HANDLE(cusparseLtInit)
EXPORT int cublasGetMathMode(void *h, int *m) {
    *m = 0;
    return OK;
}
EXPORT int cublasGetPointerMode_v2(void *h, int *m) {
    *m = 0;
    return OK;
}
EXPORT int cublasGetVersion_v2(void *h, int *v) {
    *v = 130101;
    return OK;
}
// Results are {uint64 algo[8]; size_t workspace; int state; float waves; int reserved[4]}.
EXPORT int cublasLtMatmulAlgoGetHeuristic(void *h, void *d, void *a, void *b, void *c, void *e, void *p, int asked,
                                          char *results, int *n) {
    memset(results, 0, 96);
    nullcuda_called("cublasLtMatmulAlgoGetHeuristic (one result)");
    *n = asked > 0;
    return OK;
}

EXPORT int cudnnBackendCreateDescriptor(int type, void **d) {
    *d = calloc(1, 64);
    return OK;
}
EXPORT int cudnnBackendDestroyDescriptor(void *d) {
    free(d);
    return OK;
}
EXPORT int cudnnBackendGetAttribute(void *d, int name, int type, int64_t asked, int64_t *n, void *values) {
    if (n) *n = 1;
    if (values && asked >= 1 && type == 3) *(int64_t *)values = 0; // CUDNN_TYPE_INT64: sizes of workspaces, counts of notes
    return OK;
}
