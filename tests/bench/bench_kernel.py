"""From the start of QEMU to the end of an init that powers off at once: our kernel beside Debian's.

Under TCG, so that it runs on every machine; CPU time, since wall time there follows the machine's load.
Debian's kernel gets the modules that a guest needs into its initrd, as it would have, but loads none.
"""

from __future__ import annotations

import resource
import subprocess
import tempfile
from pathlib import Path

from hypeman.guest.initrd import build_initrd, read_modules
from tests.bench.harness import Result, compare

KERNEL = Path(__file__).parents[2] / "packaging" / "kernel"
INIT = """
#include <stdio.h>
#include <sys/reboot.h>
int main(void) { puts("init runs"); fflush(stdout); reboot(RB_POWER_OFF); return 0; }
"""
ROUNDS = 5


def run() -> list[Result]:
    cached = subprocess.run([KERNEL / "build", "--cached"], capture_output=True, text=True)
    if cached.returncode != 0:
        print("kernel: our own was not built here (make kernel)")
        return []
    ours = Path(cached.stdout.strip())
    debian = Path(
        subprocess.run([KERNEL / "fetch-debian"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    )
    with tempfile.TemporaryDirectory() as folder:
        init = compile_init(Path(folder))
        lean, full = Path(folder, "lean.cpio"), Path(folder, "full.cpio")
        lean.write_bytes(build_initrd(init))
        full.write_bytes(build_initrd(init, read_modules(debian / "modules")))
        boot = compare(
            "kernel.boot_cpu",
            "s",
            lambda: boot_cpu_time(ours / "vmlinux", lean),
            "Debian's cloud kernel",
            lambda: boot_cpu_time(debian / "vmlinux", full),
            ROUNDS,
        )
    sizes = [(folder / "vmlinux").stat().st_size / 1e6 for folder in (ours, debian)]
    return [boot, Result("kernel.size", sizes[0], "MB", "Debian's cloud kernel", sizes[1])]


def compile_init(folder: Path) -> bytes:
    source, program = folder / "init.c", folder / "init"
    source.write_text(INIT)
    subprocess.run(["gcc", "-static", "-Os", "-s", "-o", program, source], check=True)
    return program.read_bytes()


def boot_cpu_time(kernel: Path, initrd: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    console = subprocess.run(
        ["qemu-system-x86_64", "-M", "q35,sata=off,smbus=off,vmport=off", "-accel", "tcg,tb-size=32", "-m", "256M",
         "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
         "-kernel", kernel, "-initrd", initrd,
         "-append", "console=ttyS0 quiet panic=-1 reboot=t cryptomgr.notests random.trust_cpu=on"],
        stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    if b"init runs" not in console:
        raise RuntimeError(f"{kernel} did not reach init: {console[-2000:]!r}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
