"""Which programs become process 1: the agent's rule on files, without a guest around it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .conftest import TOP

AGENT = TOP / "ext" / "guest_agent"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pid1") / "executes_init"
    sources = [Path(__file__).with_name("executes_init.c"), AGENT / "pid1.c", AGENT / "util.c"]
    subprocess.run(["gcc", "-std=c11", "-Wall", "-Werror", "-I", AGENT, "-o", made, *sources], check=True)
    return made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Entry scripts of the kinds that images have, and programs."""
    scripts = {
        "plain": '#!/bin/sh\nset -e\nexec "$@"\n',
        "execs-init": "#!/bin/bash\n# prepares\nmount -a || true\nexec /sbin/init --log-target=journal 3>&1\n",
        "conditional": '#!/bin/sh\nif [ -z "$1" ]; then exec /lib/systemd/systemd; fi\nexec "$@"\n',
        "with-env": "#!/bin/sh\nexec env -i container=docker PATH=/bin /sbin/init\n",
        "split": "#!/bin/sh\nexec \\\n  /usr/sbin/my_init -- serve\n",
        "outer": '#!/bin/sh\nexec plain "$@"\n',
        "quoted": "#!/bin/sh\nexec '/sbin/init'\n",
        "comment": '#!/bin/sh\n# then exec /sbin/init\necho "exec /sbin/init"\nserve\n',
        "init-as-word": "#!/bin/sh\nmigrate init\ngit init\nexec serve init\n",
        "daemon": '#!/bin/sh\nexec serve "$@"\n',
        "not-exec": "#!/bin/sh\n/etc/init.d/cron start\nexec tail -f /dev/null\n",
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "serve").write_bytes(b"\x7fELF" + bytes(100) + b"\nexec /sbin/init\n")
    (tmp_path / "serve").chmod(0o755)
    (tmp_path / "systemd").write_bytes(b"\x7fELF")
    (tmp_path / "systemd").chmod(0o755)
    (tmp_path / "boot").symlink_to("systemd")
    (tmp_path / "fifo").unlink(missing_ok=True)
    subprocess.run(["mkfifo", tmp_path / "fifo"], check=True)
    (tmp_path / "endless").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "endless").chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "is_init"),
    [
        ("/sbin/init", True),
        ("init", True),
        ("/init", True),
        ("/lib/systemd/systemd --unit=x", True),
        ("/usr/sbin/my_init", True),
        ("s6-svscan /service", True),
        ("{root}/boot", True),
        ("boot", True),
        ("plain /sbin/init", True),
        ("plain init", True),
        ("plain plain /sbin/init", True),
        ("./execs-init", True),
        ("execs-init", True),
        ("conditional", True),
        ("with-env", True),
        ("split", True),
        ("quoted", True),
        ("sh|-c|exec /sbin/init", True),
        ("/bin/bash|-lc|mount -a && exec init", True),
        ("sh|-c|/sbin/init", True),
        ("sh|-c|echo hello; /sbin/init --x", True),
        ('sh|-c|exec "$@"|sh|/sbin/init', True),
        ("sh execs-init", True),
        ("plain serve", False),
        ("plain", False),
        ("serve init", False),
        ("tini -- /sbin/init", False),
        ("dumb-init /sbin/init", False),
        ("/usr/bin/tini -- serve", False),
        ("docker-init -- serve", False),
        ("comment", False),
        ("init-as-word", False),
        ("daemon /sbin/init", False),
        ("not-exec", False),
        ("outer /sbin/init", False),
        ("sh|-c|/sbin/init; sleep 1", False),
        ("sh|-c|echo /sbin/init", False),
        ("sh", False),
        ("fifo", False),
        ("nothing-there", False),
        ("endless endless endless endless endless endless endless endless", False),
    ],
)
def test_who_is_process_1(program: Path, root: Path, argv: str, is_init: bool) -> None:
    words = argv.split("|") if "|" in argv else argv.replace("{root}", str(root)).split()
    result = subprocess.run([program, f"/nowhere:{root}", root, *words], timeout=10)
    assert result.returncode == (0 if is_init else 1)


def test_scripts_of_any_bytes(program: Path, root: Path) -> None:
    """A script is the image's, and read with care."""
    for text in (b"", b"exec", b'exec "', b"exec \\", b"x" * 100_000, b'"' * 70_000, b"exec $", b"\0exec /sbin/init"):
        (root / "plain").write_bytes(b"#!/bin/sh\n" + text)
        assert subprocess.run([program, root, root, "plain", "a"], timeout=10).returncode in (0, 1)
        assert subprocess.run([program, root, root, "sh", "-c", text.replace(b"\0", b"")], timeout=10).returncode < 2
