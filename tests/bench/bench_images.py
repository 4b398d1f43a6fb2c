"""From a registry, or an OCI layout, to a root disk: against skopeo, umoci and mkfs on the same image.

The image has 10 layers of gzip, 300 MB unpacked, made of files of this host's /usr. Wall time, since
using both cores is part of the point. Rounds are few: the peers need many seconds each.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from tests.bench.harness import Result, compare
from tests.bench.images_child import Outcome
from tests.images.conftest import push, running_registry
from tests.images.layout import ImageFiles

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "3"))
_SIZE = 300 << 20
_LAYERS = 10
_ROOT = Path(__file__).parents[2]
_BUILD = _ROOT / "build" / "bench-images"


def run() -> list[Result]:
    for program in ("docker-registry", "skopeo", "umoci", "mkfs.erofs", "mke2fs"):
        if shutil.which(program) is None:
            return []
    layout = _layout()
    work = _BUILD / "work"
    memory: dict[str, list[int]] = {"server": [], "worker": [], "umoci": [], "skopeo": []}
    sizes: dict[str, int] = {}

    def ours(*arguments: str) -> Callable[[], float]:
        def once() -> float:
            _empty(work)
            argv = [sys.executable, "-m", "tests.bench.images_child", str(work / "data"), *arguments]
            made = subprocess.run(argv, check=True, stdout=subprocess.PIPE, cwd=_ROOT)
            outcome = msgspec.json.decode(made.stdout, type=Outcome)
            memory["server"].append(outcome.server_memory)
            memory["worker"].append(outcome.worker_memory)
            sizes["ours"] = outcome.disk_bytes
            return outcome.seconds

        return once

    def skopeo(name: str) -> Callable[[], float]:
        def once() -> float:
            _empty(work)
            return _timed(_skopeo(name), memory["skopeo"])

        return once

    def unpack_and_make(*mkfs: str, pull: str = "") -> Callable[[], float]:
        def once() -> float:
            _empty(work)
            seconds = _timed(_skopeo(pull), memory["skopeo"]) if pull else 0.0
            source = work / "oci" if pull else layout
            unpack = ["umoci", "unpack", "--image", f"{source}:latest", str(work / "bundle")]
            seconds += _timed(unpack, memory["umoci"])
            seconds += _timed([*mkfs], [])
            sizes["theirs"] = (work / "disk").stat().st_size
            return seconds

        return once

    def _skopeo(name: str) -> list[str]:
        return ["skopeo", "--insecure-policy", "copy", "-q", "--src-tls-verify=false", f"docker://{name}",
                f"oci:{work}/oci:latest"]  # fmt: skip

    disk, rootfs = str(work / "disk"), str(work / "bundle" / "rootfs")
    erofs = ["mkfs.erofs", "-zlz4", disk, rootfs]
    ext4 = ["mke2fs", "-q", "-t", "ext4", "-d", rootfs, disk, "600M"]
    with running_registry(_BUILD / "registry") as host:
        name = f"{host}/bench:1"
        push(layout, name)
        results = [
            compare("images.pull_to_erofs", "s", ours("pull", host, name),
                    "skopeo copy + umoci unpack + mkfs.erofs", unpack_and_make(*erofs, pull=name), ROUNDS),
            compare("images.pull_to_erofs_against_copy", "s", ours("pull", host, name),
                    "skopeo copy", skopeo(name), ROUNDS),
            compare("images.import_to_erofs", "s", ours("import", str(layout), "erofs"),
                    "umoci unpack + mkfs.erofs", unpack_and_make(*erofs), ROUNDS),
        ]  # fmt: skip
        results.append(
            Result("images.erofs_size", sizes["ours"] / 1e6, "MB", "mkfs.erofs -zlz4", sizes["theirs"] / 1e6)
        )
        results.append(
            compare("images.import_to_ext4", "s", ours("import", str(layout), "ext4"),
                    "umoci unpack + mke2fs -d", unpack_and_make(*ext4), 1)
        )  # fmt: skip
    seconds = results[2].value
    results.append(Result("images.import_speed", _SIZE / 1e6 / seconds, "MB/s unpacked"))
    results.append(Result("images.server_memory", max(memory["server"]) / 1e6, "MB"))
    results.append(
        Result("images.worker_memory", max(memory["worker"]) / 1e6, "MB", "umoci", max(memory["umoci"]) / 1e6)
    )
    shutil.rmtree(work)
    return results


def _layout() -> Path:
    """The image, made once."""
    layout = _BUILD / "oci"
    if not (layout / "index.json").exists():
        shutil.rmtree(layout, ignore_errors=True)
        _BUILD.mkdir(parents=True, exist_ok=True)
        ImageFiles(_layers()).write_layout(layout)
    return layout


def _layers() -> list[bytes]:
    """Files of this host, in the order of their names, until there is enough."""
    layers, number, at = [], 0, 0
    files = sorted(file for root in ("/usr/bin", "/usr/lib", "/usr/share") for file in Path(root).rglob("*"))
    for number in range(_LAYERS):
        path = _BUILD / "layer.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
            while at < len(files) and archive.offset < _SIZE // _LAYERS:
                if files[at].is_file() and not files[at].is_symlink() and files[at].stat().st_size < 20 << 20:
                    archive.add(files[at], f"layer{number}/{files[at].relative_to('/')}", recursive=False)
                at += 1
        layers.append(path.read_bytes())
        path.unlink()
    return layers


def _empty(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    os.sync()  # what an earlier round has left to write is not this one's


def _timed(argv: list[str], memory: list[int]) -> float:
    """Seconds of a program; its most memory is added to ``memory``."""
    begin = time.perf_counter()
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, argv
    memory.append(usage.ru_maxrss * 1024)
    return time.perf_counter() - begin


if __name__ == "__main__":
    for result in run():
        print(result)
