#define _GNU_SOURCE
#include "user.h"

#include <errno.h>
#include <grp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_ID 0x7fffffff

/* Whether a text is a number at all, as runc sees it ("+7", "007" and "-1" are), and which. */
static bool number(const char *text, long long *out)
{
    char *end;
    const char *digits = text + (*text == '+' || *text == '-');
    if (*digits < '0' || *digits > '9')
        return false;
    errno = 0;
    *out = strtoll(text, &end, 10);
    return !*end && !errno;
}

static bool in_range(long long id)
{
    return id >= 0 && id <= MAX_ID;
}

/* An id in a file; an empty or missing one is 0, as it is for runc. */
static bool file_id(const char *text, long long *out)
{
    *out = 0;
    return !text || !*text || (number(text, out) && in_range(*out));
}

/* Splits "a:b:c" in place; fields that are not there become NULL. The last one has all that follows. */
static void split(char *line, char **fields, size_t capacity)
{
    size_t length = strlen(line);
    while (length > 0 && strchr(" \t\r\n", line[length - 1]))
        line[--length] = 0;
    line += strspn(line, " \t");
    for (size_t i = 0; i < capacity; i++)
        fields[i] = line ? strsep(&line, ":") : NULL;
}

/* Finds the first passwd line of a name or number and fills in the user. */
static bool look_up_passwd(const char *name, const long long *id, struct user *user)
{
    FILE *file = fopen("/etc/passwd", "re");
    char *line = NULL, *f[7];
    size_t capacity = 0;
    bool found = false;
    while (file && !found && getline(&line, &capacity, file) >= 0) {
        long long uid, gid;
        split(line, f, 7);
        if (!*f[0] || !f[2] || !*f[2] || !file_id(f[2], &uid) || !file_id(f[3], &gid))
            continue;
        if (strcmp(f[0], name) != 0 && !(id && uid == *id))
            continue;
        found = true;
        user->uid = (uid_t)uid;
        user->gid = (gid_t)gid;
        user->name = strdup(f[0]);
        if (f[5] && *f[5])
            user->home = strdup(f[5]);
    }
    free(line);
    if (file)
        fclose(file);
    return found;
}

static bool is_member(char *members, const char *name)
{
    for (char *member; (member = strsep(&members, ","));)
        if (strcmp(member, name) == 0)
            return true;
    return false;
}

/* One walk of /etc/group: the gid of a named or numbered group, or (`wanted` NULL) all groups that list the user. */
static bool walk_groups(const char *wanted, const long long *id, struct user *user)
{
    FILE *file = fopen("/etc/group", "re");
    char *line = NULL, *f[4];
    size_t capacity = 0;
    bool found = false;
    while (file && !found && getline(&line, &capacity, file) >= 0) {
        long long gid;
        split(line, f, 4);
        if (!*f[0] || !f[2] || !*f[2] || !file_id(f[2], &gid))
            continue;
        if (wanted) {
            if (strcmp(f[0], wanted) == 0 || (id && gid == *id)) {
                user->gid = (gid_t)gid;
                found = true;
            }
        } else if (gid != user->gid && user->group_count < MAX_GROUPS && f[3] && is_member(f[3], user->name)) {
            user->groups[user->group_count++] = (gid_t)gid;
        }
    }
    free(line);
    if (file)
        fclose(file);
    return found;
}

static const char *problem(const char *format, const char *name)
{
    static char text[200];
    snprintf(text, sizeof text, format, name);
    return text;
}

const char *find_user(const char *text, struct user *user)
{
    long long id;
    *user = (struct user){.home = "/", .name = ""};
    const char *colon = strchr(text, ':'), *group = colon && colon[1] ? colon + 1 : NULL;
    /* "" and ":55" are root, the latter with another group. */
    char *name = *text && text != colon ? strndup(text, colon ? (size_t)(colon - text) : strlen(text)) : strdup("0");
    if (!name)
        return "no memory for the user";
    bool is_number = number(name, &id);
    if (!look_up_passwd(name, is_number ? &id : NULL, user)) {
        if (!is_number)
            return problem("unable to find user %.100s: no matching entries in passwd file", name);
        if (!in_range(id))
            return problem("user %.100s: uids and gids must be in range 0-2147483647", name);
        user->uid = (uid_t)id;
    }
    free(name);
    if (group) {
        is_number = number(group, &id);
        if (!walk_groups(group, is_number ? &id : NULL, user)) {
            if (!is_number)
                return problem("unable to find group %.100s: no matching entries in group file", group);
            if (!in_range(id))
                return problem("group %.100s: uids and gids must be in range 0-2147483647", group);
            user->gid = (gid_t)id;
        }
    } else if (*user->name) {
        walk_groups(NULL, NULL, user);
    }
    if (user->group_count < MAX_GROUPS)
        user->groups[user->group_count++] = user->gid;
    return NULL;
}

int switch_user(const struct user *user)
{
    if (setgroups(user->group_count, user->groups) < 0 || setgid(user->gid) < 0)
        return -1;
    return setuid(user->uid);
}
