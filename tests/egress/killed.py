"""Engines and servers that end at a chosen message, as by a signal, for test_engine_kill.py.

    python -m tests.egress.killed engine NUMBER FD    ends when the message NUMBER is to be received or sent
    python -m tests.egress.killed server NUMBER JSON  ends in the middle of sending the message NUMBER

Both count from 1. Without a number that comes, they live on.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import trio

from hypeman.egress import engine, link, protocol
from hypeman.egress.service import Egress, Settings
from hypeman.egress.types import CredentialPolicy


def run_engine(number: int, fd: int) -> int:
    count = itertools.count(1)
    receive, send = engine.Link.receive, engine.Link.send

    def receive_or_end(self: engine.Link) -> Any:
        got = receive(self)
        if got is not None and next(count) == number:
            os._exit(9)
        return got

    def send_or_end(self: engine.Link, *arguments: Any, **named: Any) -> None:
        if next(count) == number:
            os._exit(9)
        send(self, *arguments, **named)

    engine.Link.receive, engine.Link.send = receive_or_end, send_or_end  # type: ignore[method-assign]
    return engine.main(fd)


async def run_server(number: int, told: Any) -> None:
    """Sets the policies, accepts, then sets the others: the steps of a change; prints a line after each."""
    count = itertools.count(1)
    send = link.EngineLink._send

    async def send_half(self: link.EngineLink, message: Any, payload: Any, descriptors: Any) -> None:
        if next(count) != number:
            await send(self, message, payload, descriptors)
            return
        data = protocol.encode(message, payload=len(payload or b""), descriptors=len(descriptors)) + (payload or b"")
        await self._socket.send(data[: len(data) // 2])
        os._exit(9)

    link.EngineLink._send = send_half  # type: ignore[method-assign]

    async def resolve(name: str) -> list[str]:
        return ["127.0.0.1"]

    settings = msgspec.convert(told["settings"], Settings)
    egress = Egress(settings, Path(told["directory"]), resolve=resolve, engines=Path(told["engines"]))

    async def set_all(values: dict[str, str]) -> None:
        credentials = msgspec.convert(told["credentials"], dict[str, CredentialPolicy])
        for source, value in values.items():
            await egress.set_policy(f"of-{source}", source, credentials, {"REAL_KEY": value})
            print(f"set {source} {value}", flush=True)

    async with trio.open_nursery() as nursery:
        await nursery.start(egress.run)
        print(f"port {egress.port} {egress.engine_pid}", flush=True)
        await set_all(told["first"])
        await egress.accept()
        print("accepts", flush=True)
        await set_all(told["then"])
        for source in told["remove"]:
            await egress.remove(f"of-{source}")
            print(f"removed {source}", flush=True)
        os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "engine":
        sys.exit(run_engine(int(sys.argv[2]), int(sys.argv[3])))
    trio.run(run_server, int(sys.argv[2]), json.loads(sys.argv[3]))
