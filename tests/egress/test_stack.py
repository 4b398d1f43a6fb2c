"""What a login to a database leaves behind on the stack of the data plane: nothing that is as good as the password."""

from __future__ import annotations

import base64
import hmac
import shutil
import subprocess
from hashlib import pbkdf2_hmac, sha1, sha256
from pathlib import Path

import pytest

from tests.egress.mysql_peers import native, sha2

SOURCES = Path(__file__).parents[2] / "ext" / "egress"
ITERATIONS = 4096


@pytest.mark.parametrize("password", ["s3cret", "a password that is longer than a block of the hash: " + "x" * 40])
def test_scram_leaves_no_secret_on_its_stack(tmp_path: Path, password: str) -> None:
    built = build(tmp_path)
    salt = b"salt of 16 bytes"
    server_first = f"r=nonceserver,s={base64.b64encode(salt).decode()},i={ITERATIONS}"
    salted = pbkdf2_hmac("sha256", password.encode(), salt, ITERATIONS)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    without_proof = f"c={base64.b64encode(b'n,,').decode()},r=nonceserver"
    signature = hmac.digest(
        sha256(client_key).digest(), f"n=,r=nonce,{server_first},{without_proof}".encode(), "sha256"
    )
    proof = bytes(a ^ b for a, b in zip(client_key, signature, strict=True))
    # With the proof, which the host is shown, the signature says what the client key is.
    secrets = {"salted": salted, "client key": client_key, "server key": server_key, "signature": signature}
    block = hmac.digest(password.encode(), salt + b"\0\0\0\1", "sha256")
    for number in range(ITERATIONS):
        if number in (0, 999, ITERATIONS - 1):
            secrets[f"block {number}"] = block
        block = hmac.digest(password.encode(), block, "sha256")
    if len(password) > 64:
        secrets["key"] = sha256(password.encode()).digest()
    told = [f"{name}={value.hex()}" for name, value in secrets.items()]
    result = subprocess.run([built, "scram", password, server_first, *told], check=True, capture_output=True, text=True)
    assert result.stdout.splitlines() == [f"{without_proof},p={base64.b64encode(proof).decode()}"]


@pytest.mark.parametrize("password", ["s3cret", "a password that is longer than a block of the hash: " + "x" * 40])
def test_hashes_for_mysql_leave_no_secret_on_their_stack(tmp_path: Path, password: str) -> None:
    """With the answer, which the host is shown, the hash of the scramble says what the hash of the password is."""
    built = build(tmp_path)
    scramble = "scramble-of-20-bytes"
    secrets: dict[str, bytes] = {}
    for name, function in (("sha1", sha1), ("sha256", sha256)):
        once = function(password.encode()).digest()
        twice = function(once).digest()
        mask = function(scramble.encode() + twice if name == "sha1" else twice + scramble.encode()).digest()
        secrets |= {f"{name} once": once, f"{name} twice": twice, f"{name} mask": mask}
    secrets["password"] = password.encode()[: len(password) // 4 * 4][:64]
    told = [f"{name}={value.hex()}" for name, value in secrets.items()]
    result = subprocess.run([built, "mysql", password, scramble, *told], check=True, capture_output=True, text=True)
    assert result.stdout.splitlines() == [
        native(password, scramble.encode()).hex(),
        sha2(password, scramble.encode()).hex(),
    ]


def build(tmp_path: Path) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    built = tmp_path / "stack_left"
    sources = [Path(__file__).with_name("stack_left.c"),
               *(SOURCES / f"{name}.c" for name in ("scram", "h1", "scramble", "mywire", "verdict"))]  # fmt: skip
    options = ["-O2", "-w", "-D_GNU_SOURCE", "-I", str(SOURCES), "-o", str(built)]
    others = [SOURCES / f"{name}.c" for name in ("policy", "access", "host", "addr", "bound")]
    subprocess.run(["gcc", *options, *map(str, sources + others), "-lssl", "-lcrypto", "-lpthread"], check=True)
    return built
