/* Writes down what a process does to the files below FILE_RECORDER_ROOT, in the order in which it does it, for a
   process that is loaded with this by LD_PRELOAD. Records are appended to FILE_RECORDER_LOG:
   kind (1 byte), length of the path (4), length of the data (4), offset or size (8), path, data; native byte order. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { CREATE = 'C', WRITE = 'W', TRUNCATE = 'T', SYNC = 'S', RENAME = 'R', UNLINK = 'U', MAKE_FOLDER = 'M', LINK = 'L' };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_length;
static int sink = -1;

#define REAL(name) ((__typeof__(&name))real(&cached_##name, #name))
#define CACHE(name) static void *cached_##name

static void *real(void **cached, const char *name) {
    if (!*cached)
        *cached = dlsym(RTLD_NEXT, name);
    return *cached;
}

CACHE(open);
CACHE(openat);
CACHE(write);
CACHE(pwrite);
CACHE(writev);
CACHE(ftruncate);
CACHE(fsync);
CACHE(fdatasync);
CACHE(renameat);
CACHE(unlinkat);
CACHE(mkdirat);
CACHE(linkat);

__attribute__((constructor)) static void begin(void) {
    const char *given = getenv("FILE_RECORDER_ROOT"), *log = getenv("FILE_RECORDER_LOG");
    if (!given || !log || strlen(given) >= sizeof root)
        return;
    strcpy(root, given);
    root_length = strlen(root);
    sink = REAL(open)(log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
}

static int is_inside(const char *path) {
    return sink >= 0 && strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || !path[root_length]);
}

/* The path of an open file; nothing for what is no file below the root. */
static int path_of(int file, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return is_inside(path);
}

/* The absolute path of a name below an open folder. */
static int path_at(int folder, const char *name, char *path) {
    if (*name == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return is_inside(path);
    }
    char base[PATH_MAX];
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base))
            return 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, base, sizeof base - 1);
        if (length < 0)
            return 0;
        base[length] = 0;
    }
    if (snprintf(path, PATH_MAX, "%s/%s", base, name) >= PATH_MAX)
        return 0;
    return is_inside(path);
}

static void put(char kind, const char *path, const void *data, size_t size, uint64_t at) {
    size_t path_length = strlen(path), length = 17 + path_length + size;
    char *record = malloc(length);
    if (!record)
        abort();
    uint32_t lengths[2] = {(uint32_t)path_length, (uint32_t)size};
    record[0] = kind;
    memcpy(record + 1, lengths, 8);
    memcpy(record + 9, &at, 8);
    memcpy(record + 17, path, path_length);
    if (size)
        memcpy(record + 17 + path_length, data, size);
    if (REAL(write)(sink, record, length) != (ssize_t)length)
        abort();
    free(record);
}

static int opened(int folder, const char *name, int flags, mode_t mode) {
    char path[PATH_MAX];
    int changes = sink >= 0 && (flags & (O_CREAT | O_TRUNC)) && (flags & O_TMPFILE) != O_TMPFILE;
    if (!changes || !path_at(folder, name, path))
        return REAL(openat)(folder, name, flags, mode);
    pthread_mutex_lock(&lock);
    int file = REAL(openat)(folder, name, flags, mode);
    int code = errno;
    if (file >= 0 && path_of(file, path)) {
        put(CREATE, path, NULL, 0, 0); /* nothing, where it is there */
        if (flags & O_TRUNC)
            put(TRUNCATE, path, NULL, 0, 0);
    }
    pthread_mutex_unlock(&lock);
    errno = code;
    return file;
}

int openat(int folder, const char *name, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return opened(folder, name, flags, mode);
}

int open(const char *name, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return opened(AT_FDCWD, name, flags, mode);
}

int open64(const char *, int, ...) __attribute__((alias("open")));
int openat64(int, const char *, int, ...) __attribute__((alias("openat")));

static ssize_t written(int file, const void *data, size_t size, off_t at, int is_placed) {
    char path[PATH_MAX];
    if (sink < 0 || !path_of(file, path))
        return is_placed ? REAL(pwrite)(file, data, size, at) : REAL(write)(file, data, size);
    pthread_mutex_lock(&lock);
    if (!is_placed)
        at = fcntl(file, F_GETFL) & O_APPEND ? lseek(file, 0, SEEK_END) : lseek(file, 0, SEEK_CUR);
    ssize_t count = is_placed ? REAL(pwrite)(file, data, size, at) : REAL(write)(file, data, size);
    int code = errno;
    if (count > 0)
        put(WRITE, path, data, (size_t)count, (uint64_t)at);
    pthread_mutex_unlock(&lock);
    errno = code;
    return count;
}

ssize_t write(int file, const void *data, size_t size) {
    return written(file, data, size, 0, 0);
}

ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
    return written(file, data, size, at, 1);
}

ssize_t pwrite64(int, const void *, size_t, off64_t) __attribute__((alias("pwrite")));

ssize_t writev(int file, const struct iovec *parts, int count) {
    char path[PATH_MAX];
    if (sink < 0 || !path_of(file, path))
        return REAL(writev)(file, parts, count);
    ssize_t total = 0;
    for (int part = 0; part < count; part++) {
        ssize_t one = write(file, parts[part].iov_base, parts[part].iov_len);
        if (one < 0)
            return total ? total : one;
        total += one;
    }
    return total;
}

int ftruncate(int file, off_t size) {
    char path[PATH_MAX];
    if (sink < 0 || !path_of(file, path))
        return REAL(ftruncate)(file, size);
    pthread_mutex_lock(&lock);
    int outcome = REAL(ftruncate)(file, size), code = errno;
    if (outcome == 0)
        put(TRUNCATE, path, NULL, 0, (uint64_t)size);
    pthread_mutex_unlock(&lock);
    errno = code;
    return outcome;
}

int ftruncate64(int, off64_t) __attribute__((alias("ftruncate")));

static int synced(int file, int (*sync)(int)) {
    char path[PATH_MAX];
    if (sink < 0 || !path_of(file, path))
        return sync(file);
    pthread_mutex_lock(&lock);
    int outcome = sync(file), code = errno;
    if (outcome == 0)
        put(SYNC, path, NULL, 0, 0);
    pthread_mutex_unlock(&lock);
    errno = code;
    return outcome;
}

int fsync(int file) {
    return synced(file, REAL(fsync));
}

int fdatasync(int file) {
    return synced(file, REAL(fdatasync));
}

/* A change of names: done and written down as one. */
#define NAMED(kind, from, to, call)                                                                                    \
    do {                                                                                                               \
        pthread_mutex_lock(&lock);                                                                                     \
        int outcome = call, code = errno;                                                                              \
        if (outcome == 0)                                                                                              \
            put(kind, from, to, strlen(to), 0);                                                                            \
        pthread_mutex_unlock(&lock);                                                                                   \
        errno = code;                                                                                                  \
        return outcome;                                                                                                \
    } while (0)

int renameat(int from, const char *old, int to, const char *new) {
    char before[PATH_MAX], after[PATH_MAX];
    if (sink < 0 || !path_at(from, old, before) || !path_at(to, new, after))
        return REAL(renameat)(from, old, to, new);
    NAMED(RENAME, before, after, REAL(renameat)(from, old, to, new));
}

int rename(const char *old, const char *new) {
    return renameat(AT_FDCWD, old, AT_FDCWD, new);
}

int linkat(int from, const char *old, int to, const char *new, int flags) {
    char before[PATH_MAX], after[PATH_MAX];
    if (sink < 0 || !path_at(from, old, before) || !path_at(to, new, after))
        return REAL(linkat)(from, old, to, new, flags);
    NAMED(LINK, before, after, REAL(linkat)(from, old, to, new, flags));
}

int link(const char *old, const char *new) {
    return linkat(AT_FDCWD, old, AT_FDCWD, new, 0);
}

int unlinkat(int folder, const char *name, int flags) {
    char path[PATH_MAX];
    if (sink < 0 || !path_at(folder, name, path))
        return REAL(unlinkat)(folder, name, flags);
    NAMED(UNLINK, path, "", REAL(unlinkat)(folder, name, flags));
}

int unlink(const char *name) {
    return unlinkat(AT_FDCWD, name, 0);
}

int rmdir(const char *name) {
    return unlinkat(AT_FDCWD, name, AT_REMOVEDIR);
}

int mkdirat(int folder, const char *name, mode_t mode) {
    char path[PATH_MAX];
    if (sink < 0 || !path_at(folder, name, path))
        return REAL(mkdirat)(folder, name, mode);
    NAMED(MAKE_FOLDER, path, "", REAL(mkdirat)(folder, name, mode));
}

int mkdir(const char *name, mode_t mode) {
    return mkdirat(AT_FDCWD, name, mode);
}
