/* Loads the kernel modules of the initrd, in the order of its list. Our own kernel has none. */
#define _GNU_SOURCE
#include "modules.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "util.h"

#define LIST "/modules/order"

void load_modules(void)
{
    char list[8192];
    if (read_file(LIST, list, sizeof list) < 0)
        return;
    for (char *rest = list, *name; (name = strsep(&rest, "\n"));) {
        char path[256];
        if (!*name)
            continue;
        snprintf(path, sizeof path, "/modules/%s", name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST))
            log_line("module %s: %s", name, strerror(errno)); /* what needs it reports a clearer error */
        if (fd >= 0)
            close(fd);
        unlink(path); /* the initramfs is in memory */
    }
    unlink(LIST);
    rmdir("/modules");
}
