"""The link that ``hypeman ui`` prints."""

from __future__ import annotations

import json
from urllib.request import Request, urlopen

import pytest

from tests.cli.conftest import Cli, Running


def log_in(server: Running, url: str) -> dict[str, object]:
    """What a browser's page does with the link."""
    body = json.dumps({"link": url.partition("#link=")[2]}).encode()
    asked = Request(f"{server.tcp_url}/ui/session", body, {"Origin": server.tcp_url}, method="POST")
    with urlopen(asked, timeout=10) as answer:
        return dict(json.load(answer))


def test_over_the_socket_it_logs_in_without_a_token(cli: Cli, server: Running) -> None:
    url = cli("ui").stdout.strip()
    assert url.startswith("http://localhost:8080/ui/#link=")
    found = log_in(server, url)
    assert found["subject"] == "local"
    with pytest.raises(Exception, match="401"):
        log_in(server, url)


def test_over_tcp_it_is_the_address_that_was_used_and_the_tokens_rights(cli: Cli, server: Running) -> None:
    done = cli("--base-url", server.tcp_url, "-o", "json", "ui", env={"HYPEMAN_API_KEY": server.token})
    url = json.loads(done.stdout)["url"]
    assert url.startswith(f"{server.tcp_url}/ui/#link=")
    assert log_in(server, url)["subject"] == "tester"


def test_without_a_right_there_is_no_link(cli: Cli, server: Running) -> None:
    done = cli("--base-url", server.tcp_url, "ui")
    assert done.exit_code == 1
    assert "#link=" not in done.stdout
