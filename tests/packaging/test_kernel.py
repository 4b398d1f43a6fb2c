"""The guest kernel: its configuration as text, and how it is taken out of a distribution's image."""

from __future__ import annotations

import gzip
import importlib.util
import lzma
import os
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

KERNEL = Path(__file__).parents[2] / "packaging" / "kernel"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, KERNEL / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_option_is_asked_for_twice() -> None:
    lines = (KERNEL / "config").read_text().splitlines()
    names = [line.removeprefix("# ").split("=")[0].split(" ")[0] for line in lines if "CONFIG_" in line]
    assert len(names) == len(set(names)) > 200


def packed(tool: str) -> Callable[[bytes], bytes]:
    return lambda data: subprocess.run([tool, "-lc" if tool == "lz4" else "-c"], input=data, capture_output=True).stdout


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, packed("lz4"), packed("zstd")])
def test_the_kernel_is_found_in_its_image(compress: Callable[[bytes], bytes]) -> None:
    kernel = b"\x7fELF" + bytes(range(256)) * 64
    payload = compress(kernel)
    assert payload, "the packer is installed"
    assert load("extract_vmlinux").extract(image_with(payload, len(kernel))) == kernel


def test_what_is_no_kernel_is_refused() -> None:
    module = load("extract_vmlinux")
    with pytest.raises(SystemExit, match="not a bzImage"):
        module.extract(bytes(4096))
    with pytest.raises(SystemExit, match="unknown compression"):
        module.extract(image_with(b"something else", 14))
    with pytest.raises(SystemExit, match="not an ELF"):
        module.extract(image_with(gzip.compress(b"text"), 4))


def image_with(payload: bytes, size: int) -> bytes:
    """A bzImage: two sectors of set-up code, some decompressor, the payload and its size when unpacked."""
    setup = bytearray(1024)
    setup[0x1F1] = 1
    setup[0x202:0x206] = b"HdrS"
    decompressor = bytes(100)
    struct.pack_into("<II", setup, 0x248, len(decompressor), len(payload) + 4)
    return bytes(setup) + decompressor + payload + struct.pack("<I", size) + bytes(64)


@pytest.mark.parametrize(("how", "asks"), [(["--own"], "kernel/build:"), ([], "kernel/fetch-debian:")])
def test_only_the_demo_falls_back_to_debians_kernel(tmp_path: Path, how: list[str], asks: str) -> None:
    """Where nothing was built yet and apt knows nothing: who is asked for a kernel."""
    (tmp_path / "apt-cache").write_text("#!/bin/sh\n")
    (tmp_path / "apt-cache").chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [str(KERNEL / "choose"), *how, str(tmp_path / "out")]
    result = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert result.returncode != 0 and result.stderr.startswith(asks), result.stderr
    assert not (tmp_path / "out").exists()


def test_whatever_is_tested_or_delivered_has_our_kernel() -> None:
    makefile = (KERNEL.parents[1] / "Makefile").read_text()
    for target in ("test", "test-conformance", "test-metal", "bench"):
        assert re.search(rf"^{target}: .*\bready-own\b", makefile, re.MULTILINE), target
    assert "choose --own build/guest" in makefile
    assert "kernel=$(packaging/kernel/build)" in (KERNEL.parent / "appliance" / "build").read_text()


STUBS = {
    "apt-cache": """
case $1 in
depends) echo "  Depends: linux-image-6.1.0-1-cloud-amd64" ;;
*) echo "  Candidate: 6.1-1" ;;
esac""",
    "apt-get": "sleep 0.5; touch linux_1.deb",
    "dpkg-deb": """
case $1 in
-x) mkdir -p tree/boot tree/lib/modules/6.1.0-1-cloud-amd64; touch tree/boot/vmlinuz-6.1 ;;
*) mkdir -p linux-source-6.1/scripts/kconfig
   printf '#!/bin/sh\\ncp "$5" .config\\n' > linux-source-6.1/scripts/kconfig/merge_config.sh
   chmod 755 linux-source-6.1/scripts/kconfig/merge_config.sh
   tar -cJf linux-source-6.1.tar.xz linux-source-6.1; tar -c ./linux-source-6.1.tar.xz ;;
esac""",
    "patch": "cat > /dev/null",
    "make": """
for last; do :; done
case $last in
vmlinux) echo built >> $BUILT; touch vmlinux ;;
kernelrelease) echo 6.1 ;;
esac""",
    "strip": "touch out/vmlinux",
    "python3": "echo built >> $BUILT; touch $3",
}  # fmt: skip
"""What the scripts call, as programs that take no time."""


@pytest.mark.parametrize("script", ["build", "fetch-debian"])
def test_kernels_made_at_the_same_time_are_made_once(script: str, tmp_path: Path) -> None:
    """Two checkouts with one cache: the second waits, and fails neither itself nor the first."""
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    built = tmp_path / "built"
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(tmp_path / "cache"),
               "BUILT": str(built), "ARCH": "amd64"}  # fmt: skip
    both = [
        subprocess.Popen([KERNEL / script], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    (where,) = {out.splitlines()[-1] for out, _ in said}
    assert (Path(where) / "vmlinux").exists() and built.read_text() == "built\n"
