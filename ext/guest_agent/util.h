/* Small functions that every other file uses. */
#ifndef HM_UTIL_H
#define HM_UTIL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define LENGTH(array) (sizeof(array) / sizeof *(array))

/* Milliseconds since the kernel started, time spent suspended included. */
int64_t now_ms(void);
void sleep_ms(int ms);

/* Whole buffers, through EINTR; false on any error or early end. For workers and init: they may block. */
bool write_all(int fd, const void *data, size_t length);
bool read_all(int fd, void *data, size_t length);

/* One small file in one go; -1 with errno set on failure. Text that was read ends in NUL, without its last newline. */
int write_file(const char *path, const char *text);
ssize_t read_file(const char *path, char *buffer, size_t capacity);

void set_nonblocking(int fd);
void close_fd(int *fd);

/* mkdir -p of an absolute path, 0755; 0 or -1 with errno. */
int make_dirs(const char *path);

/* A line for the kernel's log (dmesg in the guest). */
void log_line(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
