// What the files of the null driver share. Names that are not exported are hidden from the process (-fvisibility=hidden).
#pragma once
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <elf.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define OK 0
#define MAX_DEVICES 8
#define EXPORT __attribute__((visibility("default")))

// --- device.c: the card that is pretended, from environment variables
extern struct Card {
    const char *name;
    int cc, sms, l2_mb, bus_bits, clock_khz, mem_khz;
    int smem_block, smem_sm, threads_sm; // shared memory that a block may opt in to, and of a multiprocessor; threads of one
    size_t memory;
    int installed, visible; // devices
    const char *log;        // where to list what was called
} card;
extern __thread int current; // the calling thread's device
int attribute(int what, int device);

// --- log.c: messages, errors, and what was called
typedef struct Module {
    int elf[32], n_elf, ptx[16], n_ptx; // architectures that it has code for
} Module;
typedef struct Kernel {
    const void *key; // what the program calls it by: a host function or a handle
    char *name;
    const Module *module;
    long launches, captured;
    int registers, static_smem, dynamic_smem;
} Kernel;
extern pthread_mutex_t lock; // of all tables
void say(const char *format, ...);
int refuse(int status, const char *format, ...); // says so on stderr; returns the status
cudaError_t result(int status);                  // keeps an error for cudaGetLastError
const char *words(int status);
EXPORT int nullcuda_called(const char *name); // counts a call
Kernel *kernel(const void *key, int make);    // with the lock held
void write_log(void);

// --- memory.c
typedef enum Kind { DEVICE, PINNED, REGISTERED, MAPPED } Kind; // the second and third are the host's
typedef struct Range {
    char *start;
    size_t size;
    int device;
    Kind kind;
} Range;
extern size_t used[MAX_DEVICES], peak[MAX_DEVICES];
int allocate(void **start, size_t size, int device, Kind kind);
Range *range_of(const void *address); // with the lock held
int is_host(const Range *range);

// --- streams.c
typedef struct Capture {
    size_t nodes;
    int mode, broken;
    unsigned long long id;
    void *origin;
} Capture;
extern int n_captures;             // that are open
Capture *capture_of(void *stream); // NULL: the stream is not being captured
int in_capture(void *stream);      // whether it is; then counts a node
int forbidden(const char *what);   // an error for calls that a capture forbids, unless this thread says otherwise
