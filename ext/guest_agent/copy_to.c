/* One file, directory, symlink or hard link from the host into the guest.
 *
 * A file is written under a temporary name in its directory and renamed when complete, so nobody ever sees a partial
 * file, and a transfer that ends early leaves nothing. Blocks of zeros become holes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "path.h"
#include "protocol.h"
#include "util.h"
#include "worker.h"

#define CHUNK 65536
#define HOLE 4096
#define TEMPORARY 64

struct target {
    const char *path, *link;
    uint8_t kind;
    uint32_t mode, uid, gid;
    int64_t mtime;
    bool has_uid, has_gid, has_mtime;
};

/* The agent aborts us with a signal and closes our input after it, so at the end of input we know which it was. */
static volatile sig_atomic_t aborted;

static void abort_copy(int signal)
{
    (void)signal;
    aborted = 1;
}

static bool parse(struct field_reader *request, struct target *target)
{
    struct field field;
    uint64_t mtime;
    *target = (struct target){.kind = KIND_FILE, .mode = UINT32_MAX};
    while (next_field(request, &field)) {
        bool good = false;
        switch (field.tag) {
        case TAG_PATH:
            good = field_text(&field, &target->path);
            break;
        case TAG_KIND:
            good = field_u8(&field, &target->kind);
            break;
        case TAG_MODE:
            good = field_u32(&field, &target->mode) && target->mode <= 07777;
            break;
        case TAG_UID:
            good = target->has_uid = field_u32(&field, &target->uid);
            break;
        case TAG_GID:
            good = target->has_gid = field_u32(&field, &target->gid);
            break;
        case TAG_LINK_TARGET:
            good = field_text(&field, &target->link);
            break;
        case TAG_MTIME:
            good = target->has_mtime = field_u64(&field, &mtime);
            target->mtime = (int64_t)mtime;
            break;
        }
        if (!good)
            return false;
    }
    if (target->mode == UINT32_MAX)
        target->mode = target->kind == KIND_DIR ? 0755 : 0644;
    return !request->malformed && target->path
        && (target->kind == KIND_SYMLINK || target->kind == KIND_HARD_LINK) == (target->link != NULL);
}

/* Owner before mode, as a change of owner clears the set-id bits; time last. */
static int set_attributes(int dir, const char *name, const struct target *target)
{
    uid_t uid = target->has_uid ? target->uid : (uid_t)-1;
    gid_t gid = target->has_gid ? target->gid : (gid_t)-1;
    if ((target->has_uid || target->has_gid) && fchownat(dir, name, uid, gid, AT_SYMLINK_NOFOLLOW) < 0)
        return -1;
    if (target->kind != KIND_SYMLINK && fchmodat(dir, name, target->mode, 0) < 0)
        return -1;
    struct timespec times[2] = {{0, UTIME_OMIT}, {target->mtime, 0}};
    return target->has_mtime ? utimensat(dir, name, times, AT_SYMLINK_NOFOLLOW) : 0;
}

static int make_directory(int dir, const char *name, const struct target *target)
{
    struct stat st;
    if (mkdirat(dir, name, 0755) < 0 && errno != EEXIST)
        return worker_failed(errno, "%s", target->path);
    if (fstatat(dir, name, &st, 0) < 0)
        return worker_failed(errno, "%s", target->path);
    if (!S_ISDIR(st.st_mode))
        return worker_failed(ENOTDIR, "%s exists and is not a directory", target->path);
    return set_attributes(dir, name, target) < 0 ? worker_failed(errno, "%s", target->path) : 0;
}

/* Whether HOLE bytes at a multiple of 8 are all zero; almost always the first word decides. */
static bool is_zero(const uint8_t *block)
{
    uint64_t word;
    for (size_t i = 0; i < HOLE; i += sizeof word) {
        memcpy(&word, block + i, sizeof word);
        if (word)
            return false;
    }
    return true;
}

/* Writes a chunk, leaving out whole blocks of zeros. */
static bool write_sparse(int fd, const uint8_t *data, size_t length)
{
    for (size_t at = 0; at < length;) {
        size_t n = length - at < HOLE ? length - at : HOLE;
        bool hole = n == HOLE && is_zero(data + at);
        size_t end = at + n;
        while (end + HOLE <= length && is_zero(data + end) == hole)
            end += HOLE;
        if (!hole)
            while (end < length && length - end < HOLE)
                end = length;
        if (hole ? lseek(fd, (off_t)(end - at), SEEK_CUR) < 0 : !write_all(fd, data + at, end - at))
            return false;
        at = end;
    }
    return true;
}

/* Writes the data until its end. 0, or an errno; ECANCELED if the host aborted. */
static int receive(int fd, uint64_t *total)
{
    static uint8_t chunk[CHUNK];
    size_t filled = 0;
    for (;;) {
        ssize_t n = read(0, chunk + filled, sizeof chunk - filled);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno;
        filled += (size_t)n;
        *total += (uint64_t)n;
        if (filled < sizeof chunk && n > 0)
            continue;
        if (aborted)
            return ECANCELED;
        if (!write_sparse(fd, chunk, filled))
            return errno;
        filled = 0;
        if (n == 0)
            return ftruncate(fd, (off_t)*total) < 0 ? errno : 0;
    }
}

/* Chooses the temporary name; an error if `name` is a directory. 0, or as worker_failed. */
static int choose_temporary(int dir, const char *name, const struct target *target, char temporary[TEMPORARY])
{
    struct stat st;
    if (fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) == 0 && S_ISDIR(st.st_mode))
        return worker_failed(EISDIR, "%s", target->path);
    snprintf(temporary, TEMPORARY, ".hypeman-%d-%lld", getpid(), (long long)now_ms());
    return 0;
}

/* Renames the temporary file unless there was an error; either way none is left. */
static int finish_file(int dir, const char *temporary, const char *name, const struct target *target, int error)
{
    if (!error && renameat(dir, temporary, dir, name) < 0)
        error = errno;
    unlinkat(dir, temporary, 0); /* rename(2) keeps both if they are names of one file */
    return error ? worker_failed(error, "%s", target->path) : 0;
}

static int make_file(int dir, const char *name, const struct target *target)
{
    char temporary[TEMPORARY];
    uint64_t total = 0;
    int failed = choose_temporary(dir, name, target, temporary);
    if (failed)
        return failed;
    int fd = openat(dir, temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return worker_failed(errno, "%s", target->path);
    int error = receive(fd, &total);
    if (!error && set_attributes(dir, temporary, target) < 0)
        error = errno;
    if (close(fd) < 0 && !error)
        error = errno;
    failed = finish_file(dir, temporary, name, target, error);
    if (failed)
        return failed;
    uint8_t buffer[64];
    struct field_writer writer = {buffer, sizeof buffer, 0, false};
    put_u64_field(&writer, TAG_SIZE, total);
    return worker_reply(&writer);
}

static int make_symlink(int dir, const char *name, const struct target *target)
{
    char temporary[TEMPORARY];
    int failed = choose_temporary(dir, name, target, temporary);
    if (failed)
        return failed;
    if (symlinkat(target->link, dir, temporary) < 0)
        return worker_failed(errno, "%s", target->path);
    return finish_file(dir, temporary, name, target, set_attributes(dir, temporary, target) < 0 ? errno : 0);
}

/* One more name for an existing file, whose attributes stay. */
static int make_hard_link(int root, int dir, const char *name, const struct target *target)
{
    char temporary[TEMPORARY], old[NAME_MAX + 1];
    int failed = choose_temporary(dir, name, target, temporary);
    if (failed)
        return failed;
    int old_dir = open_parent(root, target->link, false, old);
    if (old_dir < 0 || linkat(old_dir, old, dir, temporary, 0) < 0)
        return worker_failed(errno, "%s: hard link to %s", target->path, target->link);
    return finish_file(dir, temporary, name, target, 0);
}

int copy_to_worker(struct field_reader *request)
{
    struct sigaction action = {.sa_handler = abort_copy};
    struct target target;
    char name[NAME_MAX + 1], followed[PATH_MAX];
    sigaction(SIGTERM, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
    if (!parse(request, &target))
        return worker_failed(EINVAL, "copy");
    int root = open_worker_root();
    int dir = open_parent(root, target.path, true, name);
    if (dir < 0)
        return worker_failed(errno, "%s", target.path);
    /* Like cp, writes through a symlink at the path if its target exists. */
    int end = target.kind == KIND_FILE ? open_inside(root, target.path, O_PATH, 0) : -1;
    struct stat st;
    if (end >= 0 && fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) == 0 && S_ISLNK(st.st_mode)) {
        char self[40];
        snprintf(self, sizeof self, "/proc/self/fd/%d", end);
        ssize_t n = readlink(self, followed, sizeof followed - 1);
        if (n <= 0 || n >= (ssize_t)sizeof followed - 1)
            return worker_failed(EINVAL, "%s", target.path);
        followed[n] = 0;
        dir = open_parent(open("/", O_PATH | O_DIRECTORY | O_CLOEXEC), followed, false, name);
        if (dir < 0)
            return worker_failed(errno, "%s", target.path);
    }
    close_fd(&end);
    switch (target.kind) {
    case KIND_DIR:
        return make_directory(dir, name, &target);
    case KIND_SYMLINK:
        return make_symlink(dir, name, &target);
    case KIND_HARD_LINK:
        return make_hard_link(root, dir, name, &target);
    case KIND_FILE:
        return make_file(dir, name, &target);
    default:
        return worker_failed(EINVAL, "%s: unknown kind of file", target.path);
    }
}
