"""What starts the appliance: it maps the loader beside it, as if the kernel had started the program itself."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from tests.packaging.build_steps import build_step

TOP = Path(__file__).parents[2]
SHELL = Path("/bin/dash")
LOADER = build_step("bring_c_library").loader_of(SHELL)

REPORT = """
echo "words $0 $*"
echo "name $(cat /proc/$$/comm)"
echo "file $(readlink /proc/$$/exe)"
echo "line $(tr '\\0' '|' < /proc/$$/cmdline)"
sed -n 's,^[0-9a-f-]* r-xp .* \\(/.*\\),code \\1,p' /proc/$$/maps
sed -n 's,^[0-9a-f-]* r-xp .* \\(/.*\\),child \\1,p' /proc/self/maps
env | sed -n 's/^\\(_PYI\\|LD_\\)/variable &/p'
exit 7
"""


@pytest.fixture(scope="module")
def bring() -> ModuleType:
    return build_step("bring_c_library")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, bring: ModuleType) -> Path:
    """A bundle whose program is a shell."""
    made = tmp_path_factory.mktemp("made") / "hypeman"
    subprocess.run(["make", "-s", "-C", TOP / "ext/start", f"OUT={made}"], check=True)
    folder = tmp_path_factory.mktemp("a bundle")
    (folder / "_internal").mkdir()
    shutil.copy(made, folder)
    shutil.copy(SHELL, folder / "_internal/bootloader")
    bring.bring(folder)
    return folder


def report(program: Path, **variables: str) -> dict[str, list[str]]:
    """What the shell says of itself: kind → lines."""
    environ = {"PATH": "/usr/bin:/bin", **variables}
    argv = [str(program), "-c", REPORT, "zero", "a b", ""]
    result = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=30)
    assert result.returncode == 7, result.stderr
    reported: dict[str, list[str]] = {}
    for line in result.stdout.splitlines():
        kind, _, text = line.partition(" ")
        reported.setdefault(kind, []).append(text)
    return reported


def test_the_process_is_that_of_the_program_that_was_executed(bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "hypeman"
    link.symlink_to(bundle / "hypeman")
    reported = report(link)
    assert reported["words"] == ["zero a b "] and reported["name"] == ["hypeman"]
    assert reported["file"] == [str(bundle / "hypeman")]
    assert reported["line"][0].startswith(f"{link}|-c|")


def test_nothing_of_the_hosts_is_mapped_and_nothing_of_ours_by_others(bundle: Path) -> None:
    preload = str(LOADER.resolve().parent / "libm.so.6")
    reported = report(bundle / "hypeman", LD_PRELOAD=preload, LD_AUDIT=preload, LD_LIBRARY_PATH="/opt/lib")
    names = {"hypeman", "_internal/bootloader", "_internal/libc.so.6", f"_internal/{LOADER.name}"}
    assert set(reported["code"]) == {str(bundle / name) for name in names}
    assert "variable LD_LIBRARY_PATH=/opt/lib" in {f"variable {line}" for line in reported["variable"]}
    assert not [line for line in reported["variable"] if line.startswith(("LD_PRELOAD", "LD_AUDIT"))]
    assert reported["child"] and not [path for path in reported["child"] if path.startswith(str(bundle))]


def test_what_an_enclosing_bundle_set_is_replaced(bundle: Path) -> None:
    reported = report(
        bundle / "hypeman", _PYI_ARCHIVE_FILE="/other", _PYI_PARENT_PROCESS_LEVEL="1", _PYI_SPLASH_IPC="1"
    )
    assert sorted(reported["variable"]) == [f"_PYI_ARCHIVE_FILE={bundle}/hypeman", "_PYI_PARENT_PROCESS_LEVEL=-1"]


def test_a_missing_loader_is_told(bundle: Path, tmp_path: Path) -> None:
    shutil.copy(bundle / "hypeman", tmp_path / "hypeman")
    result = subprocess.run([tmp_path / "hypeman"], capture_output=True, text=True)
    assert result.returncode == 127
    assert result.stderr == f"hypeman: {tmp_path}/_internal/{LOADER.name}: No such file or directory\n"


def test_a_directory_that_the_loader_would_read_as_two_is_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "a:b")
    result = subprocess.run([tmp_path / "a:b/hypeman"], capture_output=True, text=True)
    assert result.returncode == 127 and "Invalid argument" in result.stderr


def test_our_copies_know_no_place_on_the_host(bring: ModuleType) -> None:
    for file, names in ((LOADER, bring.OF_THE_LOADER), (LOADER.resolve().parent / bring.LIBC, bring.OF_THE_LIBRARY)):
        before = file.read_bytes()
        after = bring.closed(before, names)
        assert len(after) == len(before) and after.count(b"\1\1\1\1/") > before.count(b"\1\1\1\1/")
        for name in (b"/etc/ld.so.preload", b"\0/usr/lib/\0", b"-gnu/gconv"):
            assert name not in after
        with pytest.raises(SystemExit, match="no name of the form"):
            bring.closed(after, names)
