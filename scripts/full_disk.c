// A disk that fills up, for one process: preloaded, it counts what the process writes below a folder, and from a given
// count on refuses it with ENOSPC, as a full disk does.
//
//     cc -shared -fPIC -o full_disk.so full_disk.c -ldl        (scripts/full_disk_test.py does this)
//     FULL_DISK_FOLDER=/folder FULL_DISK_TRACE=/elsewhere/trace LD_PRELOAD=./full_disk.so python ...
//
// The process itself calls full_disk_after(count), which also sets the count to zero; -1 = there is room. Every counted
// call is a line in the trace: its kind and the file.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long calls;
static atomic_long room = -1;

void full_disk_after(long count) {
    atomic_store(&calls, 0);
    atomic_store(&room, count);
}

static int is_below(const char* path) {
    const char* const folder = getenv("FULL_DISK_FOLDER");
    return folder != NULL && strncmp(path, folder, strlen(folder)) == 0;
}

static void trace(const char* kind, const char* path) {
    static int descriptor = -2;
    if (descriptor == -2) {
        const char* const name = getenv("FULL_DISK_TRACE");
        descriptor = name == NULL ? -1 : (int)(open)(name, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    }
    if (descriptor < 0) return;
    char line[PATH_MAX + 32];
    const int length = snprintf(line, sizeof line, "%s %s\n", kind, path);
    ssize_t (*const real)(int, const void*, size_t) = dlsym(RTLD_NEXT, "write");
    if (real(descriptor, line, (size_t)length) < 0) descriptor = -1;
}

// Whether the disk has no room for a call that writes to a file; sets errno then.
static int is_full(const char* kind, const char* path) {
    if (!is_below(path)) return 0;
    trace(kind, path);
    const long number = atomic_fetch_add(&calls, 1);
    const long limit = atomic_load(&room);
    if (limit < 0 || number < limit) return 0;
    errno = ENOSPC;
    return 1;
}

static int is_full_for(const char* kind, int descriptor) {
    char link[64];
    char path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    const ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = '\0';
    return is_full(kind, path);
}

ssize_t write(int descriptor, const void* data, size_t size) {
    ssize_t (*const real)(int, const void*, size_t) = dlsym(RTLD_NEXT, "write");
    return is_full_for("write", descriptor) ? -1 : real(descriptor, data, size);
}

ssize_t pwrite64(int descriptor, const void* data, size_t size, off64_t position) {
    ssize_t (*const real)(int, const void*, size_t, off64_t) = dlsym(RTLD_NEXT, "pwrite64");
    return is_full_for("write", descriptor) ? -1 : real(descriptor, data, size, position);
}

ssize_t writev(int descriptor, const struct iovec* parts, int count) {
    ssize_t (*const real)(int, const struct iovec*, int) = dlsym(RTLD_NEXT, "writev");
    return is_full_for("write", descriptor) ? -1 : real(descriptor, parts, count);
}

int fsync(int descriptor) {
    int (*const real)(int) = dlsym(RTLD_NEXT, "fsync");
    return is_full_for("fsync", descriptor) ? -1 : real(descriptor);
}

int mkdir(const char* path, mode_t mode) {
    int (*const real)(const char*, mode_t) = dlsym(RTLD_NEXT, "mkdir");
    return is_full("mkdir", path) ? -1 : real(path, mode);
}

static int creates_on_full_disk(const char* path, int flags) {
    return (flags & O_CREAT) != 0 && access(path, F_OK) != 0 && is_full("create", path);
}

#define DEFINE_OPEN(name)                                                         \
    int name(const char* path, int flags, ...) {                                  \
        int (*const real)(const char*, int, ...) = dlsym(RTLD_NEXT, #name);       \
        va_list arguments;                                                        \
        va_start(arguments, flags);                                               \
        const mode_t mode = (flags & O_CREAT) != 0 ? va_arg(arguments, mode_t) : 0; \
        va_end(arguments);                                                        \
        return creates_on_full_disk(path, flags) ? -1 : real(path, flags, mode);  \
    }

DEFINE_OPEN(open)
DEFINE_OPEN(open64)
