/* Preloaded into a writer: kills the process at its k-th write to a regular file, before it or half way through.
 * Renaming and removing a file are writes too. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

static long limit, seen;
static int half;

void kill_at_write(long k, int torn) { seen = 0; limit = k; half = torn; }

long writes_seen(void) { return seen; }

static int is_last(int fd) {
    struct stat status;
    if (fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) return 0;
    return ++seen == limit;
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t place) {
    if (is_last(fd)) {
        if (half) syscall(SYS_pwrite64, fd, data, size / 2, place);
        die();
    }
    return syscall(SYS_pwrite64, fd, data, size, place);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off_t place) { return pwrite(fd, data, size, place); }

ssize_t write(int fd, const void *data, size_t size) {
    if (is_last(fd)) {
        if (half) syscall(SYS_write, fd, data, size / 2);
        die();
    }
    return syscall(SYS_write, fd, data, size);
}

int ftruncate(int fd, off_t size) {
    if (is_last(fd)) die();
    return syscall(SYS_ftruncate, fd, size);
}

int rename(const char *from, const char *to) {
    if (++seen == limit) die();
    return syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

int unlinkat(int folder, const char *path, int flags) {
    if (++seen == limit) die();
    return syscall(SYS_unlinkat, folder, path, flags);
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }

int ftruncate64(int fd, off_t size) { return ftruncate(fd, size); }
