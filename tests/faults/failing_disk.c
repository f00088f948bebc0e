/* Failing disk, for LD_PRELOAD: counts the file operations below a folder and fails the n-th.
 *
 *   DISK_FOLDER  the folder; without it, nothing happens
 *   DISK_AT      number of the operation, from 1; 0 only counts
 *   DISK_HOW     an errno; "short" writes half; "kill" is a kill -9 before the operation
 *   DISK_FROM    set: all later operations fail, too, except remove and rename, which work on
 *                a full disk
 *   DISK_LOG     file elsewhere that gets a line for each operation
 *
 * Read at each operation, so that a forked child can choose for itself.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OK, FAIL, SHORT };

static atomic_int count;

static void absolute(int folder, const char *path, char *out) {
    char base[PATH_MAX] = "";
    if (path && path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return;
    }
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) base[0] = 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t size = readlink(link, base, sizeof base - 1);
        base[size < 0 ? 0 : size] = 0;
    }
    if (path) snprintf(out, PATH_MAX, "%.2000s/%.2000s", base, path);
    else snprintf(out, PATH_MAX, "%s", base);
}

/* Outcome of an operation. `removes`: it needs no space. */
static int outcome(const char *operation, int folder, const char *path, int removes) {
    const char *watched = getenv("DISK_FOLDER"), *how = getenv("DISK_HOW"), *at = getenv("DISK_AT"), *log = getenv("DISK_LOG");
    if (!watched || !*watched) return OK;
    int before = errno;
    char where[PATH_MAX];
    absolute(folder, path, where);
    size_t size = strlen(watched);
    if (strncmp(where, watched, size) || (where[size] && where[size] != '/')) {
        errno = before;
        return OK;
    }
    int number = atomic_fetch_add(&count, 1) + 1, wanted = at ? atoi(at) : 0;
    if (log) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%d %s %s\n", number, operation, where);
        int handle = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
        if (handle >= 0) {
            syscall(SYS_write, handle, line, (size_t)length);
            syscall(SYS_close, handle);
        }
    }
    errno = before;
    if (!wanted || !how || number < wanted || (number > wanted && (!getenv("DISK_FROM") || removes))) return OK;
    if (!strcmp(how, "kill")) kill(getpid(), SIGKILL);
    if (!strcmp(how, "short")) return SHORT;
    errno = atoi(how);
    return FAIL;
}

#define REAL(name) ((__typeof__(&name))real(&real_##name, #name))

static void *real(void **kept, const char *name) {
    if (!*kept) *kept = dlsym(RTLD_NEXT, name);
    return *kept;
}

#define OPEN(name)                                                                                   \
    static void *real_##name;                                                                        \
    int name(const char *path, int flags, ...) {                                                     \
        va_list rest;                                                                                \
        va_start(rest, flags);                                                                       \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                      \
        va_end(rest);                                                                                \
        if (flags & (O_WRONLY | O_RDWR | O_CREAT) && outcome("open", AT_FDCWD, path, 0) == FAIL) return -1; \
        return REAL(name)(path, flags, mode);                                                        \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                 \
    static void *real_##name;                                                                        \
    int name(int folder, const char *path, int flags, ...) {                                         \
        va_list rest;                                                                                \
        va_start(rest, flags);                                                                       \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                      \
        va_end(rest);                                                                                \
        if (flags & (O_WRONLY | O_RDWR | O_CREAT) && outcome("open", folder, path, 0) == FAIL) return -1; \
        return REAL(name)(folder, path, flags, mode);                                                \
    }
OPENAT(openat)
OPENAT(openat64)

static void *real_write;
ssize_t write(int handle, const void *content, size_t size) {
    int found = handle > 2 ? outcome("write", handle, NULL, 0) : OK;
    if (found == FAIL) return -1;
    return REAL(write)(handle, content, found == SHORT && size > 1 ? size / 2 : size);
}

static void *real_pwrite64;
ssize_t pwrite64(int handle, const void *content, size_t size, off64_t where) {
    int found = outcome("write", handle, NULL, 0);
    if (found == FAIL) return -1;
    return REAL(pwrite64)(handle, content, found == SHORT && size > 1 ? size / 2 : size, where);
}

static void *real_writev;
ssize_t writev(int handle, const struct iovec *parts, int number) {
    int found = outcome("write", handle, NULL, 0);
    if (found == FAIL) return -1;
    return REAL(writev)(handle, parts, found == SHORT ? 1 : number);
}

#define BY_HANDLE(name, parameters, arguments)                                                       \
    static void *real_##name;                                                                        \
    int name parameters {                                                                            \
        if (outcome(#name, handle, NULL, 0) == FAIL) return -1;                                        \
        return REAL(name) arguments;                                                                 \
    }
BY_HANDLE(fsync, (int handle), (handle))
BY_HANDLE(fdatasync, (int handle), (handle))
BY_HANDLE(ftruncate64, (int handle, off64_t size), (handle, size))

#define BY_PATH(name, parameters, arguments, folder, removes)                                        \
    static void *real_##name;                                                                        \
    int name parameters {                                                                            \
        if (outcome(#name, folder, path, removes) == FAIL) return -1;                                  \
        return REAL(name) arguments;                                                                 \
    }
BY_PATH(mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, 0)
BY_PATH(rename, (const char *from, const char *path), (from, path), AT_FDCWD, 1)
BY_PATH(symlink, (const char *from, const char *path), (from, path), AT_FDCWD, 0)
BY_PATH(link, (const char *from, const char *path), (from, path), AT_FDCWD, 0)
BY_PATH(unlink, (const char *path), (path), AT_FDCWD, 1)
BY_PATH(rmdir, (const char *path), (path), AT_FDCWD, 1)
BY_PATH(unlinkat, (int folder, const char *path, int flags), (folder, path, flags), folder, 1)
