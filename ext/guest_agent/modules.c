/* Kernel modules that came with the initrd, in the order that its list gives. With a kernel of ours there are none. */
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
            log_line("module %s: %s", name, strerror(errno)); /* what misses it will say so better */
        if (fd >= 0)
            close(fd);
        unlink(path); /* the initrd lies in memory */
    }
    unlink(LIST);
    rmdir("/modules");
}
