#define _GNU_SOURCE
#include "workload.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "clock.h"
#include "events.h"
#include "pid1.h"
#include "port.h"
#include "program.h"
#include "util.h"

#define PUMP_BYTES 65536
#define CONTROLLERS "/sys/fs/cgroup/cgroup.subtree_control"

static struct child child = {0, -1, -1, -1, -1};
static bool running, ended, is_init, idles;
/* How long a host that does not set the clock can delay the program. */
#define CLOCK_WAIT_MS 3000
static const struct boot_config *held; /* what is to be started */
static int64_t hold_until;
static int console = -1;
/* Output of the program that the console has not taken yet. A slow console slows the program, no more. */
static uint8_t pump[PUMP_BYTES];
static size_t pump_begin, pump_end;

static void set_raw(int fd)
{
    struct termios settings;
    if (fd >= 0 && tcgetattr(fd, &settings) == 0) {
        settings.c_oflag &= ~(tcflag_t)OPOST;
        tcsetattr(fd, TCSANOW, &settings);
    }
}

/* The log has a port of its own where the VMM has one: a serial line costs an exit from the guest for each byte (0.3
 * MB/s without KVM on a busy host, where the port did 2.6). Otherwise it is the console, raw, so that a line feed stays
 * a line feed and the log holds exactly what was printed. */
void console_open(const char *path)
{
    if (!*path)
        console = open_port(LOG_PORT_NAME, O_WRONLY);
    if (console < 0)
        console = open(*path ? path : "/dev/console", O_WRONLY | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    set_raw(console);
    /* What programs write there is in the same log. */
    int other = open("/dev/console", O_WRONLY | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    set_raw(other);
    close_fd(&other);
}

void workload_prepare(const struct boot_config *config)
{
    console_open(config->console);
    write_file(CONTROLLERS, "+memory"); /* shows whether lack of memory ended it */
    is_init = !config->idle && needs_pid1(config);
    if (is_init) {
        /* An init divides what it is given; one by one, as the kernel may lack a controller. */
        write_file(CONTROLLERS, "+cpu");
        write_file(CONTROLLERS, "+pids");
        write_file(CONTROLLERS, "+io");
        write_file(CONTROLLERS, "+cpuset");
        write_file(CONTROLLERS, "+hugetlb");
    }
    mkdir(WORKLOAD_CGROUP, 0755);
    mkdir(EXEC_CGROUP, 0755);
}

static void report_ready(void)
{
    uint8_t buffer[512];
    struct field_writer ready = {buffer, sizeof buffer, 0, false};
    phase_done("ready");
    put_phases(&ready);
    event_happened(EVENT_READY, &ready);
}

static void end_unstarted(const char *message)
{
    uint8_t buffer[1000]; /* what an event takes; a message has up to 511 bytes */
    struct field_writer writer = {buffer, sizeof buffer, 0, false};
    put_text_field(&writer, TAG_MESSAGE, message);
    event_happened(EVENT_FATAL, &writer);
    ended = true;
    console_print(message);
}

void workload_fatal(const char *message)
{
    report_ready();
    end_unstarted(message);
}

/* Runs in place of the program in an idle instance: it only waits, and ends by the stop signal. */
static bool start_idler(void)
{
    pid_t pid = fork();
    if (pid == 0) {
        sigset_t none;
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* in tests the agent may end without its machine */
        sigemptyset(&none);
        for (int number = 1; number < SIGRTMIN; number++)
            signal(number, SIG_DFL);
        sigprocmask(SIG_SETMASK, &none, NULL);
        for (;;)
            pause();
    }
    child = (struct child){pid, -1, -1, -1, -1};
    idles = pid > 0;
    return idles;
}

bool workload_idles(void)
{
    return running && idles;
}

void workload_adopt(pid_t pid)
{
    kill(child.pid, SIGKILL);
    child.pid = pid;
    idles = false;
}

size_t workload_room(void)
{
    return sizeof pump - pump_end;
}

void workload_print(const uint8_t *data, size_t length)
{
    memcpy(pump + pump_end, data, length);
    pump_end += length;
}

static void start(const struct boot_config *config)
{
    struct program program = {.argv = config->argv,
                              .env = config->env,
                              .cwd = config->cwd,
                              .make_cwd = true,
                              .user = config->user,
                              .merge_output = true,
                              .cgroup = WORKLOAD_CGROUP,
                              .is_main = true,
                              .is_init = is_init};
    char message[128];
    if (config->idle ? start_idler() : start_program(&program, &child) == 0) {
        running = true;
        if (config->idle)
            event_happened(EVENT_STARTED, NULL);
        return;
    }
    snprintf(message, sizeof message, "cannot start a process: %s", strerror(errno));
    end_unstarted(message);
}

void workload_hold(const struct boot_config *config)
{
    held = config;
    hold_until = now_ms() + CLOCK_WAIT_MS;
}

static void release(void)
{
    const struct boot_config *config = held;
    held = NULL;
    phase_done("clock");
    start(config);
    report_ready();
}

int workload_step(void)
{
    if (!held)
        return -1;
    int64_t left = hold_until - now_ms();
    if (!clock_was_set() && left > 0)
        return (int)left;
    release();
    return -1;
}

bool workload_running(void)
{
    return running;
}
bool workload_ended(void)
{
    return ended;
}

void workload_signal(int signal)
{
    if (running)
        kill(child.pid, signal);
}

/* systemd re-executes itself on SIGTERM; SIGRTMIN+3 (as glibc counts) halts it, which container managers send, too.
 * Others, and images that name a signal, get theirs. */
#define SYSTEMD_HALT 37

void workload_stop(int signal)
{
    char name[32] = "", path[40];
    if (held)
        release();
    snprintf(path, sizeof path, "/proc/%d/comm", child.pid);
    if (running && is_init && signal == SIGTERM && read_file(path, name, sizeof name) > 0
        && strcmp(name, "systemd") == 0)
        signal = SYSTEMD_HALT;
    workload_signal(signal);
}

static unsigned oom_kills(void)
{
    char text[512];
    unsigned count = 0;
    if (read_file(WORKLOAD_CGROUP "/memory.events", text, sizeof text) > 0) {
        char *at = strstr(text, "\noom_kill ");
        if (at)
            sscanf(at, " oom_kill %u", &count);
    }
    return count;
}

bool workload_reap(pid_t pid, int status)
{
    struct start_failure failure;
    uint8_t buffer[512];
    struct field_writer writer = {buffer, sizeof buffer, 0, false};
    if (!running || pid != child.pid)
        return false;
    running = false;
    ended = true;
    bool never_ran = child.failure >= 0 && read(child.failure, &failure, sizeof failure) == sizeof failure;
    close_fd(&child.failure);
    if (never_ran) {
        end_unstarted(failure.message);
        put_u32_field(&writer, TAG_EXIT_CODE, (uint32_t)failure.exit_code);
    } else {
        int signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
        /* How the kernel reports that an init powered its namespace off, or rebooted it. */
        if (is_init && (signal == SIGINT || signal == SIGHUP))
            signal = status = 0;
        int code = signal ? 128 + signal : WEXITSTATUS(status);
        event_happened(EVENT_STARTED, NULL); /* it may have ended before its start was reported */
        put_u32_field(&writer, TAG_EXIT_CODE, (uint32_t)code);
        put_u32_field(&writer, TAG_SIGNAL, (uint32_t)signal);
        put_u8_field(&writer, TAG_OOM, code == 128 + SIGKILL && oom_kills() > 0);
    }
    event_happened(EVENT_EXITED, &writer);
    return true;
}

size_t workload_poll(struct pollfd *fds, size_t count)
{
    if (child.failure >= 0 && running)
        fds[count++] = (struct pollfd){child.failure, POLLIN, 0};
    if (child.out >= 0 && pump_end < sizeof pump)
        fds[count++] = (struct pollfd){child.out, POLLIN, 0};
    if (pump_begin < pump_end)
        fds[count++] = (struct pollfd){console, POLLOUT, 0};
    return count;
}

/* The failure pipe closes without data when the program is executed. */
static bool ended_empty(int fd)
{
    struct pollfd poller = {fd, POLLIN, 0};
    int waiting = 0;
    poll(&poller, 1, 0);
    return (poller.revents & POLLHUP) && ioctl(fd, FIONREAD, &waiting) == 0 && waiting == 0;
}

void workload_io(void)
{
    if (running && child.failure >= 0 && ended_empty(child.failure)) {
        close_fd(&child.failure);
        event_happened(EVENT_STARTED, NULL);
    }
    if (child.out >= 0 && pump_end < sizeof pump) {
        ssize_t n = read(child.out, pump + pump_end, sizeof pump - pump_end);
        if (n > 0)
            pump_end += (size_t)n;
        else if (n == 0 || (errno == EAGAIN && !running))
            close_fd(&child.out);
    }
    while (pump_begin < pump_end) {
        size_t waiting = pump_end - pump_begin;
        ssize_t n = console >= 0 ? write(console, pump + pump_begin, waiting) : (ssize_t)waiting;
        if (n < 0 && errno == EAGAIN)
            return;
        if (n < 0 && errno == EINTR)
            continue;
        pump_begin = n < 0 ? pump_end : pump_begin + (size_t)n;
    }
    pump_begin = pump_end = 0;
}

bool workload_drained(void)
{
    return child.out < 0 && pump_begin == pump_end;
}

void console_print(const char *line)
{
    char text[600];
    if (console < 0)
        console_open("");
    int n = snprintf(text, sizeof text, "hypeman: %s\n", line);
    if (console >= 0 && write(console, text, (size_t)n < sizeof text ? (size_t)n : sizeof text - 1) < 0)
        errno = 0; /* best effort */
}
