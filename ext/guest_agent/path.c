#define _GNU_SOURCE
#include "path.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "protocol.h"
#include "util.h"

uint8_t file_kind_of(mode_t mode)
{
    return S_ISREG(mode) ? KIND_FILE : S_ISDIR(mode) ? KIND_DIR : S_ISLNK(mode) ? KIND_SYMLINK : KIND_OTHER;
}

int open_inside(int root, const char *path, uint64_t flags, uint64_t mode)
{
    struct open_how how = {
        .flags = flags | O_CLOEXEC, .mode = mode, .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS};
    for (;;) {
        int fd = (int)syscall(SYS_openat2, root, path, &how, sizeof how);
        if (fd >= 0 || errno != EAGAIN) /* EAGAIN: something was renamed during the lookup */
            return fd;
    }
}

static int open_dir(int root, const char *path, bool make)
{
    char partial[PATH_MAX], name[NAME_MAX + 1];
    int fd = open_inside(root, path, O_PATH | O_DIRECTORY, 0);
    if (fd >= 0 || errno != ENOENT || !make)
        return fd;
    /* Make missing directories from the top; each level is opened inside the root again, as symlinks may be on the way.
     * */
    for (size_t i = 1, length = strlen(path); i <= length; i++) {
        if ((path[i] != '/' && path[i] != 0) || path[i - 1] == '/')
            continue;
        memcpy(partial, path, i);
        partial[i] = 0;
        fd = open_inside(root, partial, O_PATH | O_DIRECTORY, 0);
        if (fd < 0 && errno == ENOENT) {
            int parent = open_parent(root, partial, false, name);
            if (parent >= 0 && mkdirat(parent, name, 0755) < 0 && errno != EEXIST) {
                int error = errno;
                close(parent);
                errno = error;
                return -1;
            }
            close_fd(&parent);
            fd = open_inside(root, partial, O_PATH | O_DIRECTORY, 0);
        }
        if (fd < 0)
            return -1;
        if (i < length)
            close_fd(&fd);
    }
    return fd >= 0 ? fd : open_inside(root, path, O_PATH | O_DIRECTORY, 0);
}

int open_parent(int root, const char *path, bool make, char name[NAME_MAX + 1])
{
    char dir[PATH_MAX];
    size_t length = strlen(path);
    errno = ENAMETOOLONG;
    if (length >= sizeof dir)
        return -1;
    while (length > 0 && path[length - 1] == '/')
        length--;
    size_t begin = length;
    while (begin > 0 && path[begin - 1] != '/')
        begin--;
    if (length - begin > NAME_MAX)
        return -1;
    if (length == 0) {
        strcpy(name, ".");
        return open_inside(root, "/", O_PATH | O_DIRECTORY, 0);
    }
    memcpy(name, path + begin, length - begin);
    name[length - begin] = 0;
    if (strcmp(name, "..") == 0) {
        errno = EINVAL;
        return -1;
    }
    memcpy(dir, path, begin);
    dir[begin] = 0;
    return open_dir(root, begin ? dir : "/", make);
}
