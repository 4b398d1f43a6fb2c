#define _GNU_SOURCE
#include "system_files.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "util.h"

/* Overwrites a regular file with the attributes that ours have, which is cheaper than replacing it; false for any other
 * file. */
static bool overwrite_file(const char *path, const char *text)
{
    struct stat st;
    char before[1024];
    size_t length = strlen(text);
    int fd = open(path, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        return false;
    bool good = fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && (st.st_mode & 07777) == 0644 && st.st_uid == 0
        && st.st_nlink == 1;
    if (good
        && ((size_t)st.st_size != length || length > sizeof before || !read_all(fd, before, length)
            || memcmp(before, text, length) != 0))
        good = pwrite(fd, text, length, 0) == (ssize_t)length && ftruncate(fd, (off_t)length) == 0;
    close(fd);
    return good;
}

/* Whether a mount begins at `path`. */
static bool is_mount(const char *path)
{
    char parent[256];
    const char *name = strrchr(path, '/') + 1;
    struct open_how how = {.flags = O_PATH | O_NOFOLLOW | O_CLOEXEC, .resolve = RESOLVE_NO_XDEV};
    snprintf(parent, sizeof parent, "%.*s", (int)(name - path), path);
    int dir = open(parent, O_PATH | O_DIRECTORY | O_CLOEXEC);
    int fd = dir < 0 ? -1 : (int)syscall(SYS_openat2, dir, name, &how, sizeof how);
    bool is = dir >= 0 && fd < 0 && errno == EXDEV;
    close_fd(&fd);
    close_fd(&dir);
    return is;
}

/* Replaces whatever exists there: a write would follow a dangling symlink of the image. A file of a volume is the
 * user's, and stays. */
static int put_file(const char *path, const char *text)
{
    struct stat st;
    if (is_mount(path)) {
        log_line("%s belongs to a volume and is not changed", path);
        return 0;
    }
    if (overwrite_file(path, text))
        return 0;
    if (lstat(path, &st) == 0 && S_ISDIR(st.st_mode) && rmdir(path) < 0) {
        log_line("%s is a directory of the image and is not changed", path);
        return 0;
    }
    unlink(path);
    return write_file(path, text);
}

int set_hostname(const char *hostname, const uint8_t *address)
{
    char text[1024];
    if (!*hostname)
        return 0;
    if (sethostname(hostname, strlen(hostname)) < 0)
        return -1;
    mkdir("/etc", 0755);
    snprintf(text, sizeof text, "%s\n", hostname);
    if (put_file("/etc/hostname", text) < 0)
        return -1;
    int n = snprintf(text, sizeof text, "127.0.0.1\tlocalhost\n");
    if (address)
        snprintf(text + n, sizeof text - (size_t)n, "%d.%d.%d.%d\t%s\n", address[0], address[1], address[2], address[3],
                 hostname);
    else
        snprintf(text + n, sizeof text - (size_t)n, "127.0.1.1\t%s\n", hostname);
    return put_file("/etc/hosts", text);
}

int link_mount_table(void)
{
    mkdir("/etc", 0755);
    return symlink("/proc/mounts", "/etc/mtab") < 0 && errno != EEXIST ? -1 : 0;
}

int write_resolver(const struct network *network)
{
    char text[256] = "";
    size_t length = 0;
    for (size_t i = 0; i < network->dns_count; i++) {
        const uint8_t *a = network->dns[i];
        length +=
            (size_t)snprintf(text + length, sizeof text - length, "nameserver %d.%d.%d.%d\n", a[0], a[1], a[2], a[3]);
    }
    if (length == 0)
        return 0;
    mkdir("/etc", 0755);
    return put_file("/etc/resolv.conf", text);
}

int write_machine_id(const char *machine_id, bool always)
{
    char text[64];
    struct stat st;
    if (!*machine_id || (!always && access("/etc/machine-id", F_OK) < 0))
        return 0;
    snprintf(text, sizeof text, "%.32s\n", machine_id);
    if (put_file("/etc/machine-id", text) < 0)
        return -1;
    if (lstat("/var/lib/dbus/machine-id", &st) == 0 && S_ISREG(st.st_mode))
        return put_file("/var/lib/dbus/machine-id", text);
    return 0;
}

#define MAX_BUNDLE (8 * 1024 * 1024)

/* The whole file in memory, NUL at its end; NULL if there is none. */
static char *load_file(const char *path, size_t *length)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    char *text = NULL;
    if (fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size <= MAX_BUNDLE) {
        *length = (size_t)st.st_size;
        text = malloc(*length + 1);
        if (text && !read_all(fd, text, *length)) {
            free(text);
            text = NULL;
        }
        if (text)
            text[*length] = 0;
    }
    close_fd(&fd);
    return text;
}

static int append_to(const char *path, const char *pem)
{
    size_t length;
    char *bundle = load_file(path, &length);
    if (!bundle)
        return -1;
    bool has_it = strstr(bundle, pem) != NULL;
    bool ends_in_newline = length == 0 || bundle[length - 1] == '\n';
    free(bundle);
    if (has_it)
        return 0;
    int fd = open(path, O_WRONLY | O_APPEND | O_CLOEXEC);
    bool good = fd >= 0 && (ends_in_newline || write_all(fd, "\n", 1)) && write_all(fd, pem, strlen(pem));
    close_fd(&fd);
    return good ? 0 : -1;
}

/* Bundles of Debian and Alpine, Fedora, SUSE, OpenSSL's own default; names that are symlinks lead to the same file. */
static const char *const BUNDLES[] = {"/etc/ssl/certs/ca-certificates.crt",
                                      "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
                                      "/etc/pki/tls/certs/ca-bundle.crt",
                                      "/var/lib/ca-certificates/ca-bundle.pem",
                                      "/etc/ssl/ca-bundle.pem",
                                      "/etc/ssl/cert.pem"};
/* Where update-ca-certificates and update-ca-trust look, so that a later run keeps ours. */
static const char *const ANCHORS[] = {"/usr/local/share/ca-certificates", "/etc/pki/ca-trust/source/anchors",
                                      "/etc/pki/trust/anchors"};

static void install_one(const struct ca_certificate *ca, size_t index)
{
    char path[256], name[64];
    snprintf(name, sizeof name, index == 0 ? "hypeman-egress-proxy.crt" : "hypeman-egress-proxy-%zu.crt", index);
    for (size_t i = 0; i < LENGTH(BUNDLES); i++)
        append_to(BUNDLES[i], ca->pem);
    for (size_t i = 0; i < LENGTH(ANCHORS); i++) {
        snprintf(path, sizeof path, "%s/%s", ANCHORS[i], name);
        if (access(ANCHORS[i], F_OK) == 0)
            put_file(path, ca->pem);
    }
    if (ca->hash && access("/etc/ssl/certs", F_OK) == 0) {
        snprintf(path, sizeof path, "/etc/ssl/certs/%.8s.0", ca->hash);
        put_file(path, ca->pem);
    }
}

int install_cas(const struct ca_certificate *cas, size_t count)
{
    if (count == 0)
        return 0;
    if (make_dirs("/etc/ssl/certs") < 0 || make_dirs(CA_DIR) < 0)
        return -1;
    for (size_t i = 0; i < count; i++)
        install_one(&cas[i], i);
    char *roots = NULL;
    size_t length = 0;
    for (size_t i = 0; !roots && i < LENGTH(BUNDLES); i++)
        roots = load_file(BUNDLES[i], &length);
    unlink(CA_BUNDLE);
    if (write_file(CA_BUNDLE, roots ? roots : "") < 0 || put_file(CA_ONLY, "") < 0) {
        free(roots);
        return -1;
    }
    bool had_bundle = roots != NULL;
    free(roots);
    for (size_t i = 0; i < count; i++)
        if (append_to(CA_BUNDLE, cas[i].pem) < 0 || append_to(CA_ONLY, cas[i].pem) < 0)
            return -1;
    /* An image without a trust store gets the one that most programs look for first. */
    if (!had_bundle)
        for (size_t i = 0; i < count; i++) {
            if (i == 0 && put_file(BUNDLES[0], "") < 0)
                return -1;
            if (append_to(BUNDLES[0], cas[i].pem) < 0)
                return -1;
        }
    return 0;
}
