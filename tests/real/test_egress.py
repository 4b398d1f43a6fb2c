"""Mediated egress from a real guest to a real TLS server: the server sees the secret, the guest never has it."""

from __future__ import annotations

import base64
import hmac
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

import pytest
import trio
import trustme

from tests.egress import lab_moto
from tests.egress.postgres_server import a_database
from tests.real.appliance import ROOT, Appliance
from tests.real.world import ADDRESS, World

pytestmark = [pytest.mark.real, pytest.mark.slow]

SECRET = "s3cret-7f3a9c51e0"
ROTATED = "r0tated-20b8d7aa4"
HOST = "api.example.test"
OTHER = "other.example.test"
FORMS = "forms.example.test"
ECHO = "echo.example.test"
FORM_SECRET = 'f0rm s3cret/9d1c&"x'
HOOK_SECRET = "h00k-5e1f0c77aa"
DATABASE = "db.example.test"
GIT = "git.example.test"
DATABASE_SECRET = "d4ta-6c02e9ab17"
CLOUD = "198.51.100.1"
S3_HOST = "s3.eu-west-1.amazonaws.com"
CLOUD_SECRETS = (lab_moto.KEY_ID, lab_moto.SECRET, lab_moto.TOKEN)
DEBIAN = ROOT / "build" / "test-images" / "debian-programs-and-boto3.tar"
PACKAGES = "curl,ca-certificates,git,postgresql-client-15,python3-requests,python3-boto3"

ORIGIN = """
import http.server, json, pathlib, ssl, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        certificate = self.connection.getpeercert()
        seen = {"host": self.headers["Host"], "authorization": self.headers.get_all("Authorization")}
        if self.headers["Host"].startswith("forms"):
            seen |= {"path": self.path, "body": asked, "signature": self.headers["X-Hub-Signature-256"],
                     "certificate": certificate and certificate["subjectAltName"][0][1]}
        if self.headers["Host"].startswith("git"):
            return self.show_file(seen["authorization"])
        with open(sys.argv[3], "w") as file:
            json.dump(seen, file)
        body = b"{}"  # an origin that echoes hands the secret to the guest itself, unless it is scrubbed
        self.send_response(200)
        if self.headers["Host"].startswith("echo"):
            body = json.dumps(dict(self.headers)).encode()
            self.send_header("X-Echo", self.headers["X-Key"])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_POST = do_GET
    def show_file(self, authorization):
        path = pathlib.Path(sys.argv[5], self.path.partition("?")[0].lstrip("/"))
        good = authorization == [sys.argv[6]]
        body = path.read_bytes() if good and path.is_file() else b""
        self.send_response(200 if body else 404 if good else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
server = http.server.ThreadingHTTPServer((sys.argv[1], 443), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[2])
context.verify_mode = ssl.CERT_OPTIONAL
context.load_verify_locations(sys.argv[4])
server.socket = context.wrap_socket(server.socket, server_side=True)
print("ready")
server.serve_forever()
"""


FORMS_OF_ONE: tuple[dict[str, object], ...] = ({"basic": {"username": "robot"}}, {"query": "key"}, {"body": {}})

MOTO = "import sys; from tests.egress.lab_moto import main; main(*sys.argv[1:])"

USE_S3 = """
import json, urllib.request
import boto3
from botocore.config import Config
config = Config(region_name="eu-west-1", signature_version="s3v4", s3={"addressing_style": "path"},
                retries={"total_max_attempts": 1})
s3 = boto3.client("s3", config=config)
s3.create_bucket(Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
s3.put_object(Bucket="bucket", Key="with space", Body=b"signed")
s3.put_object(Bucket="bucket", Key="stream", Body=bytes(300_000), ChecksumAlgorithm="SHA256")
said = [s3.get_object(Bucket="bucket", Key="with space")["Body"].read().decode(),
        s3.head_object(Bucket="bucket", Key="stream")["ContentLength"]]
url = s3.generate_presigned_url("get_object", {"Bucket": "bucket", "Key": "with space"}, ExpiresIn=600)
said.append(urllib.request.urlopen(url).read().decode())
print(json.dumps(said))
"""
"""Signed by field, as a stream of chunks with a checksum behind it, and by the URL."""

CAPTURE = """
import socket, sys
packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
print("ready")
with open(sys.argv[1], "wb", buffering=0) as file:
    while True:
        file.write(packets.recv(65536))
"""
"""Every packet of a namespace, one behind the other."""


@pytest.fixture(scope="session")
def debian_with_programs() -> Path:
    """A docker-save archive of a small Debian with programs of guests, made once and kept below ``build``."""
    if not DEBIAN.exists():
        DEBIAN.parent.mkdir(parents=True, exist_ok=True)
        layer = DEBIAN.with_suffix(".layer.tar")
        result = subprocess.run(
            [
                "mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(layer),
            ],
            capture_output=True, text=True,
        )  # fmt: skip
        if result.returncode != 0:
            pytest.skip(f"a Debian image cannot be made here: {result.stderr.strip().splitlines()[-1:]}")
        _save(layer, DEBIAN)
        layer.unlink()
    return DEBIAN


def _save(layer: Path, archive: Path) -> None:
    import hashlib
    import io
    import tarfile

    with open(layer, "rb") as file:
        digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    image = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["sleep", "infinity"]},
        "rootfs": {"type": "layers", "diff_ids": [digest]},
    }
    manifest = [{"Config": "config.json", "RepoTags": ["localhost/debian:programs"], "Layers": ["layer.tar"]}]
    side = archive.with_suffix(".new")
    with tarfile.open(side, "w") as saved:
        for name, content in (("manifest.json", json.dumps(manifest)), ("config.json", json.dumps(image))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            saved.addfile(info, io.BytesIO(content.encode()))
        saved.add(layer, "layer.tar")
    side.rename(archive)


@pytest.fixture
async def mediated(directory: Path, seen: Path, debian_with_programs: Path) -> AsyncIterator[Appliance]:
    """A running guest "one" whose API_KEY is mediated for HOST, and an origin that writes down what it was sent."""
    async with _mediated(directory, seen, debian_with_programs) as appliance:
        yield appliance


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    """Where the origin writes the last request; outside of everything that is searched for the secret."""
    return tmp_path / "seen.json"


@asynccontextmanager
async def _mediated(directory: Path, seen: Path, archive: Path) -> AsyncIterator[Appliance]:
    authority = trustme.CA()
    certificate = authority.issue_cert(HOST, OTHER, FORMS, ECHO, GIT, DATABASE, S3_HOST)
    clients = trustme.CA()
    identity = clients.issue_cert("robot.test").private_key_and_cert_chain_pem.bytes().decode()
    seen.with_name("identity").write_text(identity)
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    clients.cert_pem.write_to_path(str(directory / "clients.pem"))
    certificate.private_key_and_cert_chain_pem.write_to_path(str(directory / "origin.pem"))
    appliance = Appliance(
        directory,
        EGRESS__UPSTREAM_CA_FILE=str(directory / "ca.pem"),
        EGRESS__ALLOW_PRIVATE=f"[{ADDRESS}/32, {CLOUD}/32]",
    )
    world = World(appliance.namespace, HOST, OTHER, FORMS, ECHO, GIT, DATABASE)
    world.add(CLOUD, S3_HOST)
    origin = [str(path) for path in (directory / "origin.pem", seen, directory / "clients.pem", seen.parent)]
    try:
        with (
            world.serving(ORIGIN, ADDRESS, *origin, _basic("robot", FORM_SECRET)),
            world.serving(MOTO, str(directory / "origin.pem"), CLOUD),
            a_database(world.name, ADDRESS, directory / "origin.pem", DATABASE_SECRET),
            appliance.namespace.serving(CAPTURE, str(seen.with_name("packets"))),
        ):
            await appliance.start()
            with open(archive, "rb") as content:
                answer = await appliance.ask(
                    "POST", "/images/import", params={"name": "localhost/debian:programs"}, content=_chunks(content)
                )
            assert answer.status_code == 202, answer.text
            with trio.fail_after(180):
                while (await appliance.get("/images/localhost%2Fdebian%3Aprograms"))["status"] != "ready":
                    await trio.sleep(0.2)
            await appliance.create(
                "one",
                image="localhost/debian:programs",
                size="256MB",
                env={
                    "REAL": SECRET,
                    "PLAIN": "1",
                    "FORM": FORM_SECRET,
                    "HOOK": HOOK_SECRET,
                    "PEM": identity,
                    "DATABASE": DATABASE_SECRET,
                    "CLOUD_KEYS": lab_moto.VALUE,
                },
                credentials={
                    "API_KEY": {
                        "source": {"env": "REAL"},
                        "inject": [{"hosts": [HOST], "as": {"header": "Authorization", "format": "Bearer ${value}"}}],
                    },
                    "FORM_KEY": {
                        "source": {"env": "FORM"},
                        "inject": [
                            *({"hosts": [FORMS], "as": form} for form in FORMS_OF_ONE),
                            {"hosts": [GIT], "as": FORMS_OF_ONE[0]},
                            {"hosts": [ECHO], "as": {"header": "X-Key", "format": "${value}"}, "scrub": True},
                        ],
                    },
                    "HOOK_KEY": {
                        "source": {"env": "HOOK"},
                        "inject": [{"hosts": [FORMS], "as": {"hmac": {"scheme": "github"}}}],
                    },
                    "PGPASSWORD": {
                        "source": {"env": "DATABASE"},
                        "inject": [{"hosts": [DATABASE], "as": {"postgres": {"user": "app"}}}],
                    },
                    "AWS": {
                        "source": {"env": "CLOUD_KEYS"},
                        "inject": [{"hosts": [S3_HOST], "as": {"sigv4": {"region": "eu-west-1", "service": "s3"}}}],
                    },
                    "CERTIFICATE": {
                        "source": {"env": "PEM"},
                        "inject": [{"hosts": [FORMS], "as": {"mtls": {}}}],
                    },
                },
                network={"egress": {"enabled": True}},
            )
            yield appliance
    finally:
        appliance.close()
        world.remove()


async def _chunks(file: BinaryIO) -> AsyncIterator[bytes]:
    while chunk := file.read(1 << 20):
        yield chunk


async def fetch(appliance: Appliance, seen: Path, *curl: str) -> dict[str, object]:
    """What the origin saw of a request of the guest."""
    code, text = await appliance.exec("one", "curl", "-sS", "--max-time", "60", *curl)
    assert (code, text) == (0, "{}"), text
    return json.loads(seen.read_text())  # type: ignore[no-any-return]


async def test_the_origin_sees_the_secret_and_the_guest_never_does(mediated: Appliance, seen: Path) -> None:
    through_proxy = await fetch(mediated, seen, f"https://{HOST}/", "-H", "Authorization: Bearer mine")
    assert through_proxy == {"host": HOST, "authorization": [f"Bearer {SECRET}"]}
    direct = ("--noproxy", "*", "--resolve", f"{HOST}:443:{ADDRESS}")
    redirected = await fetch(mediated, seen, *direct, f"https://{HOST}/")
    assert redirected["authorization"] == [f"Bearer {SECRET}"]
    # another host of the same server: passed through unread, verified by the guest itself against its own roots
    code, _ = await mediated.exec("one", "curl", "-sS", f"https://{OTHER}/")
    assert code == 60, "the guest does not know the origin's authority, and nothing stands in between"

    code, env = await mediated.exec("one", "env")
    assert code == 0 and "API_KEY=mock-API_KEY" in env and "PLAIN=1" in env and "REAL" not in env
    answer = await mediated.ask("GET", "/instances/one")
    assert SECRET not in answer.text

    await mediated.ask("PATCH", "/instances/one", json={"env": {"REAL": ROTATED}})
    assert (await fetch(mediated, seen, f"https://{HOST}/"))["authorization"] == [f"Bearer {ROTATED}"]
    refused = await mediated.ask("PATCH", "/instances/one", json={"env": {"PLAIN": "2"}})
    assert refused.status_code == 400 and "PLAIN" in refused.json()["message"]

    await _use_other_forms(mediated, seen)
    await _use_programs(mediated, seen)
    await _check_operators_see(mediated)
    packets = seen.with_name("packets").read_bytes()
    assert packets.count(FORMS.encode()), "packets are looked into"
    line_of_key = seen.with_name("identity").read_text().splitlines()[1]
    secrets = (SECRET, ROTATED, HOOK_SECRET, DATABASE_SECRET, line_of_key, *CLOUD_SECRETS)
    for secret in (*secrets, *_spellings(FORM_SECRET)):
        found = [str(path) for path in _places_with(mediated, secret.encode())]
        assert not found and secret.encode() not in packets, (secret, found)
    assert any("/proc/" in str(path) for path in _places_with(mediated, b"mock-API_KEY")), "memory is looked into"


async def _use_other_forms(appliance: Appliance, seen: Path) -> None:
    """All in one request; and a host that shows what it was sent."""
    sent = ("-H", "Content-Type: application/json", "-d", '{"k": "mock-FORM_KEY"}')
    got = await fetch(appliance, seen, *sent, f"https://{FORMS}/p?key=mine")
    body = json.dumps({"k": FORM_SECRET})
    assert got == {
        "host": FORMS,
        "authorization": [_basic("robot", FORM_SECRET)],
        "path": f"/p?key={quote(FORM_SECRET, safe='')}",
        "body": body,
        "signature": "sha256=" + hmac.digest(HOOK_SECRET.encode(), body.encode(), "sha256").hex(),
        "certificate": "robot.test",
    }
    code, text = await appliance.exec("one", "curl", "-sSi", f"https://{ECHO}/")
    assert code == 0 and "x-echo: mock-FORM_KEY" in text and '"x-key": "mock-FORM_KEY"' in text, text


async def _use_programs(appliance: Appliance, seen: Path) -> None:
    """They know nothing of a proxy but what their environment says."""
    code, text = await appliance.exec(
        "one", "python3", "-c", f"import requests; print(requests.get('https://{HOST}/', timeout=60).json())"
    )
    assert (code, text.strip()) == (0, "{}"), text
    assert json.loads(seen.read_text())["authorization"] == [f"Bearer {ROTATED}"]

    work, bare = seen.with_name("work"), seen.with_name("repo.git")
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for argv in (("init", "-q", str(work)), ("-C", str(work), *identity, "commit", "-q", "--allow-empty", "-m", "1st"),
                 ("clone", "-q", "--bare", str(work), str(bare)), ("-C", str(bare), "update-server-info")):  # fmt: skip
        await trio.run_process(["git", *argv], capture_stderr=True)
    code, text = await appliance.exec(
        "one", "sh", "-c", f"git clone -q https://{GIT}/repo.git /tmp/r && git -C /tmp/r log --format=%s"
    )
    assert (code, text.strip()) == (0, "1st"), text

    settings = f"host={DATABASE} hostaddr={ADDRESS} user=app dbname=app sslmode=verify-full"
    for more in ("", " channel_binding=require"):
        code, text = await appliance.exec("one", "psql", "-XAtc", "select 6 * 7, current_user", settings + more)
        assert (code, text.strip()) == (0, "42|app"), text
    code, text = await appliance.exec("one", "psql", "-XAtc", "select 1", settings.replace("=app ", "=postgres ", 1))
    assert code == 2 and "(role_denied)" in text, text

    code, text = await appliance.exec("one", "python3", "-c", USE_S3)
    assert code == 0 and json.loads(text) == ["signed", 300_000, "signed"], text


def _basic(user: str, secret: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{secret}".encode()).decode()


def _spellings(secret: str) -> list[str]:
    pair = base64.b64encode(f"robot:{secret}".encode()).decode()
    return [secret, json.dumps(secret)[1:-1], quote(secret, safe=""), pair]


async def _check_operators_see(appliance: Appliance) -> None:
    """The policy, the requests and their lines in the log: names and numbers, never a value."""
    policy = await appliance.ask("GET", "/instances/one/egress")
    assert policy.json()["credentials"]["API_KEY"]["source"] == {"env": "REAL"}
    with trio.fail_after(20):  # records come at most four times a second
        while len(records := await _requests(appliance)) < 3:
            await trio.sleep(0.1)
    injected = [record for record in records if record["kind"] == "request" and record["host"] == HOST]
    reported = {(one["host"], one["method"], one["status"], one["reason"]) for one in injected}
    assert reported == {(HOST, "GET", 200, "ok")}
    assert all(one["injected"] and one["credentials"] == ["API_KEY"] for one in injected)
    lines = [line for line in appliance.log.read_text().splitlines() if "hypeman.egress.audit" in line]
    assert [line for line in lines if f"host={HOST}" in line and "API_KEY" in line]
    assert not [text for text in (SECRET, ROTATED) if text in policy.text or text in json.dumps(records)]


async def _requests(appliance: Appliance) -> list[dict[str, object]]:
    answer = await appliance.ask("GET", "/instances/one/egress/requests")
    return [json.loads(event.removeprefix("data: ")) for event in answer.text.split("\n\n") if event]


def _places_with(appliance: Appliance, needle: bytes) -> list[Path]:
    """Files of the appliance, guests' disks among them, and guests' memories, that contain ``needle``."""
    memories = [
        link
        for pid in appliance.vmms()
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if os.readlink(link).startswith("/memfd:hypeman-guest ")
    ]
    assert memories
    places = map(str, (appliance.directory, *memories))
    result = subprocess.run(["grep", "-rlFa", "--", needle.decode(), *places], capture_output=True, text=True)
    return [Path(line) for line in result.stdout.splitlines()]


async def test_what_is_not_mediated_is_refused_at_once(mediated: Appliance) -> None:
    """Mode all: every other TCP connection is reset, not left to time out."""
    code, text = await mediated.exec(
        "one", "curl", "-sS", "--noproxy", "*", "--max-time", "20", f"http://{ADDRESS}:8080/"
    )
    assert code == 7, text
    gateway = "10.100.0.1"
    code, text = await mediated.exec(
        "one", "curl", "-sS", "--noproxy", "*", "--max-time", "20", f"http://{gateway}:22/"
    )
    assert code == 7, text


def engine_of(appliance: Appliance) -> int:
    """The process id of its engine."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            inside = (process / "ns" / "net").stat().st_ino == appliance.namespace.inode
            if inside and b"hypeman.egress.engine" in (process / "cmdline").read_bytes():
                return int(process.name)
    raise AssertionError("there is no engine")


async def test_the_policy_is_there_again_after_a_restart(mediated: Appliance, seen: Path) -> None:
    """The engine outlives the server, whose next process finds it; then another engine takes its place."""
    engine = engine_of(mediated)
    mediated.kill()
    await mediated.start()
    assert engine_of(mediated) == engine
    assert (await fetch(mediated, seen, f"https://{HOST}/"))["authorization"] == [f"Bearer {SECRET}"]
    os.kill(engine, signal.SIGKILL)
    assert (await fetch(mediated, seen, f"https://{HOST}/"))["authorization"] == [f"Bearer {SECRET}"]
    await mediated.post("/instances/one/standby")
    await mediated.post("/instances/one/restore")
    assert (await fetch(mediated, seen, f"https://{HOST}/"))["authorization"] == [f"Bearer {SECRET}"]
