"""Images with what images have: users, data directories, entry scripts, init systems."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

LONG_NAME = "u" * 200
ENTRY = '#!/bin/sh\necho "entry script of process $$"\nexec "$@"\n'
INITTAB = "::sysinit:/bin/echo init is up\n::respawn:/bin/sleep 1000\n"

# Prints, when it starts, what its clock says and how long the machine has been up, in nanoseconds.
START = r"""
#include <stdio.h>
#include <time.h>
#include <unistd.h>
static long long ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}
int main(int argc, char **argv) {
    long long real = ns(CLOCK_REALTIME), up = ns(CLOCK_BOOTTIME);
    printf("clock %lld %lld\n", real, up);
    fflush(stdout);
    if (argc > 1)
        execvp(argv[1], argv + 1);
    return 0;
}
"""

# What ping uses where it may.
PING_SOCKET = r"""
#include <netinet/in.h>
#include <sys/socket.h>
int main(void) { return socket(AF_INET, SOCK_DGRAM, IPPROTO_ICMP) < 0; }
"""


def make_image(tree: Path, image: Path) -> Path:
    """A root disk made of ``tree``, which is filled first."""
    for directory in ("bin", "sbin", "tmp", "root", "home/bob", "run/app", "etc", "var/lib/app/sub", "opt"):
        (tree / directory).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin/busybox")
    for applet in subprocess.check_output(["/bin/busybox", "--list"], text=True).split():
        if applet != "busybox":
            (tree / "bin" / applet).symlink_to("busybox")
    (tree / "sbin/init").symlink_to("/bin/busybox")
    (tree / "bin/entry").write_text(ENTRY)
    (tree / "bin/entry").chmod(0o755)
    (tree / "etc/inittab").write_text(INITTAB)
    for name, source in (("start", START), ("ping-socket", PING_SOCKET)):
        code = tree.parent / f"{name}.c"
        code.write_text(source)
        subprocess.run(["gcc", "-static", "-O1", "-o", tree / "bin" / name, code], check=True)
    members = ",".join(f"member{number:04}" for number in range(800))
    (tree / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\n"
        f"bob:x:1000:1000:{'B' * 3000}:/home/bob:/bin/sh\r\n"
        f"{LONG_NAME}:x:2000:2000::/opt:/bin/sh\n"
        "\n# no line of its own\n"
        "short:x:3000\n"
        "broken:x:many:1::/:/bin/sh\n"
    )
    (tree / "etc/group").write_text(f"root:x:0:\nbig:x:77:{members},bob\nbob:x:1000:\nvideo:x:44:\n9:x:90:\n")
    (tree / "var/lib/app/file").write_text("of the image\n")
    for path in (tree / "var/lib/app", tree / "var/lib/app/file", tree / "run/app", tree / "home/bob"):
        os.lchown(path, 1000, 1000)
    (tree / "var/lib/app").chmod(0o2750)
    (tree / "opt/empty").mkdir(mode=0o700)
    os.lchown(tree / "opt/empty", 1000, 44)
    (tree / "tmp").chmod(0o1777)
    tree.chmod(0o755)
    subprocess.run(["mkfs.erofs", "--quiet", image, tree], check=True, capture_output=True)
    return image
