/* USER of an image or request, looked up in the guest's own /etc/passwd and /etc/group. */
#ifndef HM_USER_H
#define HM_USER_H

#include <stddef.h>
#include <sys/types.h>

#define MAX_GROUPS 1024

struct user {
    uid_t uid;
    gid_t gid;
    gid_t groups[MAX_GROUPS]; /* gid among them */
    size_t group_count;
    const char *home;
    const char *name; /* empty if the number has no name */
};

/* "", "name", "uid", "name:group", "uid:gid", ":group" in any mixture; "" is root. NULL, or an error message in
 * Docker's words. Allocates, and frees nothing: it runs in the child that becomes the program. */
const char *find_user(const char *text, struct user *user);

/* For a child: sets groups, gid and uid. 0 or -1 with errno. */
int switch_user(const struct user *user);

#endif
