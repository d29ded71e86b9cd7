/* Preloaded into wineserver: NTFS refuses to rename a folder while anything below it is open, which Wine allows.
   The server has a descriptor for every file that a program of its prefix has open, so its own table tells. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int is_below(const char *folder, int fd) {
    char link[64], path[PATH_MAX];
    struct stat there, here;
    size_t length = strlen(folder);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t got = readlink(link, path, sizeof path - 1);
    if (got <= (ssize_t)length) return 0;
    path[got] = 0;
    if (strncmp(path, folder, length) || path[length] != '/') return 0;
    /* Removed, but not closed yet: "… (deleted)", and nothing of NTFS's. */
    return !fstat(fd, &here) && !stat(path, &there) && here.st_ino == there.st_ino;
}

static int has_open_files(const char *path) {
    char folder[PATH_MAX];
    struct stat status;
    struct dirent *entry;
    int found = 0;
    if (lstat(path, &status) || !S_ISDIR(status.st_mode) || !realpath(path, folder)) return 0;
    DIR *table = opendir("/proc/self/fd");
    while (table && !found && (entry = readdir(table))) found = is_below(folder, atoi(entry->d_name));
    if (table) closedir(table);
    return found;
}

int rename(const char *from, const char *to) {
    static int (*real)(const char *, const char *);
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, "rename");
    if (has_open_files(from)) {
        errno = EACCES;
        return -1;
    }
    return real(from, to);
}
