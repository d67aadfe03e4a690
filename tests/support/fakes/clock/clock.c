// A machine that a test breaks: LD_PRELOAD this in a process, and in all that it starts.
//
// SMARTPROXY_FAKE_HANG names a file beside which it says what hangs: opening a path that ends in
// what the file says waits for as long as the file is there, as on a file system that is gone.
//
// SMARTPROXY_FAKE_CLOCK names a file; seconds in it are added to what the wall clock
// says. It is read again at every look at the clock, so that a test sets the clock by writing it.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long read_of(const char *variable, char *text, size_t size) {
    const char *path = getenv(variable);
    if (!path) return 0;
    int file = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    long got = syscall(SYS_read, file, text, size - 1);
    syscall(SYS_close, file);
    text[got > 0 ? got : 0] = 0;
    return got;
}

static long added_s(void) {
    char text[32];
    return read_of("SMARTPROXY_FAKE_CLOCK", text, sizeof text) > 0 ? atol(text) : 0;
}

static int hangs(const char *path) {
    char end[256];
    if (!path || read_of("SMARTPROXY_FAKE_HANG", end, sizeof end) <= 0) return 0;
    size_t all = strlen(path), part = strlen(end);
    return all >= part && !strcmp(path + all - part, end);
}

static int open_at_last(int folder, const char *path, int flags, mode_t mode) {
    struct timespec pause = {0, 10 * 1000 * 1000};
    while (hangs(path)) nanosleep(&pause, NULL);
    return syscall(SYS_openat, folder, path, flags, mode);
}

#define OPENS(name)                                                   \
    int name(const char *path, int flags, ...) {                      \
        va_list more;                                                 \
        va_start(more, flags);                                        \
        mode_t mode = va_arg(more, mode_t);                           \
        va_end(more);                                                 \
        return open_at_last(AT_FDCWD, path, flags, mode);             \
    }

OPENS(open)
OPENS(open64)

int clock_gettime(clockid_t clock, struct timespec *at) {
    int failed = syscall(SYS_clock_gettime, clock, at);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        at->tv_sec += added_s();
    return failed;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    (void)zone;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
