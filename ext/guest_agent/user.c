#define _GNU_SOURCE
#include "user.h"

#include <errno.h>
#include <grp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static bool number(const char *text, unsigned *out) {
    char *end;
    if (*text < '0' || *text > '9')
        return false;
    errno = 0;
    unsigned long value = strtoul(text, &end, 10);
    if (*end || errno || value > 0x7fffffff)
        return false;
    *out = (unsigned)value;
    return true;
}

/* Splits "a:b:c" in place; returns how many fields there are. */
static size_t split(char *line, char **fields, size_t capacity) {
    size_t count = 0;
    line[strcspn(line, "\n")] = 0;
    while (line && count < capacity)
        fields[count++] = strsep(&line, ":");
    return count;
}

/* Finds the passwd line of a name or number and fills in the user. */
static bool look_up_passwd(const char *name, bool is_number, unsigned uid, struct user *user) {
    FILE *file = fopen("/etc/passwd", "re");
    char *line = NULL, *f[7];
    size_t capacity = 0;
    bool found = false;
    while (file && !found && getline(&line, &capacity, file) >= 0) {
        unsigned its_uid, its_gid;
        if (split(line, f, 7) < 6 || !number(f[2], &its_uid) || !number(f[3], &its_gid))
            continue;
        if (strcmp(f[0], name) != 0 && !(is_number && its_uid == uid))
            continue;
        found = true;
        user->uid = its_uid;
        user->gid = its_gid;
        snprintf(user->name, sizeof user->name, "%s", f[0]);
        if (*f[5])
            snprintf(user->home, sizeof user->home, "%s", f[5]);
    }
    free(line);
    if (file)
        fclose(file);
    return found;
}

static bool is_member(char *members, const char *name) {
    for (char *member; (member = strsep(&members, ","));)
        if (strcmp(member, name) == 0)
            return true;
    return false;
}

/* One walk of /etc/group: the gid of a named group, or all groups that list the user. */
static bool walk_groups(const char *wanted, struct user *user) {
    FILE *file = fopen("/etc/group", "re");
    char *line = NULL, *f[4];
    size_t capacity = 0;
    bool found = false;
    while (file && !found && getline(&line, &capacity, file) >= 0) {
        unsigned gid;
        if (split(line, f, 4) < 3 || !number(f[2], &gid))
            continue;
        if (wanted) {
            if (strcmp(f[0], wanted) == 0) {
                user->gid = gid;
                found = true;
            }
        } else if (gid != user->gid && user->group_count < MAX_GROUPS && f[3] && is_member(f[3], user->name)) {
            user->groups[user->group_count++] = gid;
        }
    }
    free(line);
    if (file)
        fclose(file);
    return found;
}

const char *find_user(const char *text, struct user *user) {
    static char problem[200];
    char name[128];
    unsigned value;
    *user = (struct user){.home = "/"};
    /* ":55" is root with another group. */
    snprintf(name, sizeof name, "%s%s", *text && *text != ':' ? "" : "0", text);
    char *group = strchr(name, ':');
    if (group)
        *group++ = 0;
    bool is_number = number(name, &value);
    if (!look_up_passwd(name, is_number, value, user)) {
        if (!is_number) {
            snprintf(problem, sizeof problem, "unable to find user %s: no matching entries in passwd file", name);
            return problem;
        }
        user->uid = value;
        if (value == 0)
            snprintf(user->home, sizeof user->home, "/root");
    }
    if (group && *group) {
        if (number(group, &value)) {
            user->gid = value;
        } else if (!walk_groups(group, user)) {
            snprintf(problem, sizeof problem, "unable to find group %s: no matching entries in group file", group);
            return problem;
        }
    } else if (*user->name) {
        walk_groups(NULL, user);
    }
    if (user->group_count < MAX_GROUPS)
        user->groups[user->group_count++] = user->gid;
    return NULL;
}

int become_user(const struct user *user) {
    if (setgroups(user->group_count, user->groups) < 0 || setgid(user->gid) < 0)
        return -1;
    return setuid(user->uid);
}
