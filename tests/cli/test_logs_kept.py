"""``logs -f`` over the end of its server."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from hypeman.cli.client import Client
from hypeman.cli.settings import Settings
from tests.cli.conftest import Running
from tests.cli.test_exec import wait_until


def test_no_line_is_lost_or_doubled_over_an_upgrade(tmp_path: Path) -> None:
    with Running(tmp_path) as first:
        first.world.instances.add("web")
        log = tmp_path / "logs" / "web-app.log"
        log.write_text("one\ntwo\n")
        command = [sys.executable, "-m", "hypeman", "--base-url", first.url, "logs", "-f", "web"]
        running = subprocess.Popen(command, bufsize=0, stdout=-1, stderr=-1)
        assert running.stdout is not None
        seen = b""
        while not seen.endswith(b"two\n"):
            seen += running.stdout.read(100)
        with log.open("a") as file:
            file.write("three\nfo")
    log.rename(f"{log}.1")
    with open(f"{log}.1", "a") as file:
        file.write("ur\nfive\n")
    log.write_text("six\n")
    with Running(tmp_path) as second:
        second.world.instances.add("web")
        while not seen.endswith(b"six\n"):
            seen += running.stdout.read(100)
        with log.open("a") as file:
            file.write("seven\n")
        while not seen.endswith(b"seven\n"):
            seen += running.stdout.read(100)
        running.terminate()
        _, errors = running.communicate(timeout=30)
    assert seen == b"one\ntwo\nthree\nfour\nfive\nsix\nseven\n"
    assert errors == b""


def test_a_program_that_has_printed_nothing_is_followed_over_an_upgrade(tmp_path: Path) -> None:
    seen: list[bytes] = []
    with Running(tmp_path) as first:
        first.world.instances.add("web")
        log = tmp_path / "logs" / "web-app.log"
        log.write_text("before\n")
        client = Client(Settings(base_url=first.url))
        lines = client.followed_lines("/instances/web/logs", tail=0)
        follower = threading.Thread(target=lambda: seen.append(next(lines)[0]), daemon=True)
        follower.start()
        wait_until(lambda: client._position)
    with log.open("a") as file:
        file.write("at last\n")
    with Running(tmp_path) as second:
        second.world.instances.add("web")
        follower.join(30)
    assert seen == [b"at last"]
