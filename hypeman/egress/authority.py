"""The host's certificate authorities: created once; the keys never leave their directories.

Only guests trust the CA of mediated egress; for that of ingresses see `hypeman/ingress/certificates`.

    egress/ca.pem       the certificate, given to guests             0644
    egress/ca.key       its private key                              0600

Leaves are minted by the data plane (`ext/egress/mint.c`): valid for a day, for exactly one name.
"""

from __future__ import annotations

import datetime
import hashlib
import ssl
from pathlib import Path

import msgspec

from hypeman.errors import InternalError
from hypeman.host.files import write_file


class Authority(msgspec.Struct, frozen=True):
    """Certificate and key as PEM. The repr shows neither."""

    certificate: bytes
    key: bytes

    def __repr__(self) -> str:
        return "Authority()"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, in hexadecimal."""
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(self.certificate.decode())).hexdigest()


def load_authority(directory: Path, purpose: str = "egress") -> Authority:
    """The CA in ``directory``, created if it is missing or incomplete. ``purpose`` is a part of its name."""
    certificate, key = directory / "ca.pem", directory / "ca.key"
    try:
        if not (certificate.exists() and key.exists()):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            from hypeman.egress.new_authority import make_authority  # 8 MB, needed once per host

            made_certificate, made_key = make_authority(datetime.datetime.now(datetime.UTC), purpose)
            write_file(key, made_key)
            write_file(certificate, made_certificate, 0o644)
        return Authority(certificate.read_bytes(), key.read_bytes())
    except OSError as error:
        raise InternalError(f"the {purpose} certificate authority in {directory} cannot be used: {error}") from error
