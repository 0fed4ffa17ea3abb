/* A disk that is full or slow, for a process that is loaded with this by LD_PRELOAD. The file DISK_FAULT_FILE holds a
   letter, which may change at any time: `f` lets writes to files fail with ENOSPC, `s` delays each sync. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define SYNC_MICROSECONDS 150000

static const volatile char *fault;

__attribute__((constructor)) static void map_fault(void) {
    const char *path = getenv("DISK_FAULT_FILE");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0)
        return;
    void *mapped = mmap(NULL, 1, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (mapped != MAP_FAILED)
        fault = mapped;
}

static int is_full(int file) {
    struct stat found;
    return fault && *fault == 'f' && fstat(file, &found) == 0 && S_ISREG(found.st_mode);
}

static int refuse(void) {
    errno = ENOSPC;
    return -1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void *data, size_t size) {
    static __typeof__(&write) real;
    if (!real)
        real = REAL(write);
    return is_full(file) ? refuse() : real(file, data, size);
}

ssize_t pwrite(int file, const void *data, size_t size, off_t offset) {
    static __typeof__(&pwrite) real;
    if (!real)
        real = REAL(pwrite);
    return is_full(file) ? refuse() : real(file, data, size, offset);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) {
    static __typeof__(&pwrite64) real;
    if (!real)
        real = REAL(pwrite64);
    return is_full(file) ? refuse() : real(file, data, size, offset);
}

ssize_t pwritev(int file, const struct iovec *parts, int count, off_t offset) {
    static __typeof__(&pwritev) real;
    if (!real)
        real = REAL(pwritev);
    return is_full(file) ? refuse() : real(file, parts, count, offset);
}

ssize_t pwritev64(int file, const struct iovec *parts, int count, off64_t offset) {
    static __typeof__(&pwritev64) real;
    if (!real)
        real = REAL(pwritev64);
    return is_full(file) ? refuse() : real(file, parts, count, offset);
}

int posix_fallocate(int file, off_t offset, off_t size) {
    static __typeof__(&posix_fallocate) real;
    if (!real)
        real = REAL(posix_fallocate);
    return is_full(file) ? ENOSPC : real(file, offset, size);
}

int posix_fallocate64(int file, off64_t offset, off64_t size) {
    static __typeof__(&posix_fallocate64) real;
    if (!real)
        real = REAL(posix_fallocate64);
    return is_full(file) ? ENOSPC : real(file, offset, size);
}

int fsync(int file) {
    static __typeof__(&fsync) real;
    if (!real)
        real = REAL(fsync);
    if (fault && *fault == 's')
        usleep(SYNC_MICROSECONDS);
    return real(file);
}

int fdatasync(int file) {
    static __typeof__(&fdatasync) real;
    if (!real)
        real = REAL(fdatasync);
    if (fault && *fault == 's')
        usleep(SYNC_MICROSECONDS);
    return real(file);
}
