"""Pebble, Let's Encrypt's test CA, with the faults that it can make. For tests in a network namespace of their own.

``python -m tests.ingress.pebble`` builds it (`make test-conformance` does); without it, tests that want it are skipped.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dns.message
import dns.rdatatype
import dns.rrset
import trustme

from hypeman.host.tls import client_context
from hypeman.ingress.certificates.acme_types import CASettings

VERSION = "v2.10.3"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "hypeman-build" / f"pebble-{VERSION}"
PROGRAM = CACHE / "pebble"
BLOCKED = "blocked.example.com"
_DNS_PORT = 8053
_EAB_KEY = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"


def build() -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    package = f"github.com/letsencrypt/pebble/v2/cmd/pebble@{VERSION}"
    subprocess.run(["go", "install", package], env=os.environ | {"GOBIN": str(CACHE)}, check=True)


def why_not() -> str:
    """Why it cannot be used; empty if it can."""
    if not PROGRAM.exists():
        return "pebble is not built; `make test-conformance` does that"
    return "" if os.geteuid() == 0 else "requires root for ports and a namespace"


class Pebble:
    """A running one."""

    def __init__(self, folder: Path, *, eab: bool) -> None:
        self.folder = folder
        self.unknown: set[str] = set()
        """Names without an address; all others are 127.0.0.1."""
        self._eab = eab
        self.log = folder / "pebble.log"

    def settings(self, **more: str) -> CASettings:
        eab = {"eab_key_id": "kid-1", "eab_hmac_key": _EAB_KEY} if self._eab else {}
        return CASettings(directory="https://localhost:14000/dir", ca_file=str(self.folder / "tls.pem"), **eab, **more)

    def requests(self, path: str) -> int:
        """How many came for it: ``order-plz``, ``sign-me-up``, …"""
        return len(re.findall(rf"POST /{path}", self.log.read_text()))

    def root(self) -> str:
        """PEM."""
        context = client_context(str(self.folder / "tls.pem"))
        with urllib.request.urlopen("https://localhost:15000/roots/0", context=context, timeout=10) as answer:
            return str(answer.read().decode())

    def answer_names(self, server: socket.socket) -> None:
        """DNS over TCP, which is what pebble asks with."""
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            with client, client.makefile("rwb") as stream:
                while size := stream.read(2):
                    query = dns.message.from_wire(stream.read(int.from_bytes(size, "big")))
                    answer = dns.message.make_response(query)
                    question = query.question[0]
                    is_known = question.name.to_text(omit_final_dot=True).lower() not in self.unknown
                    if question.rdtype == dns.rdatatype.A and is_known:
                        answer.answer.append(dns.rrset.from_text(question.name, 0, "IN", "A", "127.0.0.1"))
                    wire = answer.to_wire()
                    stream.write(len(wire).to_bytes(2, "big") + wire)
                    stream.flush()


@contextmanager
def pebble(folder: Path, *, eab: bool = False, **environment: str) -> Iterator[Pebble]:
    """``environment``: pebble's switches, without PEBBLE_. Loopback must be up."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(str(folder / "tls.pem"))
    certificate.private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
    config = {
        "listenAddress": "127.0.0.1:14000", "managementListenAddress": "127.0.0.1:15000",
        "certificate": str(folder / "server.pem"), "privateKey": str(folder / "server.pem"),
        "httpPort": 80, "tlsPort": 443, "ocspResponderURL": "", "domainBlocklist": [BLOCKED],
        "retryAfter": {"authz": 1, "order": 1}, "keyAlgorithm": "ecdsa",
        "externalAccountBindingRequired": eab, "externalAccountMACKeys": {"kid-1": _EAB_KEY},
        "profiles": {"default": {"description": "", "validityPeriod": 7776000}},
    }  # fmt: skip
    (folder / "pebble.json").write_text(json.dumps({"pebble": config}))
    made = Pebble(folder, eab=eab)
    switches = {f"PEBBLE_{name}": value for name, value in environment.items()}
    command = [str(PROGRAM), "-config", str(folder / "pebble.json"), "-dnsserver", f"127.0.0.1:{_DNS_PORT}"]
    with socket.create_server(("127.0.0.1", _DNS_PORT)) as names, made.log.open("wb") as log:
        thread = threading.Thread(target=made.answer_names, args=(names,), daemon=True)
        thread.start()
        process = subprocess.Popen(command, env=os.environ | switches, stdout=log, stderr=log)
        try:
            _wait_for_port(process, 14000, made.log)
            yield made
        finally:
            process.kill()
            process.wait()
            names.shutdown(socket.SHUT_RDWR)  # ends the thread


def _wait_for_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(log.read_text())


if __name__ == "__main__":
    if not PROGRAM.exists():
        build()
    print(PROGRAM)
    sys.exit(0)
