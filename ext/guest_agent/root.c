#define _GNU_SOURCE
#include "root.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <linux/fs.h>
#include <mntent.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include "disk.h"
#include "populate.h"
#include "util.h"

#define NEW_ROOT "/newroot"
#define DOCKER_SHM_BYTES (64 << 20)

/* The overlay's own mount is hidden behind the root; this descriptor lets us freeze it at the end. */
static int overlay_fd = -1;

static const char *problem(const char *format, ...)
{
    static char text[512];
    int error = errno;
    va_list args;
    va_start(args, format);
    size_t n = (size_t)vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (n < sizeof text)
        snprintf(text + n, sizeof text - n, ": %s", strerror(error));
    return text;
}

struct kernel_fs {
    const char *type, *path, *options;
    unsigned long flags;
};

static const char *mount_kernel_fs(const struct kernel_fs *list, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        if (make_dirs(list[i].path) < 0)
            return problem("cannot create %s", list[i].path);
        if (mount(list[i].type, list[i].path, list[i].type, list[i].flags, list[i].options) < 0 && errno != EBUSY)
            return problem("cannot mount %s", list[i].path);
    }
    return NULL;
}

const char *mount_early(void)
{
    static const struct kernel_fs list[] = {
        {"proc", "/proc", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC},
        {"sysfs", "/sys", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC},
        {"devtmpfs", "/dev", "mode=0755", MS_NOSUID},
    };
    return mount_kernel_fs(list, LENGTH(list));
}

/* Half of the memory, and no less than Docker's default. It is a limit: unused space costs nothing. */
static unsigned long long shm_size(uint64_t wanted)
{
    struct sysinfo system;
    unsigned long long half = sysinfo(&system) == 0 ? (unsigned long long)system.totalram * system.mem_unit / 2 : 0;
    return wanted ? wanted : half > DOCKER_SHM_BYTES ? half : DOCKER_SHM_BYTES;
}

/* In the new root, so that links of the image (/dev -> /x/dev) lead where they do for its programs. /run is the image's
 * own: programs expect the directories that it has there, as they find them in a container. */
const char *mount_late(uint64_t shm_bytes)
{
    char shm[64];
    snprintf(shm, sizeof shm, "mode=1777,size=%llu", shm_size(shm_bytes));
    const struct kernel_fs list[] = {
        {"proc", "/proc", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC},
        {"sysfs", "/sys", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC},
        {"devtmpfs", "/dev", "mode=0755", MS_NOSUID},
        {"devpts", "/dev/pts", "newinstance,ptmxmode=0666,mode=0620,gid=5", MS_NOSUID | MS_NOEXEC},
        {"tmpfs", "/dev/shm", shm, MS_NOSUID | MS_NODEV},
        {"mqueue", "/dev/mqueue", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC},
        {"cgroup2", "/sys/fs/cgroup", "nsdelegate", MS_NOSUID | MS_NODEV | MS_NOEXEC},
    };
    static const char *const links[][2] = {{"/proc/self/fd", "/dev/fd"},
                                           {"/proc/self/fd/0", "/dev/stdin"},
                                           {"/proc/self/fd/1", "/dev/stdout"},
                                           {"/proc/self/fd/2", "/dev/stderr"},
                                           {"pts/ptmx", "/dev/ptmx"}};
    const char *failure = mount_kernel_fs(list, LENGTH(list));
    /* For all users, as by udev's rules. */
    chmod("/dev/fuse", 0666);
    chmod("/dev/net/tun", 0666);
    for (size_t i = 0; !failure && i < LENGTH(links); i++) {
        unlink(links[i][1]);
        if (symlink(links[i][0], links[i][1]) < 0)
            failure = problem("cannot create %s", links[i][1]);
    }
    return failure;
}

static const char *mount_disk(const struct boot_config *config, const char *id, const char *path, const char *type,
                              bool readonly, int wait_ms)
{
    char device[DEVICE_PATH_BYTES];
    if (make_dirs(path) < 0)
        return problem("cannot make %s", path);
    if (find_disk(config, id, device, wait_ms) < 0) {
        errno = ENODEV;
        return problem("disk \"%s\" did not appear", id);
    }
    /* A read-only disk may be shared or dirty: its journal must not be replayed. */
    const char *options = readonly && strcmp(type, "ext4") == 0 ? "noload" : NULL;
    if (mount(device, path, type, (readonly ? MS_RDONLY : 0) | MS_NODEV, options) < 0)
        return problem("cannot mount disk \"%s\" (%s, %s)", id, device, type);
    return NULL;
}

/* Joins `lower` and the directories upper and work on `upper` into one tree at `path`. The overlay keeps references to
 * both, so they are removed from the mount table. */
static const char *join(const char *lower, const char *upper, const char *path)
{
    char options[3 * PATH_MAX], dir[PATH_MAX];
    snprintf(dir, sizeof dir, "%s/upper", upper);
    if (make_dirs(dir) < 0)
        return problem("cannot make %s", dir);
    snprintf(dir, sizeof dir, "%s/work", upper);
    if (make_dirs(dir) < 0)
        return problem("cannot make %s", dir);
    /* The root of a volume or image keeps its mode and owner; a fresh upper directory would hide them. */
    struct stat st;
    snprintf(dir, sizeof dir, "%s/upper", upper);
    if (stat(lower, &st) == 0 && (chown(dir, st.st_uid, st.st_gid) < 0 || chmod(dir, st.st_mode & 07777) < 0))
        return problem("cannot set the mode of %s", dir);
    snprintf(options, sizeof options, "lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lower, upper, upper);
    if (make_dirs(path) < 0)
        return problem("cannot make %s", path);
    if (mount("overlay", path, "overlay", 0, options) < 0)
        return problem("cannot mount the overlay at %s", path);
    umount2(lower, MNT_DETACH);
    umount2(upper, MNT_DETACH);
    return NULL;
}

/* A writable volume; a fresh one gets the content of the directory that it covers. */
static const char *mount_writable(const struct boot_config *config, const struct volume *volume, int wait_ms)
{
    if (make_dirs(volume->path) < 0)
        return problem("cannot create %s", volume->path);
    int covered = open(volume->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (covered < 0)
        return problem("cannot open %s", volume->path);
    const char *failure = mount_disk(config, volume->disk_id, volume->path, volume->fs_type, false, wait_ms);
    if (!failure) {
        int root = open(volume->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (root < 0 || populate_volume(root, covered) < 0)
            failure = problem("cannot copy the content of %s to its volume", volume->path);
        close_fd(&root);
        if (failure)
            umount2(volume->path, MNT_DETACH);
    }
    close_fd(&covered);
    return failure;
}

#define FILES "/dev/shm/.hypeman-files"

/* The error with a file of the volume, and the path below which files are mounted, for `mount_file`. */
static const char *files_failure, *files_below;

static int mount_file(const char *source, const struct stat *st, int type, struct FTW *walk)
{
    (void)st;
    (void)walk;
    char target[PATH_MAX];
    const char *path = source + strlen(FILES);
    if (type == FTW_DNR || type == FTW_NS) {
        files_failure = problem("cannot read %s of a volume", path);
        return 1;
    }
    if (type != FTW_F)
        return 0;
    bool good = snprintf(target, sizeof target, "%s%s", files_below, path) < (int)sizeof target;
    if (!good)
        errno = ENAMETOOLONG;
    char *name = strrchr(target, '/');
    *name = '\0';
    good = good && (name == target || make_dirs(target) == 0);
    *name = '/';
    if (good && access(target, F_OK) < 0) {
        int fd = open(target, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
        good = fd >= 0;
        close_fd(&fd);
    }
    if (good && mount(source, target, NULL, MS_BIND, NULL) == 0)
        return 0;
    files_failure = problem("cannot mount the file %s", target);
    return 1;
}

/* The mounts of the files keep the disk's file system after its own mount is removed. */
static const char *mount_files(const struct boot_config *config, const struct volume *volume, int wait_ms)
{
    files_failure = mount_disk(config, volume->disk_id, FILES, volume->fs_type, volume->readonly, wait_ms);
    files_below = strcmp(volume->path, "/") == 0 ? "" : volume->path;
    if (!files_failure && nftw(FILES, mount_file, 16, FTW_PHYS) < 0)
        files_failure = problem("cannot read the files of disk \"%s\"", volume->disk_id);
    umount2(FILES, MNT_DETACH);
    rmdir(FILES);
    return files_failure;
}

const char *mount_volume(const struct boot_config *config, const struct volume *volume, int wait_ms)
{
    if (volume->files)
        return mount_files(config, volume, wait_ms);
    if (!volume->overlay_disk_id && !volume->readonly)
        return mount_writable(config, volume, wait_ms);
    if (!volume->overlay_disk_id)
        return mount_disk(config, volume->disk_id, volume->path, volume->fs_type, true, wait_ms);
    /* Two directories on a file system in memory, removed again below. */
    static const char *const lower = "/dev/shm/.hypeman-lower", *const upper = "/dev/shm/.hypeman-upper";
    const char *failure = mount_disk(config, volume->disk_id, lower, volume->fs_type, true, wait_ms);
    if (!failure)
        failure = mount_disk(config, volume->overlay_disk_id, upper, "ext4", false, wait_ms);
    if (!failure)
        failure = join(lower, upper, volume->path);
    if (!failure) {
        char path[PATH_MAX];
        snprintf(path, sizeof path, "%s/lost+found", volume->path);
        rmdir(path); /* the file system's, not the user's; kept if something is in it */
    }
    if (failure) {
        umount2(lower, MNT_DETACH);
        umount2(upper, MNT_DETACH);
    }
    rmdir(lower);
    rmdir(upper);
    return failure;
}

#define OWN_DISK "/dev/shm/.hypeman-disk"

static bool is_mounted_volume(const struct boot_config *config, const char *path)
{
    for (size_t i = 0; i < config->volume_count; i++)
        if (!config->volumes[i].files && strcmp(config->volumes[i].path, path) == 0)
            return true;
    return false;
}

/* A directory on the mounted disk for the one at `path`, with its attributes; made under another name first, so that it is
 * complete if it is there. */
static int make_own_dir(const char *path, int covered, char *own, size_t capacity)
{
    char unfinished[PATH_MAX];
    if (snprintf(own, capacity, OWN_DISK "/volumes%s/.data", path) >= (int)capacity
        || snprintf(unfinished, sizeof unfinished, OWN_DISK "/volumes%s/.new", path) >= (int)sizeof unfinished) {
        errno = ENAMETOOLONG;
        return -1;
    }
    if (access(own, F_OK) == 0)
        return 0;
    int fd = make_dirs(unfinished) < 0 ? -1 : open(unfinished, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int result = fd < 0 || copy_directory_attributes(covered, fd) < 0 ? -1 : rename(unfinished, own);
    close_fd(&fd);
    return result;
}

/* An empty directory is placed on the instance's disk itself, as Docker places it on the host's: databases are faster,
 * and container engines can have overlays on it, which the kernel refuses on an overlay. One with content is not copied
 * and stays where it is. */
static int move_to_own_disk(const char *path)
{
    char own[PATH_MAX];
    int covered = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int empty = covered < 0 ? -1 : is_directory_empty(covered);
    int result = empty == 1 ? make_own_dir(path, covered, own, sizeof own) : empty;
    if (result == 0 && empty == 1)
        result = mount(own, path, NULL, MS_BIND, NULL);
    int error = errno;
    close_fd(&covered);
    errno = error;
    return result;
}

void make_volume_dirs(const struct boot_config *config)
{
    const char *failure = NULL;
    bool have_disk = config->overlay && config->volume_dir_count > 0;
    if (have_disk)
        failure = mount_disk(config, "overlay", OWN_DISK, "ext4", false, BOOT_DISK_WAIT_MS);
    for (size_t i = 0; i < config->volume_dir_count; i++) {
        const char *path = config->volume_dirs[i];
        if (path[0] != '/' || strstr(path, "/../") || is_mounted_volume(config, path))
            continue;
        if (make_dirs(path) < 0 || (have_disk && !failure && move_to_own_disk(path) < 0))
            log_line("the volume %s of the image: %s", path, strerror(errno));
    }
    if (have_disk && !failure)
        umount2(OWN_DISK, MNT_DETACH);
    rmdir(OWN_DISK);
    if (failure)
        log_line("%s", failure);
}

const char *mount_root(const struct boot_config *config)
{
    const char *failure = mount_disk(config, "root", "/lower", config->root_fs, true, BOOT_DISK_WAIT_MS);
    if (!failure && config->overlay)
        failure = mount_disk(config, "overlay", "/upper", "ext4", false, BOOT_DISK_WAIT_MS);
    else if (!failure && (make_dirs("/upper") < 0 || mount("tmpfs", "/upper", "tmpfs", 0, "mode=0755") < 0))
        failure = problem("cannot mount a writable layer in memory");
    if (failure)
        return failure;
    if (config->overlay)
        overlay_fd = open("/upper", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return join("/lower", "/upper", NEW_ROOT);
}

const char *switch_root(void)
{
    unlink("/init"); /* the initramfs is in memory */
    umount2("/dev", MNT_DETACH);
    umount2("/sys", MNT_DETACH);
    umount2("/proc", MNT_DETACH);
    if (chdir(NEW_ROOT) < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0
        || mount(NULL, "/", NULL, MS_REC | MS_SHARED, NULL) < 0)
        return problem("cannot switch to the new root");
    return NULL;
}

/* Unmounts the first 64 of what is mounted from disks; the number of what it has unmounted. */
static size_t unmount_some(void)
{
    static char paths[64][PATH_MAX];
    size_t count = 0, unmounted = 0;
    FILE *mounts = setmntent("/proc/self/mounts", "re");
    for (struct mntent *entry; mounts && count < LENGTH(paths) && (entry = getmntent(mounts));)
        if ((strncmp(entry->mnt_fsname, "/dev/", 5) == 0 || strcmp(entry->mnt_type, "overlay") == 0)
            && strcmp(entry->mnt_dir, "/") != 0 && strlen(entry->mnt_dir) < sizeof paths[0])
            strcpy(paths[count++], entry->mnt_dir);
    if (mounts)
        endmntent(mounts);
    while (count > 0)
        if (umount2(paths[--count], 0) == 0 || umount2(paths[count], MNT_DETACH) == 0)
            unmounted++;
    return unmounted;
}

void quiesce_disks(void)
{
    sync();
    while (unmount_some() > 0)
        ; /* a volume of files has a mount for each of them */
    /* Freezing writes out the journal and marks the file system clean; it cannot be unmounted below a root in use. */
    if (overlay_fd >= 0)
        ioctl(overlay_fd, FIFREEZE, 0);
    sync();
}
