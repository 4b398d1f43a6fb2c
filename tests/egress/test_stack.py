"""What a login to a database leaves behind on the stack of the data plane: nothing that is as good as the password."""

from __future__ import annotations

import base64
import hmac
import shutil
import subprocess
from hashlib import pbkdf2_hmac, sha256
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "ext" / "egress"
ITERATIONS = 4096


@pytest.mark.parametrize("password", ["s3cret", "a password that is longer than a block of the hash: " + "x" * 40])
def test_scram_leaves_no_secret_on_its_stack(tmp_path: Path, password: str) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    built = tmp_path / "stack_left"
    sources = [Path(__file__).with_name("stack_left.c"), SOURCES / "scram.c", SOURCES / "h1.c"]
    options = ["-O2", "-w", "-D_GNU_SOURCE", "-I", str(SOURCES), "-o", str(built)]
    subprocess.run(["gcc", *options, *map(str, sources), "-lssl", "-lcrypto", "-lpthread"], check=True)
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
    result = subprocess.run([built, password, server_first, *told], check=True, capture_output=True, text=True)
    assert result.stdout.splitlines() == [f"{without_proof},p={base64.b64encode(proof).decode()}"]
