#define _GNU_SOURCE
#include "util.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void sleep_ms(int ms)
{
    struct timespec duration = {ms / 1000, (long)(ms % 1000) * 1000000};
    nanosleep(&duration, NULL);
}

bool write_all(int fd, const void *data, size_t length)
{
    const char *at = data;
    while (length > 0) {
        ssize_t n = write(fd, at, length);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        at += n;
        length -= (size_t)n;
    }
    return true;
}

bool read_all(int fd, void *data, size_t length)
{
    char *at = data;
    while (length > 0) {
        ssize_t n = read(fd, at, length);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        at += n;
        length -= (size_t)n;
    }
    return true;
}

int write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOCTTY, 0644);
    if (fd < 0)
        return -1;
    bool good = write_all(fd, text, strlen(text));
    int error = errno;
    close(fd);
    errno = error;
    return good ? 0 : -1;
}

ssize_t read_file(const char *path, char *buffer, size_t capacity)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    size_t length = 0;
    ssize_t n;
    while (length < capacity - 1 && (n = read(fd, buffer + length, capacity - 1 - length)) != 0) {
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            break;
        length += (size_t)n;
    }
    close(fd);
    if (length > 0 && buffer[length - 1] == '\n')
        length--;
    buffer[length] = 0;
    return (ssize_t)length;
}

void set_nonblocking(int fd)
{
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

int make_dirs(const char *path)
{
    char partial[PATH_MAX];
    size_t length = strlen(path);
    if (length >= sizeof partial) {
        errno = ENAMETOOLONG;
        return -1;
    }
    for (size_t i = 1; i <= length; i++) {
        if (path[i] != '/' && path[i] != 0)
            continue;
        memcpy(partial, path, i);
        partial[i] = 0;
        if (mkdir(partial, 0755) < 0 && errno != EEXIST)
            return -1;
    }
    struct stat st;
    if (stat(path, &st) < 0)
        return -1;
    errno = ENOTDIR;
    return S_ISDIR(st.st_mode) ? 0 : -1;
}

void log_line(const char *format, ...)
{
    char line[512];
    va_list args;
    va_start(args, format);
    int length = snprintf(line, sizeof line, "<6>hypeman: ");
    length += vsnprintf(line + length, sizeof line - (size_t)length, format, args);
    va_end(args);
    int fd = open("/dev/kmsg", O_WRONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return;
    if (write(fd, line, (size_t)length < sizeof line ? (size_t)length : sizeof line - 1) < 0)
        errno = 0; /* best effort */
    close(fd);
}
