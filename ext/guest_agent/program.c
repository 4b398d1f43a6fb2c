#define _GNU_SOURCE
#include "program.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <unistd.h>

#include "rlimits.h"
#include "namespaces.h"
#include "user.h"
#include "util.h"

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#define MAX_ENV 8192

void reset_process(void)
{
    struct sigaction action = {.sa_handler = SIG_DFL};
    sigset_t none;
    for (int i = 1; i < 65; i++)
        sigaction(i, &action, NULL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    limit_process();
    umask(022);
    write_file("/proc/self/oom_score_adj", "0");
}

static void fail(struct start_failure *failure, int exit_code, const char *format, ...)
{
    va_list args;
    failure->exit_code = exit_code;
    va_start(args, format);
    vsnprintf(failure->message, sizeof failure->message, format, args);
    va_end(args);
}

static const char *value_of(char *const *env, const char *name)
{
    size_t length = strlen(name);
    for (; env && *env; env++)
        if (strncmp(*env, name, length) == 0 && (*env)[length] == '=')
            return *env + length + 1;
    return NULL;
}

static bool same_name(const char *a, const char *b)
{
    size_t n = strcspn(a, "=");
    return strncmp(a, b, n) == 0 && b[n] == '=';
}

/* Base variables, ours over them, and HOME, HOSTNAME and PATH where neither gives them. */
static char **merge_env(const struct program *program, const struct user *user)
{
    static char *merged[MAX_ENV + 6];
    char *home;
    size_t count = 0;
    for (char *const *e = program->base_env; e && *e && count < MAX_ENV; e++) {
        bool replaced = false;
        for (char *const *o = program->env; o && *o && !replaced; o++)
            replaced = same_name(*e, *o);
        if (!replaced)
            merged[count++] = *e;
    }
    for (char *const *e = program->env; e && *e && count < MAX_ENV; e++)
        merged[count++] = *e;
    merged[count] = NULL;
    char host[65] = "", *hostname;
    gethostname(host, sizeof host - 1);
    bool needs_hostname = !value_of(merged, "HOSTNAME") && asprintf(&hostname, "HOSTNAME=%s", host) >= 0;
    bool needs_home = !value_of(merged, "HOME") && asprintf(&home, "HOME=%s", user->home) >= 0,
         wants_path = !value_of(merged, "PATH");
    bool wants_term = program->tty && !value_of(merged, "TERM");
    bool wants_container = program->is_init && !value_of(merged, "container");
    if (needs_hostname)
        merged[count++] = hostname;
    if (needs_home)
        merged[count++] = home;
    if (wants_path)
        merged[count++] = "PATH=" DEFAULT_PATH;
    if (wants_term)
        merged[count++] = "TERM=xterm";
    if (wants_container)
        merged[count++] = "container=hypeman"; /* systemd then leaves alone what is set up already */
    merged[count] = NULL;
    return merged;
}

static bool enter_cwd(const struct program *program, struct start_failure *failure)
{
    char path[PATH_MAX];
    const char *cwd = program->cwd;
    if (snprintf(path, sizeof path, "%s%s", cwd[0] == '/' ? "" : "/", cwd) >= (int)sizeof path) {
        fail(failure, 126, "working directory: name too long");
        return false;
    }
    if (program->make_cwd && make_dirs(path) < 0) {
        fail(failure, 126, "cannot make working directory %s: %s", path, strerror(errno));
        return false;
    }
    if (chdir(path) < 0) {
        fail(failure, 126, "cannot enter working directory %s: %s", path, strerror(errno));
        return false;
    }
    return true;
}

/* Executes argv[0], through PATH if it has no slash. Returns only on failure. */
static void execute(char *const *argv, char **env, struct start_failure *failure)
{
    const char *name = argv[0], *path = value_of(env, "PATH");
    int denied = 0;
    if (strchr(name, '/')) {
        execve(name, argv, env);
        if (errno == ENOENT && access(name, F_OK) == 0)
            fail(failure, 127, "exec %s: its interpreter or loader is missing", name);
        else
            fail(failure, errno == ENOENT || errno == ENOTDIR ? 127 : 126, "exec %s: %s", name,
                 errno == ENOEXEC ? "exec format error" : strerror(errno));
        return;
    }
    while (*name && path) {
        char candidate[PATH_MAX];
        size_t length = strcspn(path, ":");
        snprintf(candidate, sizeof candidate, "%.*s/%s", (int)length, length ? path : ".", name);
        if (length == 0)
            snprintf(candidate, sizeof candidate, "./%s", name);
        execve(candidate, argv, env);
        if (errno != ENOENT && errno != ENOTDIR)
            denied = errno == EACCES && denied ? denied : errno;
        path = path[length] ? path + length + 1 : NULL;
    }
    if (denied)
        fail(failure, 126, "exec \"%s\": %s", name, denied == ENOEXEC ? "exec format error" : strerror(denied));
    else
        fail(failure, 127, "exec \"%s\": executable file not found in $PATH", name);
}

void exec_program(const struct program *program, struct start_failure *failure)
{
    static struct user user;
    const char *wrong = find_user(program->user, &user);
    if (!program->argv[0]) {
        fail(failure, 127, "no command: the image has no entry point");
    } else if (wrong) {
        fail(failure, 126, "%s", wrong);
    } else if (enter_cwd(program, failure)) {
        char **env = merge_env(program, &user);
        /* Programs reopen /dev/stdout and the like, so these must belong to the program's user. */
        for (int fd = 0; fd < 3 && user.uid != 0; fd++)
            if (fchown(fd, user.uid, (gid_t)-1) < 0)
                continue; /* harmless, as for /dev/null on a read-only file system */
        if (switch_user(&user) < 0)
            fail(failure, 126, "cannot become user %s: %s", program->user, strerror(errno));
        else
            execute(program->argv, env, failure);
    }
}

static int open_terminal(const struct program *program, int *slave)
{
    int master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK), unlock = 0;
    unsigned number;
    char path[32];
    struct winsize size = {.ws_row = program->rows ? program->rows : 24, .ws_col = program->cols ? program->cols : 80};
    if (master < 0)
        return -1;
    *slave = -1;
    if (ioctl(master, TIOCSPTLCK, &unlock) == 0 && ioctl(master, TIOCGPTN, &number) == 0) {
        snprintf(path, sizeof path, "/dev/pts/%u", number);
        *slave = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
    }
    if (*slave < 0) {
        close_fd(&master);
        return -1;
    }
    ioctl(*slave, TIOCSWINSZ, &size);
    return master;
}

struct ends {
    int in[2], out[2], err[2], failure[2];
};

static void close_ends(struct ends *ends)
{
    int *all[] = {ends->in, ends->out, ends->err, ends->failure};
    for (size_t i = 0; i < LENGTH(all); i++) {
        close_fd(&all[i][0]);
        close_fd(&all[i][1]);
    }
}

static bool open_ends(const struct program *program, struct ends *ends)
{
    *ends = (struct ends){{-1, -1}, {-1, -1}, {-1, -1}, {-1, -1}};
    if (pipe2(ends->failure, O_CLOEXEC) < 0)
        return false;
    if (program->tty) {
        ends->out[0] = open_terminal(program, &ends->out[1]);
        if (ends->out[0] < 0 || (ends->in[1] = fcntl(ends->out[0], F_DUPFD_CLOEXEC, 3)) < 0
            || (ends->in[0] = fcntl(ends->out[1], F_DUPFD_CLOEXEC, 3)) < 0)
            return false;
        return (ends->err[1] = fcntl(ends->out[1], F_DUPFD_CLOEXEC, 3)) >= 0;
    }
    if (pipe2(ends->out, O_CLOEXEC) < 0)
        return false;
    if (program->merge_output) {
        ends->in[0] = open("/dev/null", O_RDONLY | O_CLOEXEC);
        ends->err[1] = fcntl(ends->out[1], F_DUPFD_CLOEXEC, 3);
        return ends->in[0] >= 0 && ends->err[1] >= 0;
    }
    return pipe2(ends->in, O_CLOEXEC) == 0 && pipe2(ends->err, O_CLOEXEC) == 0;
}

static _Noreturn void run_child(const struct program *program, struct ends *ends)
{
    static struct start_failure failure;
    reset_process();
    setsid();
    if (dup2(ends->in[0], 0) < 0 || dup2(ends->out[1], 1) < 0 || dup2(ends->err[1], 2) < 0)
        fail(&failure, 126, "standard files: %s", strerror(errno));
    if (program->tty)
        ioctl(0, TIOCSCTTY, 0);
    const char *wrong = program->is_init ? make_init_namespaces() : program->apart ? NULL : join_init_files();
    if (wrong)
        fail(&failure, 126, "%s: %s", wrong, strerror(errno));
    if (!failure.exit_code)
        exec_program(program, &failure);
    write_all(ends->failure[1], &failure, sizeof failure);
    _exit(failure.exit_code);
}

/* Like fork, but the child begins its life in the control group: moving a living process into one makes
 * the kernel wait for all CPUs, which costs some 10 ms. */
static pid_t fork_into(const struct program *program, const char *path)
{
    int cgroup = path ? open(path, O_PATH | O_DIRECTORY | O_CLOEXEC) : -1;
    struct clone_args args = {.exit_signal = SIGCHLD, .flags = program->is_init ? CLONE_NEWPID : 0};
    if (cgroup >= 0) {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = (uint64_t)cgroup;
    }
    pid_t pid = (pid_t)syscall(SYS_clone3, &args, sizeof args);
    if (pid != 0)
        close_fd(&cgroup);
    return pid;
}

int start_program(const struct program *program, struct child *child)
{
    struct ends ends;
    int error = 0;
    pid_t pid = -1;
    bool joined = !program->is_init && !program->apart && join_init_pids();
    if (open_ends(program, &ends)) {
        /* Beside the init, as in a container: systemd cannot move processes from outside of its control groups. */
        const char *beside = joined ? init_cgroup() : NULL;
        pid = beside ? fork_into(program, beside) : -1;
        if (pid < 0)
            pid = fork_into(program, program->cgroup);
    }
    error = errno;
    if (pid == 0)
        run_child(program, &ends);
    if (joined)
        leave_init_pids();
    if (pid > 0 && program->is_init)
        remember_init(pid);
    if (pid < 0) {
        close_ends(&ends);
        errno = error;
        return -1;
    }
    if (program->is_main) {
        dup2(ends.out[1], 1);
        dup2(ends.err[1], 2);
    }
    *child = (struct child){pid, ends.in[1], ends.out[0], ends.err[0], ends.failure[0]};
    ends.in[1] = ends.out[0] = ends.err[0] = ends.failure[0] = -1;
    close_ends(&ends);
    int ours[] = {child->in, child->out, child->err, child->failure};
    for (size_t i = 0; i < LENGTH(ours); i++)
        if (ours[i] >= 0)
            set_nonblocking(ours[i]);
    return 0;
}

/* The session id is the fourth number behind the name in parentheses, which may hold anything. */
static pid_t session_of(const char *pid)
{
    char path[64], text[512];
    int session = -1;
    snprintf(path, sizeof path, "/proc/%.16s/stat", pid);
    if (read_file(path, text, sizeof text) <= 0)
        return -1;
    char *end = strrchr(text, ')');
    if (!end || sscanf(end + 1, " %*c %*d %*d %d", &session) != 1)
        return -1;
    return session;
}

void kill_session(pid_t leader)
{
    kill(-leader, SIGKILL);
    kill(leader, SIGKILL);
    /* Repeat until a pass finds no process, but not endlessly: a program may fork faster than this. */
    for (int pass = 0; pass < 8; pass++) {
        DIR *dir = opendir("/proc");
        bool found = false;
        for (struct dirent *entry; dir && (entry = readdir(dir));) {
            if (entry->d_name[0] < '0' || entry->d_name[0] > '9' || session_of(entry->d_name) != leader)
                continue;
            pid_t pid = atoi(entry->d_name);
            if (pid != leader) {
                found = true;
                kill(pid, SIGKILL);
            }
        }
        if (dir)
            closedir(dir);
        if (!found)
            return;
    }
}
