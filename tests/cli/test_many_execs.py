"""Many execs whose clients close at different moments: none of them is an error of the server."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest
import trio

EXECS = 120

CLIENT = """
import json, random, sys, time
from websockets.sync.client import connect

url, token, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
random = random.Random(count)
for number in range(count):
    with connect(url, additional_headers={"Authorization": f"Bearer {token}"}, close_timeout=5) as socket:
        socket.send(json.dumps({"command": ["echo", "hello"]}))
        for message in socket:
            if isinstance(message, str):
                break
        if number % 3 == 1:
            time.sleep(random.random() * 0.002)
        elif number % 3 == 2:
            socket.socket.close()
"""


def test_a_client_that_closes_while_the_server_does_is_no_error(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The client's close and the server's cross on the connection: without care one in ten became a 500."""
    caplog.set_level(logging.INFO, "hypeman.http")
    server.do(lambda: server.world.instances.add("web"))
    url = server.tcp_url.replace("http", "ws", 1) + "/instances/web/exec"
    command = [sys.executable, "-c", CLIENT, url, server.token, str(EXECS // 2)]
    clients = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    for client in clients:
        _, errors = client.communicate(timeout=60)
        assert client.returncode == 0, errors.decode()

    async def wait_for_lines() -> list[Any]:
        with trio.fail_after(20):
            while len(found := [record for record in caplog.records if record.message == "request"]) < EXECS:
                await trio.sleep(0.05)
        return found

    lines = trio.run(wait_for_lines)
    assert [line.status for line in lines] == [101] * EXECS
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
