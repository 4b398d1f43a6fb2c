#define _GNU_SOURCE
#include "populate.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/limits.h>
#include <stdbool.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

/* Exists while a volume is being filled: what is beside it is incomplete and is removed before the next attempt. */
#define MARKER ".hypeman-populating"
/* Each level of directories holds four descriptors open. */
#define MAX_DEPTH 256
#define CHUNK (1 << 20)

typedef int visit_entry(int directory, const char *name, void *context);

/* Calls `visit` for each entry of a directory until one fails; 0, or -1 with errno. */
static int for_each_entry(int directory, visit_entry *visit, void *context)
{
    int fd = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *stream = fd < 0 ? NULL : fdopendir(fd);
    if (!stream) {
        if (fd >= 0)
            close(fd);
        return -1;
    }
    int result = 0;
    struct dirent *entry;
    while (result == 0 && (errno = 0, entry = readdir(stream)))
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            result = visit(directory, entry->d_name, context);
    int error = result < 0 ? errno : entry ? 0 : errno;
    closedir(stream);
    errno = error;
    return error ? -1 : 0;
}

static int note_entry(int directory, const char *name, void *context)
{
    (void)directory;
    (void)name;
    *(bool *)context = true;
    return 0;
}

static int remove_entry(int directory, const char *name, void *context)
{
    if (strcmp(name, MARKER) == 0 && context)
        return 0;
    if (unlinkat(directory, name, 0) == 0)
        return 0;
    if (errno != EISDIR && errno != EPERM)
        return -1;
    int inside = openat(directory, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (inside < 0)
        return -1;
    int result = for_each_entry(inside, remove_entry, NULL);
    close(inside);
    return result < 0 ? -1 : unlinkat(directory, name, AT_REMOVEDIR);
}

static int copy_xattrs(int from, int to)
{
    char names[XATTR_LIST_MAX], value[XATTR_SIZE_MAX];
    ssize_t length = flistxattr(from, names, sizeof names);
    if (length < 0)
        return errno == ENOTSUP ? 0 : -1;
    for (char *name = names; name < names + length; name += strlen(name) + 1) {
        ssize_t size = fgetxattr(from, name, value, sizeof value);
        if (size < 0 || (fsetxattr(to, name, value, (size_t)size, 0) < 0 && errno != ENOTSUP))
            return -1;
    }
    return 0;
}

/* Owner first: a change of owner clears the set-user-ID bit. */
static int copy_attributes(int from, int to, const struct stat *st)
{
    const struct timespec times[] = {st->st_atim, st->st_mtim};
    if (fchown(to, st->st_uid, st->st_gid) < 0 || fchmod(to, st->st_mode & 07777) < 0 || copy_xattrs(from, to) < 0)
        return -1;
    return futimens(to, times);
}

int copy_directory_attributes(int from, int to)
{
    struct stat st;
    return fstat(from, &st) < 0 ? -1 : copy_attributes(from, to, &st);
}

int is_directory_empty(int directory)
{
    bool has_content = false;
    if (for_each_entry(directory, note_entry, &has_content) < 0)
        return -1;
    return !has_content;
}

static int copy_data(int from, int to)
{
    ssize_t n;
    while ((n = sendfile(to, from, NULL, CHUNK)) > 0 || (n < 0 && errno == EINTR))
        ;
    return n < 0 ? -1 : 0;
}

struct copy {
    int to, depth;
};

static int copy_entry(int directory, const char *name, void *context);

static int copy_directory(int from, int to, int depth)
{
    struct copy copy = {to, depth};
    if (depth > MAX_DEPTH) {
        errno = ELOOP;
        return -1;
    }
    return for_each_entry(from, copy_entry, &copy);
}

/* A file or directory, whose descriptors carry its attributes. A file with several names becomes several files. */
static int copy_opened(int directory, const char *name, const struct stat *st, const struct copy *copy)
{
    bool is_directory = S_ISDIR(st->st_mode);
    int flags = O_NOFOLLOW | O_CLOEXEC;
    if (is_directory && mkdirat(copy->to, name, 0700) < 0)
        return -1;
    int from = openat(directory, name, flags | O_RDONLY);
    int to = is_directory ? openat(copy->to, name, flags | O_RDONLY | O_DIRECTORY)
                          : openat(copy->to, name, flags | O_WRONLY | O_CREAT | O_EXCL, 0600);
    int result = from < 0 || to < 0 ? -1
        : is_directory              ? copy_directory(from, to, copy->depth + 1)
                                    : copy_data(from, to);
    if (result == 0)
        result = copy_attributes(from, to, st);
    int error = errno;
    if (from >= 0)
        close(from);
    if (to >= 0)
        close(to);
    errno = error;
    return result;
}

static int copy_entry(int directory, const char *name, void *context)
{
    const struct copy *copy = context;
    struct stat st;
    char target[PATH_MAX];
    if (fstatat(directory, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
        return -1;
    if (S_ISREG(st.st_mode) || S_ISDIR(st.st_mode))
        return copy_opened(directory, name, &st, copy);
    if (S_ISSOCK(st.st_mode))
        return 0; /* nobody listens on a copy */
    if (S_ISLNK(st.st_mode)) {
        ssize_t length = readlinkat(directory, name, target, sizeof target - 1);
        if (length < 0)
            return -1;
        target[length] = 0;
        if (symlinkat(target, copy->to, name) < 0)
            return -1;
    } else if (mknodat(copy->to, name, st.st_mode, st.st_rdev) < 0) {
        return -1;
    }
    const struct timespec times[] = {st.st_atim, st.st_mtim};
    if (fchownat(copy->to, name, st.st_uid, st.st_gid, AT_SYMLINK_NOFOLLOW) < 0)
        return -1;
    if (!S_ISLNK(st.st_mode) && fchmodat(copy->to, name, st.st_mode & 07777, 0) < 0)
        return -1;
    return utimensat(copy->to, name, times, AT_SYMLINK_NOFOLLOW);
}

int populate_volume(int volume, int covered)
{
    struct stat st;
    bool has_content = false;
    if (unlinkat(volume, "lost+found", AT_REMOVEDIR) < 0 && errno != ENOENT && errno != ENOTEMPTY && errno != ENOTDIR)
        return -1;
    bool interrupted = faccessat(volume, MARKER, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
    if (interrupted && for_each_entry(volume, remove_entry, "keep the marker") < 0)
        return -1;
    if (!interrupted && for_each_entry(volume, note_entry, &has_content) < 0)
        return -1;
    if (has_content || fstat(covered, &st) < 0)
        return has_content ? 0 : -1;
    int marker = openat(volume, MARKER, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    if (marker < 0)
        return -1;
    close(marker);
    if (syncfs(volume) < 0 || copy_directory(covered, volume, 0) < 0 || copy_attributes(covered, volume, &st) < 0
        || syncfs(volume) < 0)
        return -1;
    if (unlinkat(volume, MARKER, 0) < 0)
        return -1;
    return syncfs(volume);
}
