"""Real values at rest: encrypted with this host's key and bound to their instance.

    egress/seal.key     32 random bytes, 0600; without it sealed values are lost, by design

A sealed value is a 12-byte nonce and the AES-256-GCM output, with the instance's id as associated data, so a record
copied to another instance cannot be opened. This protects backups and copies of the store, not against root.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hypeman.errors import InternalError
from hypeman.host.files import write_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_NONCE = 12


class Sealer:
    """Seals and opens the secrets of instances."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @cached_property
    def _cipher(self) -> AESGCM:
        """Loaded lazily: 8 MB and 60 ms that a host without secrets does not need."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        return AESGCM(self._key)

    def seal(self, instance_id: str, secrets: Mapping[str, str]) -> bytes:
        return self.seal_bytes(instance_id, msgspec.json.encode(secrets))

    def seal_bytes(self, instance_id: str, plain: bytes | bytearray) -> bytes:
        nonce = os.urandom(_NONCE)
        return nonce + self._cipher.encrypt(nonce, plain, instance_id.encode())

    def open(self, instance_id: str, sealed: bytes) -> dict[str, str]:
        """The secrets sealed for this instance; raises InternalError for anything else."""
        return msgspec.json.decode(self.open_bytes(instance_id, sealed), type=dict[str, str])

    def open_bytes(self, instance_id: str, sealed: bytes) -> bytes:
        from cryptography.exceptions import InvalidTag

        try:
            return self._cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], instance_id.encode())
        except (InvalidTag, ValueError):
            raise InternalError(f"the sealed credentials of instance {instance_id} cannot be opened") from None


def load_sealer(directory: Path) -> Sealer:
    """The sealer with the key in ``directory``, created if there is none."""
    path = directory / "seal.key"
    try:
        if not path.exists():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_file(path, os.urandom(32))
        key = path.read_bytes()
    except OSError as error:
        raise InternalError(f"the key that seals credentials, {path}, cannot be used: {error}") from error
    if len(key) != 32:
        raise InternalError(f"{path} is not a key of 32 bytes")
    return Sealer(key)
