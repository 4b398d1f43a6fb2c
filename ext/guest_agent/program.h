/* Starts programs of the guest: the main process and what exec asks for. */
#ifndef HM_PROGRAM_H
#define HM_PROGRAM_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

struct program {
    char *const *argv;
    char *const *env;      /* wins over base_env */
    char *const *base_env; /* may be NULL */
    const char *cwd;       /* "" is "/" */
    bool make_cwd;         /* a missing working directory is made, as for an image's WORKDIR */
    const char *user;      /* as find_user takes it */
    bool tty;
    uint16_t rows, cols; /* 0: 24 by 80 */
    bool merge_output;   /* one pipe for both outputs; no standard input */
    const char *cgroup;  /* directory, or NULL */
    bool is_main;        /* its output is also ours: what is written to /proc/1/fd/1 is in the log */
    bool apart;          /* stays in our control group and namespaces, which no freeze stops */
    bool is_init;        /* becomes process 1 of namespaces of its own, see namespaces.h */
};

struct child {
    pid_t pid;
    int in, out, err; /* our ends, non-blocking; -1 where there is none; with a terminal, in and out are one */
    int failure;      /* a pipe: closed without data if the program was executed, else a struct start_failure */
};

/* Why a child could not become the program; exit codes as of a shell: 127 not found, 126 not executable. */
struct start_failure {
    int32_t exit_code;
    char message[252];
};

/* Forks. 0, or -1 with errno if that failed. */
int start_program(const struct program *program, struct child *child);

/* Replaces this process by the program. Returns only on failure, which it fills in. */
void exec_program(const struct program *program, struct start_failure *failure);

/* Kills all processes of the session that `leader` began, also those in groups of their own. */
void kill_session(pid_t leader);

/* In a fresh child: default signals, nothing blocked, ordinary limits, no protection from the OOM killer. */
void reset_process(void);

#endif
