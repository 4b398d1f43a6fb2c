/* A file or a tree from the guest to the host.
 *
 * The reply is one stream: for each entry u32 length, fields, then exactly the promised bytes of a regular
 * file. Depth first, the root of the tree first; names are relative to the parent of what was asked for.
 * Sockets, devices and FIFOs are left out.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bytes.h"
#include "path.h"
#include "protocol.h"
#include "util.h"
#include "worker.h"

#define MAX_DEPTH 200 /* each level holds a directory open */

static char where[PATH_MAX]; /* the current entry's name, as the host gets it */
static bool follow_links;

static int send_header(const struct stat *st, const char *link)
{
    uint8_t buffer[4 + 2 * PATH_MAX + 256];
    struct field_writer writer = {buffer + 4, sizeof buffer - 4, 0, false};
    put_text_field(&writer, TAG_PATH, where);
    put_u8_field(&writer, TAG_KIND, file_kind_of(st->st_mode));
    put_u32_field(&writer, TAG_MODE, st->st_mode & 07777);
    put_u32_field(&writer, TAG_UID, st->st_uid);
    put_u32_field(&writer, TAG_GID, st->st_gid);
    put_u64_field(&writer, TAG_SIZE, S_ISREG(st->st_mode) ? (uint64_t)st->st_size : 0);
    put_u64_field(&writer, TAG_MTIME, (uint64_t)st->st_mtime);
    if (link)
        put_text_field(&writer, TAG_LINK_TARGET, link);
    put_u32(buffer, (uint32_t)writer.length);
    return write_all(1, buffer, 4 + writer.length) ? 0 : EPIPE;
}

/* Exactly st_size bytes: a file that shrinks meanwhile is an error, one that grows is truncated. */
static int send_file(int fd, const struct stat *st)
{
    int error = send_header(st, NULL);
    off_t left = st->st_size;
    static uint8_t chunk[65536];
    while (!error && left > 0) {
        size_t want = left < (off_t)sizeof chunk ? (size_t)left : sizeof chunk;
        ssize_t n = read(fd, chunk, want);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return worker_failed(errno, "%s", where);
        if (n == 0)
            return worker_failed(0, "%s became shorter while it was read", where);
        left -= n;
        if (!write_all(1, chunk, (size_t)n))
            error = EPIPE;
    }
    return error;
}

static int send_entry(int dir, const char *name, int root, const char *full, int depth);

static int send_dir(int fd, const struct stat *st, int root, const char *full, int depth)
{
    int error = send_header(st, NULL);
    size_t length = strlen(where);
    if (error || depth >= MAX_DEPTH) {
        close(fd);
        return error ? error : worker_failed(ELOOP, "%s", where);
    }
    DIR *dir = fdopendir(fd);
    if (!dir)
        return worker_failed(errno, "%s", where);
    for (struct dirent *entry; !error && (entry = readdir(dir));) {
        char child[PATH_MAX];
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        if (length + 1 + strlen(entry->d_name) >= sizeof where
            || snprintf(child, sizeof child, "%s/%s", full, entry->d_name) >= (int)sizeof child) {
            error = worker_failed(ENAMETOOLONG, "%.200s", where);
            break;
        }
        where[length] = '/';
        strcpy(where + length + 1, entry->d_name);
        error = send_entry(fd, entry->d_name, root, child, depth + 1);
        where[length] = 0;
    }
    closedir(dir);
    return error;
}

static int send_entry(int dir, const char *name, int root, const char *full, int depth)
{
    struct stat st;
    char link[PATH_MAX];
    if (fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
        return errno == ENOENT && depth > 0 ? 0 : worker_failed(errno, "%s", where);
    bool is_link = S_ISLNK(st.st_mode);
    if (is_link && !follow_links) {
        ssize_t n = readlinkat(dir, name, link, sizeof link - 1);
        if (n < 0)
            return worker_failed(errno, "%s", where);
        link[n] = 0;
        return send_header(&st, link);
    }
    if (!is_link && !S_ISREG(st.st_mode) && !S_ISDIR(st.st_mode))
        return depth > 0 ? 0 : worker_failed(EINVAL, "%s is neither file nor directory", where);
    /* A symlink is resolved from the root, so that it leads nowhere else. Non-blocking: it may end at a FIFO. */
    int fd = is_link ? open_inside(root, full, O_RDONLY | O_NONBLOCK | O_NOCTTY, 0)
                     : openat(dir, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0)
        return depth > 0 && errno == ENOENT ? 0 : worker_failed(errno, "%s", where);
    if (S_ISDIR(st.st_mode))
        return send_dir(fd, &st, root, full, depth);
    int error = S_ISREG(st.st_mode) ? send_file(fd, &st) : 0;
    close(fd);
    return error;
}

int copy_from_worker(struct field_reader *request)
{
    const char *path = NULL;
    struct field field;
    char name[NAME_MAX + 1], full[PATH_MAX];
    signal(SIGPIPE, SIG_IGN);
    while (next_field(request, &field)) {
        bool good = false;
        switch (field.tag) {
        case TAG_PATH:
            good = field_text(&field, &path);
            break;
        case TAG_FOLLOW_LINKS:
            good = field_bool(&field, &follow_links);
            break;
        }
        request->malformed |= !good;
    }
    if (request->malformed || !path || strlen(path) >= sizeof full)
        return worker_failed(EINVAL, "copy");
    int root = open_worker_root();
    int dir = open_parent(root, path, false, name);
    if (dir < 0)
        return worker_failed(errno, "%s", path);
    strcpy(full, path);
    strcpy(where, strcmp(name, ".") == 0 ? "root" : name);
    int parent = openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return send_entry(parent >= 0 ? parent : dir, name, root, full, 0);
}
