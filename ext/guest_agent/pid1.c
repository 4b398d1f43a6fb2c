#define _GNU_SOURCE
#include "pid1.h"

#include <ctype.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "util.h"

#define SCRIPT_BYTES 65536
/* Entry scripts that execute entry scripts. */
#define MAX_DEPTH 4
#define MAX_WORD 256
#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static bool is_one_of(const char *name, const char *const *names, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (strcmp(name, names[i]) == 0)
            return true;
    return false;
}

static bool has_init_name(const char *path)
{
    static const char *const names[] = {"init",      "systemd",       "runit",   "runit-init", "openrc-init",
                                        "s6-svscan", "s6-linux-init", "my_init", "upstart"};
    return is_one_of(base_name(path), names, LENGTH(names));
}

/* Where programs are searched for. */
struct search {
    const char *path, *cwd;
};

/* The file that a command leads to; false if there is none. */
static bool find_program(const char *name, const struct search *search, char *found)
{
    const char *path = search->path;
    if (strchr(name, '/'))
        return snprintf(found, PATH_MAX, "%s%s%s", *name == '/' ? "" : search->cwd, *name == '/' ? "" : "/", name)
            < PATH_MAX
            && access(found, F_OK) == 0;
    while (path && *path) {
        size_t length = strcspn(path, ":");
        if (snprintf(found, PATH_MAX, "%.*s/%s", (int)length, path, name) < PATH_MAX && access(found, X_OK) == 0)
            return true;
        path += length + (path[length] == ':');
    }
    return false;
}

/* The text of a script, to be freed; NULL for any other kind of file. */
static char *read_script(const char *path)
{
    struct stat st;
    char *text = malloc(SCRIPT_BYTES);
    if (text && stat(path, &st) == 0 && S_ISREG(st.st_mode) && read_file(path, text, SCRIPT_BYTES) > 2
        && strncmp(text, "#!", 2) == 0)
        return text;
    free(text);
    return NULL;
}

/* The next word of a script, without its quotes; "\n" at the end of a command. NULL at the end of the text. */
static const char *next_word(const char *at, char *word)
{
    size_t length = 0;
    bool any = false;
    while (*at == ' ' || *at == '\t' || (*at == '\\' && at[1] == '\n'))
        at += *at == '\\' ? 2 : 1;
    if (*at == '#')
        at += strcspn(at, "\n");
    if (!*at)
        return NULL;
    if (strchr("\n;&|(){}", *at)) {
        strcpy(word, "\n");
        return at + 1;
    }
    for (char quote = 0; *at && (quote || !strchr(" \t\n;&|()", *at)); at++) {
        any = true;
        if (*at == quote)
            quote = 0;
        else if (!quote && (*at == '"' || *at == '\''))
            quote = *at;
        else if (length < MAX_WORD - 1)
            word[length++] = *at;
    }
    word[length] = 0;
    return any ? at : NULL;
}

static bool is_assignment(const char *word)
{
    size_t name = strspn(word, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz_0123456789");
    return name > 0 && word[name] == '=';
}

static bool leads_to_init(char *const *argv, const struct search *search, int depth);

/* Whether a script that gets `arguments` (or NULL) executes an init. */
static bool script_executes(const char *text, char *const *arguments, const struct search *search, int depth)
{
    char word[MAX_WORD];
    bool after_exec = false, begins = true;
    while ((text = next_word(text, word))) {
        if (strcmp(word, "\n") == 0) {
            after_exec = false;
            begins = true;
            continue;
        }
        if (after_exec && (*word == '-' || strcmp(word, "env") == 0 || is_assignment(word)))
            continue;
        if (after_exec
            && (has_init_name(word) || (*word == '$' && arguments && leads_to_init(arguments, search, depth + 1))))
            return true;
        after_exec = begins && strcmp(word, "exec") == 0;
        begins = begins && is_one_of(word, (const char *const[]){"then", "else", "do", "!"}, 4);
    }
    return false;
}

/* A shell executes the last command of -c, so that `sh -c /sbin/init` is an init as well. */
static bool ends_in_init(const char *text)
{
    char word[MAX_WORD];
    bool begins = true, is_init = false;
    while ((text = next_word(text, word))) {
        bool separator = strcmp(word, "\n") == 0;
        if (begins && !separator)
            is_init = has_init_name(word);
        begins = separator;
    }
    return is_init;
}

static bool is_shell(const char *name)
{
    static const char *const names[] = {"sh", "bash", "dash", "ash", "ksh", "zsh"};
    return is_one_of(base_name(name), names, LENGTH(names));
}

static bool leads_to_init(char *const *argv, const struct search *search, int depth)
{
    char found[PATH_MAX], real[PATH_MAX];
    if (!argv[0] || depth > MAX_DEPTH)
        return false;
    if (has_init_name(argv[0]))
        return true;
    if (is_shell(argv[0]) && argv[1] && *argv[1] == '-' && argv[1][strlen(argv[1]) - 1] == 'c' && argv[2])
        return ends_in_init(argv[2]) || script_executes(argv[2], argv[3] ? argv + 4 : NULL, search, depth);
    if (is_shell(argv[0]) && argv[1] && *argv[1] != '-')
        return leads_to_init(argv + 1, search, depth + 1);
    if (!find_program(argv[0], search, found))
        return false;
    if (realpath(found, real) && has_init_name(real))
        return true;
    char *text = read_script(found);
    bool is_init = text && script_executes(text, argv + 1, search, depth);
    free(text);
    return is_init;
}

bool executes_init(char *const *argv, const char *path, const char *cwd)
{
    struct search search = {path ? path : DEFAULT_PATH, cwd};
    return leads_to_init(argv, &search, 0);
}

bool needs_pid1(const struct boot_config *config)
{
    const char *path = NULL;
    if (config->pid1 != PID1_DETECT)
        return config->pid1 == PID1_WORKLOAD;
    for (char *const *variable = config->env; *variable; variable++)
        if (strncmp(*variable, "PATH=", 5) == 0)
            path = *variable + 5;
    return executes_init(config->argv, path, config->cwd);
}
