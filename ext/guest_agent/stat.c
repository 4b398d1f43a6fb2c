/* What exists at a path. Absence is an answer, not an error. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sys/stat.h>
#include <unistd.h>

#include "path.h"
#include "protocol.h"
#include "worker.h"

int stat_worker(struct field_reader *request)
{
    const char *path = NULL;
    bool follow = false;
    struct field field;
    while (next_field(request, &field)) {
        bool good = false;
        switch (field.tag) {
        case TAG_PATH:
            good = field_text(&field, &path);
            break;
        case TAG_FOLLOW_LINKS:
            good = field_bool(&field, &follow);
            break;
        }
        request->malformed |= !good;
    }
    if (request->malformed || !path)
        return worker_failed(EINVAL, "stat");

    uint8_t buffer[PATH_MAX + 256];
    struct field_writer writer = {buffer, sizeof buffer, 0, false};
    int fd = open_inside(open_worker_root(), path, (uint64_t)(O_PATH | (follow ? 0 : O_NOFOLLOW)), 0);
    struct stat st;
    if (fd < 0 && (errno == ENOENT || errno == ENOTDIR)) {
        put_u8_field(&writer, TAG_EXISTS, 0);
        return worker_reply(&writer);
    }
    if (fd < 0 || fstat(fd, &st) < 0)
        return worker_failed(errno, "%s", path);
    put_u8_field(&writer, TAG_EXISTS, 1);
    put_u8_field(&writer, TAG_KIND, file_kind_of(st.st_mode));
    put_u32_field(&writer, TAG_MODE, st.st_mode & 07777);
    put_u64_field(&writer, TAG_SIZE, (uint64_t)st.st_size);
    put_u32_field(&writer, TAG_UID, st.st_uid);
    put_u32_field(&writer, TAG_GID, st.st_gid);
    put_u64_field(&writer, TAG_MTIME, (uint64_t)st.st_mtime);
    char target[PATH_MAX];
    ssize_t n = S_ISLNK(st.st_mode) ? readlinkat(fd, "", target, sizeof target - 1) : -1;
    if (n >= 0) {
        target[n] = 0;
        put_text_field(&writer, TAG_LINK_TARGET, target);
    }
    return worker_reply(&writer);
}
