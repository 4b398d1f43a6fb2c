"""Ingresses as a process of their own, for benchmarks: the service with its store and access log, and the engine.

Takes one JSON document on the command line: `directory`, `host`, `port`, `target_port`, `certificate` (a file with
its key), `log` (whether requests are logged), `under` (what runs the engine, which is not confined then). Prints the
engine's process id, one JSON line; ends with its stdin.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from functools import partial
from pathlib import Path

import msgspec
import trio

from hypeman.egress.front import Place
from hypeman.egress.link import engine_command
from hypeman.egress.service import Egress, Settings
from hypeman.ingress.certificates.service import Certificates
from hypeman.ingress.certificates.service import Settings as CertificateSettings
from hypeman.ingress.service import Ingresses
from hypeman.ingress.types import CreateIngressRequest
from hypeman.store import Store
from hypeman.telemetry.logs import setup_logs

UNCONFINED = (
    "import sys; from hypeman.egress.engine import main; sys.exit(main(int(sys.argv[1]), confine=lambda uid: True))"
)


def command(under: list[str], fd: int) -> list[str]:
    if not under:
        return engine_command(fd)
    return [*under, sys.executable, "-c", UNCONFINED, str(fd)]


async def main() -> None:
    document = json.loads(sys.argv[1])
    folder, pem = Path(document["directory"]), Path(document["certificate"])
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the log is written, but not to the terminal
    setup_logs("info", "json")
    if not document["log"]:
        logging.getLogger("hypeman.ingress.access").setLevel(logging.WARNING)
    store = Store.open(folder / "store")
    rule = {
        "match": {"hostname": document["host"], "port": document["port"]},
        "target": {"instance": "web", "port": document["target_port"]},
        "tls": True,
    }
    async with store.serving(), trio.open_nursery() as nursery:
        settings = Settings(address="127.0.0.1", port=0, loops=1)
        egress = Egress(settings, folder / "egress", command=partial(command, document["under"]))
        certificates = Certificates(CertificateSettings(files={"site": (pem, pem)}), folder / "ingress", store)
        service = Ingresses(
            store,
            egress.front,
            find=str,
            place_of=lambda _: Place("127.0.0.1", exists=True),
            certificates=certificates,
        )
        await nursery.start(partial(egress.run, grace=0.5))
        await nursery.start(service.run)
        await service.create(msgspec.convert({"name": "site", "rules": [rule]}, CreateIngressRequest))
        await egress.accept()
        print(json.dumps({"pid": egress.engine_pid}), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
