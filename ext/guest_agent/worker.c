#define _GNU_SOURCE
#include "worker.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "namespaces.h"
#include "util.h"

#define PIPE_BYTES 131072

static const char *root = "/";

void set_worker_root(const char *path)
{
    root = path;
}

int open_worker_root(void)
{
    return open(root, O_PATH | O_DIRECTORY | O_CLOEXEC);
}

int worker_failed(int error, const char *format, ...)
{
    char line[512];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    if (n > (int)sizeof line - 1)
        n = sizeof line - 1;
    if (error)
        n += snprintf(line + n, sizeof line - (size_t)n, ": %s", strerror(error));
    write_all(2, line, strnlen(line, sizeof line));
    return error ? error : EIO;
}

int worker_reply(const struct field_writer *writer)
{
    if (writer->overflow)
        return worker_failed(EOVERFLOW, "reply");
    return write_all(1, writer->buffer, writer->length) ? 0 : EPIPE;
}

int start_worker(worker_function function, bool in_guest, const uint8_t *request, size_t length, struct child *child)
{
    int in[2] = {-1, -1}, out[2] = {-1, -1}, err[2] = {-1, -1};
    pid_t pid = -1;
    bool joined = in_guest && join_init_pids(); /* or the init's /proc would not show us */
    if (pipe2(in, O_CLOEXEC) == 0 && pipe2(out, O_CLOEXEC) == 0 && pipe2(err, O_CLOEXEC) == 0)
        pid = fork();
    int error = errno;
    if (pid == 0) {
        reset_process();
        dup2(in[0], 0);
        dup2(out[1], 1);
        dup2(err[1], 2);
        const char *failure = in_guest ? join_init_files() : NULL;
        /* Copies of other sessions' pipes would keep these open. */
        syscall(SYS_close_range, 3, ~0U, 0);
        umask(0);
        if (failure)
            _exit(worker_failed(errno, "%s", failure));
        struct field_reader reader = read_fields(request, length);
        _exit(function(&reader) & 0xff);
    }
    if (joined)
        leave_init_pids();
    close_fd(&in[0]);
    close_fd(&out[1]);
    close_fd(&err[1]);
    if (pid < 0) {
        close_fd(&in[1]);
        close_fd(&out[0]);
        close_fd(&err[0]);
        errno = error;
        return -1;
    }
    fcntl(in[1], F_SETPIPE_SZ, PIPE_BYTES);
    fcntl(out[0], F_SETPIPE_SZ, PIPE_BYTES);
    set_nonblocking(in[1]);
    set_nonblocking(out[0]);
    set_nonblocking(err[0]);
    *child = (struct child){pid, in[1], out[0], err[0], -1};
    return 0;
}
