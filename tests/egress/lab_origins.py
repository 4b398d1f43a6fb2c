"""The servers that test_clients.py talks to, on real libraries, in one process: python -m … LEAF DIRECTORY.

gRPC (its C core), WebSockets (the library websockets), and one of plain HTTP/1.1 with streams of events and git.
Each says whether it was sent the real credential, by a word and never by the value. Prints "ready" when all listen.
"""

from __future__ import annotations

import base64
import http.server
import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
from websockets.sync.server import ServerConnection
from websockets.sync.server import serve as serve_sockets

from tests.egress.conftest import SECRET
from tests.egress.lab import GIT_HOST, GRPC_HOST, ORIGINS, SOCKET_HOST, STREAM_HOST

EVENTS = 5
BASIC = "Basic " + base64.b64encode(f"x-access-token:{SECRET}".encode()).decode()


def credential_of(values: list[str]) -> str:
    return "real" if values in ([f"Bearer {SECRET}"], [BASIC]) else f"{len(values)} others"


def _rpc_credential(context: grpc.ServicerContext) -> str:
    return credential_of([str(item.value) for item in context.invocation_metadata() if item.key == "authorization"])


def unary(request: bytes, context: grpc.ServicerContext) -> bytes:
    context.set_trailing_metadata((("x-credential", _rpc_credential(context)), ("x-sum-bin", b"\x00\xff")))
    if request == b"fail":
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "näh")
    return request


def server_stream(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    for number in range(int(request)):
        yield b"%d " % number * 1000


def client_stream(requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
    return b"%d" % sum(len(request) for request in requests)


def both(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    context.send_initial_metadata((("x-credential", _rpc_credential(context)),))
    yield from requests


def make_grpc_server() -> grpc.Server:
    """One that answers the four kinds of calls; it has no port yet."""
    server = grpc.server(ThreadPoolExecutor(8))
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Server": grpc.unary_stream_rpc_method_handler(server_stream),
        "Client": grpc.stream_unary_rpc_method_handler(client_stream),
        "Both": grpc.stream_stream_rpc_method_handler(both),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("lab.Echo", handlers),))
    return server


def serve_grpc(leaf: bytes) -> None:
    server = make_grpc_server()
    credentials = grpc.ssl_server_credentials([(leaf, leaf)])
    assert server.add_secure_port(f"{ORIGINS[GRPC_HOST]}:443", credentials)
    server.start()
    threading.Thread(target=server.wait_for_termination, daemon=True).start()


def echo_messages(socket: ServerConnection) -> None:
    assert socket.request is not None
    socket.send(credential_of(socket.request.headers.get_all("Authorization")))
    for message in socket:
        if message == "bye":
            socket.close(4001, "as you wish")
            return
        socket.send(message)


def serve_websockets(context: ssl.SSLContext) -> None:
    server = serve_sockets(echo_messages, ORIGINS[SOCKET_HOST], 443, ssl=context, max_size=1 << 24)
    threading.Thread(target=server.serve_forever, daemon=True).start()


class Http(http.server.BaseHTTPRequestHandler):
    """/events: the next comes only when the one before was acknowledged by POST /ack, so nothing may be held back."""

    protocol_version = "HTTP/1.1"
    acknowledged = threading.Semaphore(0)
    repositories = ""

    def do_GET(self) -> None:
        if self.path == "/events":
            self._events()
        elif self.path == "/elsewhere":
            self._answer(b"", 302, Location="https://other.test/")
        elif self.path.startswith("/git/"):
            self._git()
        else:
            said = {"credential": credential_of(self.headers.get_all("Authorization") or []), "path": self.path}
            self._answer(json.dumps(said).encode())

    def do_POST(self) -> None:
        if self.path.startswith("/git/"):
            self._git()
            return
        body = self._body()
        if self.path == "/ack":
            self.acknowledged.release()
        self._answer(json.dumps({"bytes": len(body), "sha256": sha256(body).hexdigest()}).encode())

    def _body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, body: bytes, status: int = 200, **fields: str) -> None:
        self.send_response(status)
        for name, value in {**fields, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _events(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        credential = credential_of(self.headers.get_all("Authorization") or [])
        for number in range(EVENTS):
            self._chunk(f"id: {number}\nevent: tick\ndata: {credential}\n\n".encode())
            if not self.acknowledged.acquire(timeout=30):
                break
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _git(self) -> None:
        """git's own CGI program; without the credential 401."""
        body = self._body()
        if credential_of(self.headers.get_all("Authorization") or []) != "real":
            self._answer(b"", 401)
            return
        path, _, query = self.path.removeprefix("/git").partition("?")
        cgi = {
            "PATH": os.environ["PATH"], "GIT_PROJECT_ROOT": self.repositories, "GIT_HTTP_EXPORT_ALL": "1",
            "REMOTE_USER": "guest", "REMOTE_ADDR": "192.0.2.1", "REQUEST_METHOD": self.command, "PATH_INFO": path,
            "QUERY_STRING": query, "CONTENT_TYPE": self.headers["Content-Type"] or "",
            "CONTENT_LENGTH": str(len(body)), "HTTP_CONTENT_ENCODING": self.headers["Content-Encoding"] or "",
            "GIT_PROTOCOL": self.headers["Git-Protocol"] or "",
            "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*",
        }  # fmt: skip
        output = subprocess.run(["git", "http-backend"], env=cgi, input=body, capture_output=True).stdout
        head, _, content = output.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        self._answer(content, int(fields.pop("Status", "200 OK").split()[0]), **fields)

    def log_message(self, *args: Any) -> None:
        pass


def serve_http(context: ssl.SSLContext) -> None:
    for host in (STREAM_HOST, GIT_HOST):
        server = http.server.ThreadingHTTPServer((ORIGINS[host], 443), Http)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=server.serve_forever, daemon=True).start()


def main(leaf: str, directory: str) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(leaf)
    Http.repositories = directory
    serve_grpc(Path(leaf).read_bytes())
    serve_websockets(context)
    serve_http(context)
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
