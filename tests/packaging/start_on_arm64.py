"""``ext/start`` for arm64, cross-built and emulated: ``make test-arm64`` names this file."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.packaging.build_steps import build_step

LIBRARIES = Path("/usr/aarch64-linux-gnu/lib")
PROGRAM = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int main(int argc, char **argv)
{
    char *volatile kept = malloc(1 << 20);
    memset(kept, 1, 1 << 20);
    for (int i = 0; i < argc; i++)
        printf("%s|", argv[i]);
    puts(getenv("_PYI_ARCHIVE_FILE"));
    return 7;
}
"""


def test_it_starts_the_loader_of_arm64(tmp_path: Path) -> None:
    bring = build_step("bring_c_library")
    folder = Path(__file__).parents[2] / "ext/start"
    subprocess.run(["make", "-s", "-C", folder, f"OUT={tmp_path}/hypeman", "CC=aarch64-linux-gnu-gcc"], check=True)
    (tmp_path / "_internal").mkdir()
    (tmp_path / "probe.c").write_text(PROGRAM)
    bootloader = tmp_path / "_internal" / bring.PROGRAM
    subprocess.run(["aarch64-linux-gnu-gcc", "-no-pie", "-o", bootloader, tmp_path / "probe.c"], check=True)
    name = bring.loader_of(bootloader).name
    (tmp_path / "_internal" / name).write_bytes(bring.closed((LIBRARIES / name).read_bytes(), bring.OF_THE_LOADER))
    library = bring.closed((LIBRARIES / bring.LIBC).read_bytes(), bring.OF_THE_LIBRARY)
    (tmp_path / "_internal" / bring.LIBC).write_bytes(library)
    emulated = ["qemu-aarch64-static", str(tmp_path / "hypeman"), "a", "b c"]
    result = subprocess.run(emulated, capture_output=True, text=True, timeout=60)
    assert result.returncode == 7, result.stderr
    assert result.stdout == f"{tmp_path}/hypeman|a|b c|{tmp_path}/hypeman\n"
