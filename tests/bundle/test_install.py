"""Installing a bundle: the new version runs, or the old one does, wherever it failed or was killed.

The appliance is a small stand-in with an install.sh of its own below a directory that stands for the root; the
service is a fake that runs what is installed there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
import trio

from hypeman import architecture
from hypeman.bundle import install as module
from hypeman.bundle.format import BadBundle, BadSignature, Kind, Manifest, check_file, describe, write
from hypeman.bundle.install import InstallFailed, Journal, Site
from hypeman.bundle.minisign import new_key
from hypeman.errors import Conflict, HypemanError
from hypeman.store import Store, Table

KEY = new_key()
PORTS: Table[int] = Table("ports", int)


class FakeService:
    """Runs ``usr/lib/hypeman/hypeman``, a file with a version; ``broken`` versions do not come up."""

    def __init__(self, root: Path, broken: Sequence[str] = ()) -> None:
        self.root = root
        self.broken = broken
        self.running = ""
        self.guarded: tuple[str, ...] = ()

    def stop(self) -> None:
        self.running = ""

    def start(self) -> None:
        version = (self.root / "usr/lib/hypeman/hypeman").read_text().strip()
        if version in self.broken:
            raise HypemanError(f"{version} does not start")
        self.running = version

    def why_unhealthy(self, version: str) -> str:
        try:
            self.start()
        except HypemanError as error:
            return error.message
        return "" if self.running == version else f"{self.running} answers"

    def guard(self, command: Sequence[str]) -> None:
        self.guarded = tuple(command)

    def unguard(self) -> None:
        self.guarded = ()


INSTALL = """#!/bin/sh
set -e
root={root}
mkdir -p $root/usr/lib $root/etc/hypeman $root/usr/share/hypeman
{more}
rm -rf $root/usr/lib/hypeman
cp -a "$(dirname "$0")/bundle" $root/usr/lib/hypeman
[ -e $root/etc/hypeman/config.yaml ] || echo 'data_dir: /data' > $root/etc/hypeman/config.yaml
cp "$(dirname "$0")/uninstall.sh" $root/usr/share/hypeman/
"""


def bundle(tmp_path: Path, version: str, *, more: str = "", extra: Sequence[tuple[Path, Kind]] = ()) -> Path:
    """A bundle whose appliance installs below ``tmp_path/root``."""
    tree = tmp_path / f"tree-{version}"
    (tree / "bundle").mkdir(parents=True)
    (tree / "bundle/hypeman").write_text(f"{version}\n")
    (tree / "bundle" / f"only-{version}").write_text("")
    (tree / "install.sh").write_text(INSTALL.format(root=tmp_path / "root", more=more))
    (tree / "uninstall.sh").write_text(f"#!/bin/sh\nrm -rf {tmp_path}/root/usr/lib/hypeman\n")
    for name in ("install.sh", "uninstall.sh", "bundle/hypeman"):
        (tree / name).chmod(0o755)
    appliance = tmp_path / f"hypeman-{version}-linux-{architecture.HOST.name}.tar.gz"
    with tarfile.open(appliance, "w:gz") as tar:
        tar.add(tree, "hypeman")
    parts = [(appliance, Kind.APPLIANCE), *extra]
    manifest = Manifest(
        format=1,
        name="edge",
        version=version,
        architecture=architecture.HOST.name,
        created_at=datetime.now(UTC),
        files=tuple(describe(path, kind) for path, kind in parts),
    )
    target = tmp_path / f"{version}.hypeman"
    with target.open("wb") as file:
        write(file, manifest, [path for path, _ in parts], KEY)
    return target


class Bench:
    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path
        self.root = tmp_path / "root"
        (self.root / "var/lib").mkdir(parents=True)
        self.service = FakeService(self.root)
        self.site = Site(self.service, self.root)
        self.messages: list[str] = []

    def install(self, file: Path) -> None:
        self.site.install(file, [KEY.public], self.messages.append)

    def installed(self) -> str:
        """The version whose files are there, whole."""
        folder = self.root / "usr/lib/hypeman"
        if not folder.exists():
            return ""
        version = (folder / "hypeman").read_text().strip()
        assert sorted(os.listdir(folder)) == ["hypeman", f"only-{version}"], "a mixture of versions"
        return version

    def journal(self) -> Journal:
        found = self.site.journal()
        assert found is not None
        return found

    def write_record(self, value: int) -> None:
        async def put() -> None:
            (self.root / "data/store").mkdir(parents=True, exist_ok=True)
            store = Store.open(self.root / "data/store")
            try:
                async with store.serving():
                    await store.write(lambda txn: txn.put(PORTS, "web", value))
            finally:
                store.close()

        trio.run(put)

    def record(self) -> int | None:
        store = Store.open(self.root / "data/store")
        try:
            return store.read(lambda txn: txn.get(PORTS, "web"))
        finally:
            store.close()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_first_installation_and_an_upgrade(bench: Bench, tmp_path: Path) -> None:
    settings, vmm = tmp_path / "000.yaml", tmp_path / "firecracker"
    settings.write_text("port: 1234\n")
    vmm.write_text("#!/bin/sh\n")
    bench.install(bundle(tmp_path, "1.0", extra=[(settings, Kind.CONFIG), (vmm, Kind.VMM)]))
    assert (bench.installed(), bench.service.running, bench.journal().phase) == ("1.0", "1.0", "installed")
    assert not bench.service.guarded, "the guard is off"
    drop_ins = bench.root / "etc/hypeman/config.d"
    assert (drop_ins / "50-bundle-000.yaml").read_text() == "port: 1234\n"
    assert "firecracker_binary: /usr/lib/hypeman-vmm/firecracker" in (drop_ins / "50-bundle-vmm.yaml").read_text()
    assert os.access(bench.root / "usr/lib/hypeman-vmm/firecracker", os.X_OK)
    assert not list(bench.site.state.glob("staged.*"))
    with pytest.raises(Conflict, match="no previous version"):
        bench.site.roll_back()
    before = tree_of(bench.root)
    bench.install(tmp_path / "1.0.hypeman")
    assert tree_of(bench.root) == before and "installed already" in bench.messages[-1]

    bench.install(bundle(tmp_path, "2.0"))
    assert (bench.installed(), bench.service.running) == ("2.0", "2.0")
    assert not list(drop_ins.iterdir()), "those of the earlier bundle are gone"
    bench.site.roll_back()
    assert (bench.installed(), bench.service.running, bench.journal().phase) == ("1.0", "1.0", "rolled-back")
    assert (drop_ins / "50-bundle-000.yaml").exists()
    assert bench.site.roll_back() is None


@pytest.mark.parametrize("how", ["does not start", "install.sh fails", "install.sh half way"])
def test_a_version_that_does_not_come_up_is_rolled_back(bench: Bench, tmp_path: Path, how: str) -> None:
    """Programs, settings and records are those of before, even if the new version has changed the records."""
    bench.install(bundle(tmp_path, "1.0"))
    bench.write_record(1)
    config = bench.root / "etc/hypeman/config.yaml"
    before = config.read_text()
    spoil = f"rm -f {bench.root}/data/store/data.mdb; echo 'x: y' >> {config}"
    more = {
        "does not start": spoil,
        "install.sh fails": f"{spoil}; exit 1",
        "install.sh half way": f"{spoil}; rm {bench.root}/usr/lib/hypeman/hypeman; exit 1",
    }[how]
    bench.service.broken = ["2.0"]
    with pytest.raises(InstallFailed, match="the previous version is running again"):
        bench.install(bundle(tmp_path, "2.0", more=more))
    assert (bench.installed(), bench.service.running, bench.journal().phase) == ("1.0", "1.0", "rolled-back")
    assert config.read_text() == before and bench.record() == 1
    bench.service.broken = []
    bench.install(tmp_path / "1.0.hypeman")
    assert bench.journal().phase == "installed"


def test_a_first_version_that_does_not_come_up_is_removed(bench: Bench, tmp_path: Path) -> None:
    bench.service.broken = ["1.0"]
    with pytest.raises(InstallFailed, match="hypeman is not installed"):
        bench.install(bundle(tmp_path, "1.0"))
    assert bench.installed() == ""


def altered(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "cut off":
        data = data[: len(data) // 2]
    else:
        data[{"signature": 1100, "manifest": 600, "content": len(data) // 2, "end": -1}[how]] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("how", ["signature", "manifest", "content", "end", "cut off", "other key"])
def test_what_is_not_whole_or_not_signed_changes_nothing(bench: Bench, tmp_path: Path, how: str) -> None:
    bench.install(bundle(tmp_path, "1.0"))
    before = tree_of(bench.root)
    file = bundle(tmp_path, "2.0")
    if how != "other key":
        altered(file, how)
    trusted = [new_key().public] if how == "other key" else [KEY.public]
    with pytest.raises((BadBundle, BadSignature)):
        bench.site.install(file, trusted, bench.messages.append)
    assert tree_of(bench.root) == before and bench.service.running == "1.0"


def test_a_file_that_changes_after_it_was_verified_is_not_installed(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.install(bundle(tmp_path, "1.0"))
    file = bundle(tmp_path, "2.0")

    def check_then_alter(path: Path, trusted: object) -> object:
        verified = check_file(path, trusted)  # type: ignore[arg-type]
        altered(file, "content")
        return verified

    monkeypatch.setattr(module, "check_file", check_then_alter)
    with pytest.raises(BadBundle):
        bench.install(file)
    assert (bench.installed(), bench.service.running) == ("1.0", "1.0")


def test_other_hosts_and_packaged_ones_are_refused(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = bundle(tmp_path, "1.0")
    with monkeypatch.context() as patch:
        other = next(each for each in architecture.ALL if each is not architecture.HOST)
        patch.setattr(architecture, "HOST", other)
        with pytest.raises(BadBundle, match=f"this host is {other.name}"):
            bench.install(file)
    (bench.root / "usr/lib/systemd/system").mkdir(parents=True)
    (bench.root / "usr/lib/systemd/system/hypeman.service").write_text("")
    with pytest.raises(Conflict, match="installed as a package"):
        bench.install(file)
    assert bench.installed() == ""


def tree_of(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the installer runs after it."""


EFFECTS = ("_copy", "_restore", "_place", "run", "_sync")


def kill_at(patch: pytest.MonkeyPatch, number: int) -> Callable[[], bool]:
    """End the program before its ``number``th effect, and let no clean-up run. Returns whether it happened."""
    count = 0

    def dead(*words: object, **more: object) -> None:
        raise Killed

    def counting(effect: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*words: object, **more: object) -> object:
            nonlocal count
            count += 1
            if count >= number:
                raise Killed
            return effect(*words, **more)

        return wrapped

    for name in EFFECTS:
        patch.setattr(module, name, counting(getattr(module, name)))
    rmtree = shutil.rmtree
    patch.setattr(shutil, "rmtree", lambda *w, **m: rmtree(*w, **m) if count < number else None)
    write = Site._write
    patch.setattr(Site, "_write", lambda site, journal: write(site, journal) if count < number else dead())
    return lambda: count >= number


def test_killed_before_every_effect_the_old_version_is_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At first nothing has changed; from the switch on the guard's command brings everything back."""
    number, switched = 0, 0
    while True:
        number += 1
        bench = Bench(tmp_path / str(number))
        bench.install(bundle(bench.path, "1.0"))
        bench.write_record(1)
        file = bundle(bench.path, "2.0", more=f"rm -f {bench.root}/data/store/data.mdb")
        with monkeypatch.context() as patch:
            happened = kill_at(patch, number)
            with contextlib.suppress(Killed):
                bench.install(file)
        if not happened():
            assert bench.installed() == "2.0"
            break
        if (bench.journal().phase, bench.journal().version) == ("installed", "2.0"):
            assert (bench.installed(), bench.service.running) == ("2.0", "2.0"), "killed when it was done"
            continue
        if bench.journal().phase == "switching":
            switched += 1
            assert bench.service.guarded[1:] == ("bundle", "rollback", "--if-unfinished") or bench.installed() == "1.0"
            with monkeypatch.context() as patch:  # the guard is killed as well, the next one not
                kill_at(patch, 1 + number % 7)
                with contextlib.suppress(Killed):
                    bench.site.roll_back(only_unfinished=True)
            bench.site.roll_back(only_unfinished=True)
            assert bench.service.running == "1.0"
        assert bench.installed() == "1.0" and bench.record() == 1
        bench.install(file)
        assert (bench.installed(), bench.journal().phase) == ("2.0", "installed")
    assert switched > 3 and number > 10


def test_a_real_kill_while_it_unpacks(bench: Bench, tmp_path: Path) -> None:
    """SIGKILL of a process that installs, held in the middle by a package that does not end."""
    bench.install(bundle(tmp_path, "1.0"))
    file = bundle(tmp_path, "2.0", more=f"touch {tmp_path}/reached; rm -rf {bench.root}/usr/lib/hypeman; sleep 60")
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
        "from tests.bundle.test_install import FakeService, KEY; from hypeman.bundle.install import Site;"
        "from hypeman.bundle.minisign import parse_public_key; root = Path(sys.argv[2]);"
        "Site(FakeService(root), root).install(Path(sys.argv[3]), [parse_public_key(sys.argv[4].encode())], print)"
    )
    top = str(Path(__file__).parents[2])
    key = KEY.public.render().decode()
    process = subprocess.Popen([sys.executable, "-c", script, top, bench.root, file, key], start_new_session=True)
    try:
        while not (tmp_path / "reached").exists():
            assert process.poll() is None
            os.sched_yield()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert bench.journal().phase == "switching"
    bench.site.roll_back(only_unfinished=True)
    assert (bench.installed(), bench.service.running) == ("1.0", "1.0")


def test_the_journal_reads_back(bench: Bench) -> None:
    assert bench.site.journal() is None
    with bench.site.locked():
        (bench.site.state / "state.json").write_text("{")
    with pytest.raises(Conflict):
        bench.site.journal()
    assert msgspec.json.decode(msgspec.json.encode(KEY.public)) is not None
