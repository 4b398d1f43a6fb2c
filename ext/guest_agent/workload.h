/* The main process: started once, its output copied to the console, its end reported. */
#ifndef HM_WORKLOAD_H
#define HM_WORKLOAD_H

#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "boot_config.h"

#define WORKLOAD_CGROUP "/sys/fs/cgroup/hypeman.workload"
#define EXEC_CGROUP "/sys/fs/cgroup/hypeman.exec"
#define WORKLOAD_POLL_FDS 3

/* Makes the control groups and opens the console. */
void workload_prepare(const struct boot_config *config);
/* Starts the image's program once the host has set the clock, or after a time limit. */
void workload_hold(const struct boot_config *config);
/* Starts the held program when due; an error becomes EVENT_FATAL. Milliseconds until the next call, -1 for none. */
int workload_step(void);
/* There will be no main process: EVENT_FATAL, and a line on the console. */
void workload_fatal(const char *message);
bool workload_running(void);
/* Nothing runs yet in an instance that was made to wait for its program. */
bool workload_idles(void);
/* What it waited for: from now on this process, which a session has started, is the main one. */
void workload_adopt(pid_t pid);
/* Bytes that workload_print takes. */
size_t workload_room(void);
/* Output of the adopted program, for the log. */
void workload_print(const uint8_t *data, size_t length);
/* It has ended, or could not begin. */
bool workload_ended(void);
/* Sends a signal to it. */
void workload_signal(int signal);
/* Asks it to end, with this signal or the one that its kind of init takes. */
void workload_stop(int signal);
/* True if the pid was its; its end becomes EVENT_EXITED. */
bool workload_reap(pid_t pid, int status);
/* All that it printed is on the console. */
bool workload_drained(void);

size_t workload_poll(struct pollfd *fds, size_t count);
void workload_io(void);
/* Opens the log: `path`, or the machine's own if it is empty. */
void console_open(const char *path);
/* A line on the console, before the end. */
void console_print(const char *line);

#endif
