"""Installs a bundle: verify, unpack beside, switch, look whether the server is well, else switch back.

    1  every byte of the file is verified                  nothing is written
    2  it is unpacked below /var/lib/hypeman-bundle        the host is as it was
    3  programs and settings of the old version are copied
    4  the journal says `switching`; a systemd timer rolls back unless the installation completes
    5  the server stops, its records are copied, install.sh of the new version runs and starts it
    6  the new server answers with its version             journal: `installed`
       or it does not: files, settings and records are those of before, the old server runs    journal: `rolled-back`
    7  images are imported, instances created

A kill before 4 changes nothing. After it, the timer (or the next ``hypeman bundle``) rolls back. Rolling back may
itself be killed and repeated: it only copies from what steps 3 and 5 saved, and the journal is written last. VMs belong
to another unit and continue throughout. Debian packages of the bundle are not removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import msgspec

from hypeman import architecture
from hypeman.bundle.format import BadBundle, File, Kind, Verified, check_file, read_files, read_manifest
from hypeman.bundle.minisign import PublicKey
from hypeman.config import HypervisorConfig, load_config
from hypeman.errors import Conflict, HypemanError
from hypeman.store import Store
from hypeman.text import one_line

STATE = "var/lib/hypeman-bundle"
DROP_INS = "etc/hypeman/config.d"
VMMS = "usr/lib/hypeman-vmm"
PACKAGED = "usr/lib/systemd/system/hypeman.service"
"""Where packages of distributions have the unit; install.sh puts it below /etc."""
SAVED = (
    "usr/lib/hypeman",
    VMMS,
    "usr/bin/hypeman",
    "usr/share/hypeman",
    "usr/share/doc/hypeman",
    "etc/hypeman",
    "etc/modules-load.d/hypeman.conf",
    "etc/systemd/system/hypeman.service",
    "etc/systemd/system/hypeman-vms.service",
    "etc/systemd/system/hypeman.slice",
)
"""What an installation changes, relative to the root directory."""
_START_LIMIT = 600.0
_TOOL_LIMIT = 1800.0
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"}


class InstallFailed(HypemanError):
    """The bundle was not installed; the message says in which state the host is."""


class Journal(msgspec.Struct, frozen=True, kw_only=True):
    """What was done last; ``state.json``."""

    phase: str
    """``switching``, ``installed`` or ``rolled-back``."""
    name: str
    version: str
    digest: str
    at: datetime
    had_previous: bool
    """A version was installed before; it is in ``previous``."""
    store: str = ""
    """Directory of the records that ``previous/store`` is a copy of; empty if none were saved."""
    reason: str = ""
    """Why it was rolled back."""


class Service(Protocol):
    """The server as a service of its host."""

    def stop(self) -> None:
        """Stop the server if it runs; VMs continue."""
        ...

    def start(self) -> None:
        """Start the server with the unit files that are there now. Raises HypemanError."""
        ...

    def why_unhealthy(self, version: str) -> str:
        """Empty if the server of this version answers; else the reason."""
        ...

    def guard(self, command: Sequence[str]) -> None:
        """Run ``command`` some minutes from now, unless ``unguard`` is called before."""
        ...

    def unguard(self) -> None: ...


class Systemd:
    """hypeman.service of this host."""

    _GUARD = "hypeman-bundle-guard"

    def stop(self) -> None:
        subprocess.run(["systemctl", "stop", "hypeman.service"], env=_ENVIRONMENT, capture_output=True, timeout=300)

    def start(self) -> None:
        run(["systemctl", "daemon-reload"], timeout=60)
        run(["systemctl", "start", "hypeman.service"], timeout=_START_LIMIT)

    def why_unhealthy(self, version: str) -> str:
        deadline = time.monotonic() + 60
        while True:
            why = self._why(version)
            if not why or time.monotonic() > deadline:
                return why
            time.sleep(0.5)

    def _why(self, version: str) -> str:
        try:
            output = run(["hypeman", "-o", "json", "capabilities"], timeout=60)
            found = msgspec.json.decode(output)["server"]["version"]
        except (HypemanError, msgspec.DecodeError, KeyError, TypeError) as error:
            return f"its server does not answer: {error}"
        return "" if found == version else f"the server that answers is {found}, not {version}"

    def guard(self, command: Sequence[str]) -> None:
        run(["systemd-run", "--quiet", "--collect", f"--unit={self._GUARD}", "--on-active=15min", *command], timeout=60)

    def unguard(self) -> None:
        stop = ["systemctl", "stop", f"{self._GUARD}.timer"]
        subprocess.run(stop, env=_ENVIRONMENT, capture_output=True, timeout=60)


def run(argv: Sequence[str], *, timeout: float = _TOOL_LIMIT) -> bytes:
    """The output of a helper program, which runs in a clean environment. Raises HypemanError with what it said."""
    try:
        result = subprocess.run(argv, env=_ENVIRONMENT, capture_output=True, timeout=timeout, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HypemanError(f"{argv[0]}: {error}") from None
    if result.returncode:
        output = (result.stderr or result.stdout).decode(errors="replace").strip()
        raise HypemanError(f"{argv[0]}: {one_line(output[-500:]) or f'exit code {result.returncode}'}")
    return result.stdout


class Site:
    """One host, or a directory that stands for its root."""

    def __init__(self, service: Service, root: Path = Path("/")) -> None:
        self.root = root
        self.service = service
        self.state = root / STATE
        self._previous = self.state / "previous"

    # What is known

    def journal(self) -> Journal | None:
        try:
            return msgspec.json.decode((self.state / "state.json").read_bytes(), type=Journal)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            raise Conflict(f"{self.state / 'state.json'} cannot be read: {error}") from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Held by one installation or rollback at a time; an unfinished one is the holder's to finish."""
        self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self.state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    # The two operations

    def install(self, file: Path, trusted: Sequence[PublicKey], say: Callable[[str], None]) -> Verified:
        """Install the bundle ``file``. Raises BadBundle, BadSignature, InstallFailed and other HypemanErrors."""
        verified = check_file(file, trusted)
        manifest = verified.manifest
        say(f"verified: {verified.comment}, signed with key {verified.key}")
        if manifest.architecture != architecture.HOST.name:
            raise BadBundle(f"the bundle is for {manifest.architecture}, this host is {architecture.HOST.name}")
        if (self.root / PACKAGED).exists():
            raise Conflict("hypeman is installed as a package here: upgrade that, or remove it first")
        with self.locked():
            if self._unfinished():
                say("an earlier installation was interrupted; rolling it back first")
                self._roll_back("it was interrupted")
            journal = self.journal()
            if journal is not None and (journal.phase, journal.digest) == ("installed", verified.digest):
                say("this bundle is installed already")
                return verified
            staged = self._unpack(file, verified)
            try:
                self._packages(staged, manifest.of(Kind.PACKAGE), say)
                self._switch(staged, verified, say)
                self._fill(staged, verified, say)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
        return verified

    def roll_back(self, *, only_unfinished: bool = False) -> Journal | None:
        """Go back to the version before the last installation; None if there is nothing to do."""
        with self.locked():
            journal = self.journal()
            if journal is None or journal.phase == "rolled-back" or (only_unfinished and journal.phase == "installed"):
                return None
            if not journal.had_previous and journal.phase == "installed":
                raise Conflict("there is no previous version; /usr/share/hypeman/uninstall.sh removes this one")
            return self._roll_back("by request" if journal.phase == "installed" else "it was interrupted")

    # Steps

    def _unfinished(self) -> bool:
        journal = self.journal()
        return journal is not None and journal.phase == "switching"

    def _unpack(self, file: Path, verified: Verified) -> Path:
        """Everything below a fresh directory; hashed again, since the file may have changed."""
        files = verified.manifest.files
        [appliance] = verified.manifest.of(Kind.APPLIANCE)
        # the files, and unpacked, which is three times as large, the new version and a copy of the old one
        wanted = sum(file.size for file in files) + 8 * appliance.size
        free = shutil.disk_usage(self.state).free
        if free < wanted:
            have = f"{self.state} has {free >> 20} MB free, the bundle needs {wanted >> 20} MB"
            raise InstallFailed(f"{have}; nothing was changed")
        for old in self.state.glob("staged.*"):
            shutil.rmtree(old)
        staged = self.state / f"staged.{verified.digest[:16]}"
        staged.mkdir(mode=0o700)
        with contextlib.ExitStack() as opened, file.open("rb") as source:

            def receive(each: File) -> Callable[[bytes], object]:
                path = staged / each.name
                path.parent.mkdir(mode=0o700, exist_ok=True)
                return opened.enter_context(path.open("xb")).write

            again = read_manifest(source, (verified.key,))
            if again.digest != verified.digest:
                raise BadBundle("the bundle was replaced while it was being installed")
            read_files(source, again.manifest, receive)
        (staged / "program").mkdir(mode=0o755)
        run(["tar", "-xzf", str(staged / appliance.name), "-C", str(staged / "program"), "--strip-components=1",
             "--no-same-owner"])  # fmt: skip
        return staged

    def _packages(self, staged: Path, packages: Sequence[File], say: Callable[[str], None]) -> None:
        if packages:
            say(f"installing {len(packages)} Debian packages")
            run(["dpkg", "--install", *(str(staged / package.name) for package in packages)])

    def _switch(self, staged: Path, verified: Verified, say: Callable[[str], None]) -> None:
        manifest = verified.manifest
        had_previous = (self.root / "usr/lib/hypeman").exists()
        self._save()
        journal = Journal(
            phase="switching",
            name=manifest.name,
            version=manifest.version,
            digest=verified.digest,
            at=datetime.now(UTC),
            had_previous=had_previous,
        )
        self._write(journal)
        try:
            program = staged / "program/bundle/hypeman"
            self.service.guard([str(program), "bundle", "rollback", "--if-unfinished"])
            self.service.stop()
            if store := self._save_store():
                journal = msgspec.structs.replace(journal, store=str(store))
                self._write(journal)
            self._settings(staged, verified)
            say(f"installing hypeman {manifest.version}")
            run([str(staged / "program/install.sh")], timeout=_START_LIMIT)
            why = self.service.why_unhealthy(manifest.version)
        except Exception as error:
            why = str(error)
        except BaseException:
            self._roll_back("it was interrupted", staged)
            raise
        if why:
            after = self._roll_back(why, staged)
            state = "the previous version is running again" if after.had_previous else "hypeman is not installed"
            raise InstallFailed(f"hypeman {manifest.version} did not start correctly: {why}; {state}")
        self._write(msgspec.structs.replace(journal, phase="installed"))
        self.service.unguard()

    def _save(self) -> None:
        shutil.rmtree(self._previous, ignore_errors=True)
        self._previous.mkdir(mode=0o700)
        for name in SAVED:
            if os.path.lexists(self.root / name):
                _copy(self.root / name, self._previous / "root" / name)
        _sync(self._previous)

    def _save_store(self) -> Path | None:
        """Copy the records of the server, which has ended; the new version may change their format."""
        settings = self.root / "etc/hypeman/config.yaml"
        store = load_config(settings, {}).paths.store if settings.is_file() else Path("/var/lib/hypeman/store")
        store = self.root / store.relative_to("/")
        if not (store / "data.mdb").exists():
            return None
        saved = self._previous / "store"
        saved.mkdir(mode=0o700)
        Store.copy(store, saved)
        _sync(saved)
        return store

    def _settings(self, staged: Path, verified: Verified) -> None:
        """VMMs, and drop-ins; those of an earlier bundle are replaced."""
        drop_ins, vmms = self.root / DROP_INS, self.root / VMMS
        drop_ins.mkdir(mode=0o755, parents=True, exist_ok=True)
        for old in drop_ins.glob("50-bundle*.yaml"):
            old.unlink()
        keys: dict[str, str] = {}
        for file in verified.manifest.of(Kind.VMM):
            name = Path(file.name).name
            vmms.mkdir(mode=0o755, parents=True, exist_ok=True)
            _place(staged / file.name, vmms / name, 0o755)
            key = f"{name.replace('-', '_')}_binary"
            if key in HypervisorConfig.__struct_fields__:
                keys[key] = f"/{VMMS}/{name}"
        if keys:
            lines = "".join(f"  {key}: {value}\n" for key, value in keys.items())
            own = staged / "vmm.yaml"
            own.write_text(f"# written by hypeman bundle install\nhypervisor:\n{lines}")
            _place(own, drop_ins / "50-bundle-vmm.yaml", 0o600)
        for number, file in enumerate(verified.manifest.of(Kind.CONFIG)):
            _place(staged / file.name, drop_ins / f"50-bundle-{number:03}.yaml", 0o600)

    def _fill(self, staged: Path, verified: Verified, say: Callable[[str], None]) -> None:
        """Images and instances. What fails here leaves the new version installed."""
        for file in verified.manifest.of(Kind.IMAGE):
            say(f"importing {file.reference}")
            run(["hypeman", "image", "import", "--name", file.reference, str(staged / file.name)])
        for file in verified.manifest.of(Kind.COMPOSE):
            say("creating instances")
            stack = staged / "stack" / verified.manifest.name / "compose.yaml"  # a stack is called as its directory
            stack.parent.mkdir(parents=True)
            stack.hardlink_to(staged / file.name)
            run(["hypeman", "compose", "--file", str(stack), "up"])

    def _roll_back(self, reason: str, staged: Path | None = None) -> Journal:
        """Idempotent: copies what was saved, and writes the journal last."""
        journal = self.journal()
        assert journal is not None
        self.service.stop()
        if journal.had_previous:
            for name in SAVED:
                _restore(self._previous / "root" / name, self.root / name)
            if journal.store:
                _restore(self._previous / "store", Path(journal.store))
            self.service.start()
        else:
            remove = (staged / "program/uninstall.sh") if staged else self.root / "usr/share/hypeman/uninstall.sh"
            with contextlib.suppress(HypemanError):  # may be there in part only
                run([str(remove)])
        after = msgspec.structs.replace(journal, phase="rolled-back", reason=reason, at=datetime.now(UTC))
        self._write(after)
        self.service.unguard()
        return after

    def _write(self, journal: Journal) -> None:
        new = self.state / "state.json.new"
        with new.open("wb") as file:
            file.write(msgspec.json.encode(journal))
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.state / "state.json")
        _sync(self.state)


def _copy(source: Path, target: Path) -> None:
    """A copy with owners, modes, times and links; ``target`` does not exist."""
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    run(["cp", "-a", "--no-target-directory", str(source), str(target)])


def _restore(saved: Path, place: Path) -> None:
    """Make ``place`` what ``saved`` is, or absent if that is. The old content goes when the new one is complete."""
    new, old = place.with_name(f".{place.name}.restored"), place.with_name(f".{place.name}.old")
    for left in (new, old):
        _remove(left)
    if os.path.lexists(saved):
        _copy(saved, new)
    if os.path.lexists(place):
        place.rename(old)
    if os.path.lexists(new):
        new.rename(place)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _place(source: Path, target: Path, mode: int) -> None:
    new = target.with_name(f".{target.name}.new")
    shutil.copyfile(source, new)
    new.chmod(mode)
    new.replace(target)


def _sync(directory: Path) -> None:
    """Everything written so far to the file system of ``directory`` is on its disk."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    os.sync()
