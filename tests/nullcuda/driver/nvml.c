// NVML, which vLLM and `rankup doctor` ask.
#include "nullcuda.h"

#define NV(d) ((int)(uintptr_t)(d) - 1)
typedef void *Nv;
EXPORT int nvmlInit_v2(void) { return OK; }
EXPORT int nvmlInit(void) { return OK; }
EXPORT int nvmlInitWithFlags(unsigned f) { return OK; }
EXPORT int nvmlShutdown(void) { return OK; }
EXPORT const char *nvmlErrorString(int e) { return e == 3 ? "Not Supported" : e ? "Unknown Error" : "Success"; }
EXPORT int nvmlSystemGetDriverVersion(char *s, unsigned n) {
    snprintf(s, n, "580.82.07");
    return OK;
}
EXPORT int nvmlSystemGetNVMLVersion(char *s, unsigned n) {
    snprintf(s, n, "13.580.82.07");
    return OK;
}
EXPORT int nvmlSystemGetCudaDriverVersion(int *v) {
    *v = 13000;
    return OK;
}
EXPORT int nvmlSystemGetCudaDriverVersion_v2(int *v) {
    *v = 13000;
    return OK;
}
EXPORT int nvmlDeviceGetCount_v2(unsigned *n) {
    *n = card.installed;
    return OK;
}
EXPORT int nvmlDeviceGetCount(unsigned *n) {
    *n = card.installed;
    return OK;
}
EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned i, Nv *d) {
    if ((int)i >= card.installed) return 2;
    *d = (Nv)(uintptr_t)(i + 1);
    return OK;
}
EXPORT int nvmlDeviceGetHandleByIndex(unsigned i, Nv *d) { return nvmlDeviceGetHandleByIndex_v2(i, d); }
EXPORT int nvmlDeviceGetHandleByUUID(const char *u, Nv *d) {
    *d = (Nv)1;
    return OK;
}
EXPORT int nvmlDeviceGetHandleByPciBusId_v2(const char *b, Nv *d) {
    *d = (Nv)1;
    return OK;
}
EXPORT int nvmlDeviceGetIndex(Nv d, unsigned *i) {
    *i = NV(d);
    return OK;
}
EXPORT int nvmlDeviceGetMinorNumber(Nv d, unsigned *i) {
    *i = NV(d);
    return OK;
}
EXPORT int nvmlDeviceGetName(Nv d, char *s, unsigned n) {
    snprintf(s, n, "%s", card.name);
    return OK;
}
EXPORT int nvmlDeviceGetUUID(Nv d, char *s, unsigned n) {
    int b = 0x11 + NV(d);
    snprintf(s, n, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", b, b, b, b, b, b, b, b, b, b, b,
             b, b, b, b, b);
    return OK;
}
EXPORT int nvmlDeviceGetCudaComputeCapability(Nv d, int *a, int *b) {
    *a = card.cc / 10;
    *b = card.cc % 10;
    return OK;
}
EXPORT int nvmlDeviceGetMemoryInfo(Nv d, unsigned long long *m) {
    m[0] = card.memory;
    m[2] = used[NV(d)];
    m[1] = m[0] - m[2];
    return OK;
}
EXPORT int nvmlDeviceGetMemoryInfo_v2(Nv d, unsigned long long *m) {
    m[1] = card.memory;
    m[2] = 0;
    m[4] = used[NV(d)];
    m[3] = m[1] - m[4];
    return OK;
}
EXPORT int nvmlDeviceGetUtilizationRates(Nv d, unsigned *u) {
    u[0] = u[1] = 0;
    return OK;
}
EXPORT int nvmlDeviceGetTemperature(Nv d, int s, unsigned *t) {
    *t = 30;
    return OK;
}
EXPORT int nvmlDeviceGetPowerUsage(Nv d, unsigned *p) {
    *p = 100000;
    return OK;
}
EXPORT int nvmlDeviceGetComputeRunningProcesses(Nv d, unsigned *n, void *i) {
    *n = 0;
    return OK;
}
EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(Nv d, unsigned *n, void *i) {
    *n = 0;
    return OK;
}
EXPORT int nvmlDeviceGetP2PStatus(Nv a, Nv b, int w, int *s) {
    *s = 0;
    return OK;
}
EXPORT int nvmlDeviceGetGpuFabricInfoV(Nv d, unsigned char *info) { // no NVLink fabric; the first 4 bytes are the version
    memset(info + 4, 0, 28);
    return OK;
}
static int unsupported(void) { return 3; }
#define NO(function)                                                                                                           \
    EXPORT int function(void) { return unsupported(); }
NO(nvmlDeviceGetCpuAffinity)
NO(nvmlDeviceGetNumaNodeId)
NO(nvmlDeviceGetNvLinkRemoteDeviceType) NO(nvmlDeviceGetNvLinkState) NO(nvmlDeviceGetPciInfo_v3)
    NO(nvmlDeviceGetNvLinkRemotePciInfo_v2) NO(nvmlDeviceGetClockInfo) NO(nvmlDeviceGetMaxClockInfo)
