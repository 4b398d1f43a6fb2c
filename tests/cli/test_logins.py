"""`hypeman login`: where logins are kept, what registries are asked, and which requests carry one."""

from __future__ import annotations

import base64
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from hypeman.cli.logins import registry_of
from tests.cli.test_exec import Terminal

USER, PASSWORD = "ada", "s3cret: with a colon"
BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

HELPER = """\
#!/bin/sh
# a credential helper that keeps one login in a file
kept="$(dirname "$0")/kept"
case "$1" in
    store) cat > "$kept" ;;
    get) cat > /dev/null; cat "$kept" 2> /dev/null || { echo "credentials not found in native keychain"; exit 1; } ;;
    erase) cat > /dev/null; rm "$kept" ;;
esac
"""


@contextmanager
def a_registry(*, bearer: bool) -> Iterator[tuple[str, list[str]]]:
    """``host:port``, and the paths that were asked for with credentials."""
    asked: list[str] = []

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            sent = self.headers.get("authorization", "")
            if sent:
                asked.append(self.path)
            self.send_response(200 if sent == BASIC and (self.path == "/v2/") != bearer else 401)
            where = f'Bearer realm="http://{host}/token?x=1",service="reg"' if bearer else 'Basic realm="reg"'
            self.send_header("WWW-Authenticate", where)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Registry)
    host = f"127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield host, asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("reference", "registry"),
    [
        ("alpine", "docker.io"),
        ("team/app:v1", "docker.io"),
        ("index.docker.io/team/app", "docker.io"),
        (f"quay.io/team/app@sha256:{'0' * 64}", "quay.io"),
        ("localhost/app", "localhost"),
        ("host:5000/app:v1", "host:5000"),
        ("[::1]:5000/app", "[::1]:5000"),
    ],
)
def test_the_registry_of_a_name(reference: str, registry: str) -> None:
    assert registry_of(reference) == registry


@pytest.mark.parametrize(("bearer", "path"), [(False, "/v2/"), (True, "/token?x=1&account=ada&service=reg")])
def test_the_registry_is_asked_before_a_login_is_kept(cli: Any, tmp_path: Path, bearer: bool, path: str) -> None:
    kept = tmp_path / ".docker" / "config.json"
    with a_registry(bearer=bearer) as (host, asked):
        refused = cli("login", "--insecure", "-u", USER, "--password-stdin", host, input="wrong\n")
        assert (refused.exit_code, "refuses this user name" in refused.stderr, kept.exists()) == (1, True, False)
        done = cli("login", "--insecure", "-u", USER, "--password-stdin", host, input=f"{PASSWORD}\n")
        assert (done.exit_code, str(kept) in done.stdout) == (0, True), done.stderr
    assert asked == [path, path]
    assert json.loads(kept.read_text())["auths"] == {host: {"auth": BASIC.removeprefix("Basic ")}}
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert PASSWORD not in done.stdout + done.stderr


def test_a_login_in_a_terminal(tmp_path: Path) -> None:
    """Both are asked for, and what is typed as the password is not shown."""
    with a_registry(bearer=False) as (host, asked):
        terminal = Terminal(sys.executable, "-m", "hypeman", "login", "--insecure", host)
        terminal.wait_for(b"Username: ")
        terminal.type(f"{USER}\n".encode())
        terminal.wait_for(b"Password: ")
        terminal.type(f"{PASSWORD}\n".encode())
        terminal.wait_for(b"login succeeded; kept in ")
        assert terminal.exit_code() == 0
        os.close(terminal.fd)
    assert asked == ["/v2/"]
    assert USER.encode() in terminal.seen and PASSWORD.encode() not in terminal.seen
    kept = json.loads((tmp_path / ".docker" / "config.json").read_text())["auths"][host]
    assert base64.b64decode(kept["auth"]).decode() == f"{USER}:{PASSWORD}"


def test_a_registry_that_does_not_answer(cli: Any, tmp_path: Path) -> None:
    with a_registry(bearer=False) as (gone, _):
        pass
    done = cli("login", "-u", USER, "-p", PASSWORD, gone)
    assert (done.exit_code, "--no-check" in done.stderr) == (1, True)
    assert cli("login", "--no-check", "-u", USER, "-p", PASSWORD, gone).exit_code == 0
    assert gone in (tmp_path / ".docker" / "config.json").read_text()


def test_pulls_runs_and_pushes_carry_the_login_of_their_registry(cli: Any, server: Any) -> None:
    for registry in ((), ("quay.io",)):
        cli("login", "--no-check", "-u", USER, "-p", f"{PASSWORD}{len(registry)}", *registry)
    cli("pull", "alpine")
    cli("run", "-d", "quay.io/team/app:v1")
    cli("pull", "ghcr.io/team/app")
    sent = {request.name: request.credentials for request in server.world.images.asked}
    assert sent["alpine"].username == USER and sent["alpine"].password == f"{PASSWORD}0"
    assert sent["quay.io/team/app:v1"].password == f"{PASSWORD}1"
    assert sent["ghcr.io/team/app"] is None
    cli("push", "team/app", "quay.io/team/app")
    cli("push", "team/app", "quay.io/team/app", "--username", "other", "--password", "one")
    first, second = [request.credentials for request in server.world.pushes.asked]
    assert (first.username, second.username) == (USER, "other")


def test_a_host_name_without_a_dot_is_not_docker_hub(cli: Any, tmp_path: Path) -> None:
    cli("login", "--no-check", "-u", USER, "-p", PASSWORD, "intranet")
    assert list(json.loads((tmp_path / ".docker" / "config.json").read_text())["auths"]) == ["intranet"]


def test_what_is_no_name_of_an_image_is_for_the_server_to_refuse(cli: Any, server: Any) -> None:
    cli("pull", "Not:a:name")
    assert [request.credentials for request in server.world.images.asked] in ([], [None])


def test_the_rest_of_the_file_stays(cli: Any, tmp_path: Path) -> None:
    kept = tmp_path / ".docker" / "config.json"
    kept.parent.mkdir()
    other = {"auth": base64.b64encode(b"x:y").decode()}
    kept.write_text(json.dumps({"auths": {"https://quay.io/v2/": other, "ghcr.io": other}, "detachKeys": "ctrl-e"}))
    cli("login", "--no-check", "-u", USER, "-p", PASSWORD, "https://quay.io/")
    found = json.loads(kept.read_text())
    assert (found["detachKeys"], sorted(found["auths"]), found["auths"]["ghcr.io"]) == (
        "ctrl-e",
        ["ghcr.io", "quay.io"],
        other,
    )
    assert cli("logout", "quay.io").stdout == "the login at quay.io was removed\n"
    assert "there is no login" in cli("logout", "quay.io").stderr
    assert sorted(json.loads(kept.read_text())["auths"]) == ["ghcr.io"]


def test_a_credential_helper_has_them(cli: Any, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = tmp_path / "docker-credential-test"
    helper.write_text(HELPER)
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    (tmp_path / "config.json").write_text('{"credHelpers": {"quay.io": "test"}}')
    cli("pull", "quay.io/team/app")
    assert cli("login", "--no-check", "-u", USER, "-p", PASSWORD, "quay.io").exit_code == 0
    assert PASSWORD not in (tmp_path / "config.json").read_text()
    cli("pull", "quay.io/team/app")
    assert [request.credentials and request.credentials.password for request in server.world.images.asked] == [
        None,
        PASSWORD,
    ]
    cli("logout", "quay.io")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"credsStore": "../x"}', '{"credsStore": "gone"}', '{"auths": {"docker.io": {"auth": "="}}}'],
)
def test_a_damaged_file_does_not_keep_from_public_images(cli: Any, server: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / ".docker").mkdir()
    (tmp_path / ".docker" / "config.json").write_text(content)
    done = cli("pull", "alpine")
    assert (done.exit_code, "without a login" in done.stderr) == (0, True)
    assert server.world.images.asked[-1].credentials is None
    assert cli("login", "--no-check", "-u", USER, "-p", PASSWORD).exit_code == ("auths" not in content)
