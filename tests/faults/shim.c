/* Fails one system call of a Python process, chosen by its number: fault_arm(1, EIO, "/store", 0) fails the first one
   below /store that the calling thread makes from then on. Preloaded (LD_PRELOAD), it stands before the C library. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static __thread int left, number, fired;
static char below[PATH_MAX], name[64];

void fault_arm(int call, int error, const char *folder)
{
    snprintf(below, sizeof below, "%s", folder);
    number = error, fired = 0, left = call;
}

/* Stop; the name of the call that failed, or an empty one. */
const char *fault_disarm(void)
{
    left = 0;
    return fired ? name : "";
}

static int is_below(int fd, const char *path)
{
    char link[64], folder[PATH_MAX];
    ssize_t size;

    if (path == NULL || path[0] != '/') {
        if (fd == AT_FDCWD)
            snprintf(link, sizeof link, "/proc/self/cwd");
        else
            snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        if ((size = readlink(link, folder, sizeof folder - 1)) < 0)
            return 0;
        folder[size] = 0;
        path = folder;
    }
    return strncmp(path, below, strlen(below)) == 0;
}

static int fails(const char *call, int fd, const char *path)
{
    int before = errno;

    if (left == 0 || !is_below(fd, path) || --left > 0) {
        errno = before;
        return 0;
    }
    snprintf(name, sizeof name, "%s", call);
    fired = 1;
    errno = number;
    return 1;
}

#define CALL(type, call, fd, path, parameters, ...)                                                                  \
    type call parameters                                                                                             \
    {                                                                                                                \
        static type(*real) parameters;                                                                               \
        if (real == NULL)                                                                                            \
            real = (type(*) parameters)dlsym(RTLD_NEXT, #call);                                                      \
        return fails(#call, fd, path) ? (type)FAILURE : real(__VA_ARGS__);                                                \
    }

#define OPEN(call)                                                                                                   \
    int call(const char *path, int flags, ...)                                                                       \
    {                                                                                                                \
        static int (*real)(const char *, int, ...);                                                                  \
        va_list rest;                                                                                                \
        va_start(rest, flags);                                                                                       \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                      \
        va_end(rest);                                                                                                \
        if (real == NULL)                                                                                            \
            real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #call);                                         \
        return fails(#call, AT_FDCWD, path) ? -1 : real(path, flags, mode);                                          \
    }

#define OPENAT(call)                                                                                                 \
    int call(int fd, const char *path, int flags, ...)                                                               \
    {                                                                                                                \
        static int (*real)(int, const char *, int, ...);                                                             \
        va_list rest;                                                                                                \
        va_start(rest, flags);                                                                                       \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                      \
        va_end(rest);                                                                                                \
        if (real == NULL)                                                                                            \
            real = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, #call);                                    \
        return fails(#call, fd, path) ? -1 : real(fd, path, flags, mode);                                            \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
#define FAILURE NULL
CALL(DIR *, opendir, AT_FDCWD, path, (const char *path), path)
CALL(DIR *, fdopendir, fd, NULL, (int fd), fd)
#undef FAILURE
#define FAILURE -1
CALL(int, mkdir, AT_FDCWD, path, (const char *path, mode_t mode), path, mode)
CALL(int, mkdirat, fd, path, (int fd, const char *path, mode_t mode), fd, path, mode)
CALL(int, rename, AT_FDCWD, from, (const char *from, const char *to), from, to)
CALL(int, renameat, fd, from, (int fd, const char *from, int fd2, const char *to), fd, from, fd2, to)
CALL(int, link, AT_FDCWD, from, (const char *from, const char *to), from, to)
CALL(int, linkat, fd, from, (int fd, const char *from, int fd2, const char *to, int flags), fd, from, fd2, to, flags)
CALL(int, symlinkat, fd, to, (const char *from, int fd, const char *to), from, fd, to)
CALL(int, unlink, AT_FDCWD, path, (const char *path), path)
CALL(int, unlinkat, fd, path, (int fd, const char *path, int flags), fd, path, flags)
CALL(int, rmdir, AT_FDCWD, path, (const char *path), path)
CALL(int, chmod, AT_FDCWD, path, (const char *path, mode_t mode), path, mode)
CALL(int, fchmod, fd, NULL, (int fd, mode_t mode), fd, mode)
CALL(int, fchown, fd, NULL, (int fd, uid_t uid, gid_t gid), fd, uid, gid)
CALL(int, fchownat, fd, path, (int fd, const char *path, uid_t uid, gid_t gid, int flags), fd, path, uid, gid, flags)
CALL(int, utimensat, fd, path, (int fd, const char *path, const struct timespec t[2], int flags), fd, path, t, flags)
CALL(int, futimens, fd, NULL, (int fd, const struct timespec times[2]), fd, times)
CALL(int, ftruncate, fd, NULL, (int fd, off_t size), fd, size)
CALL(int, ftruncate64, fd, NULL, (int fd, off64_t size), fd, size)
CALL(int, fsync, fd, NULL, (int fd), fd)
CALL(int, fdatasync, fd, NULL, (int fd), fd)
CALL(int, syncfs, fd, NULL, (int fd), fd)
CALL(ssize_t, read, fd, NULL, (int fd, void *data, size_t size), fd, data, size)
CALL(ssize_t, pread, fd, NULL, (int fd, void *data, size_t size, off_t at), fd, data, size, at)
CALL(ssize_t, pread64, fd, NULL, (int fd, void *data, size_t size, off64_t at), fd, data, size, at)
CALL(ssize_t, write, fd, NULL, (int fd, const void *data, size_t size), fd, data, size)
CALL(ssize_t, pwrite, fd, NULL, (int fd, const void *data, size_t size, off_t at), fd, data, size, at)
CALL(ssize_t, pwrite64, fd, NULL, (int fd, const void *data, size_t size, off64_t at), fd, data, size, at)
CALL(ssize_t, copy_file_range, fd, NULL, (int from, off64_t *at, int fd, off64_t *at2, size_t size, unsigned flags),
     from, at, fd, at2, size, flags)
CALL(ssize_t, sendfile64, fd, NULL, (int fd, int from, off64_t *at, size_t size), fd, from, at, size)
