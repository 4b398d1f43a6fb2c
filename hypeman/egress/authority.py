"""The host's certificate authority: made once, trusted by its guests only, key never outside this directory.

    egress/ca.pem       the certificate, given to guests             0644
    egress/ca.key       its private key                              0600

Leaves are minted by the data plane (`ext/egress/mint.c`): valid for a day, for exactly one name.
"""

from __future__ import annotations

import datetime
import os
import secrets
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hypeman.errors import InternalError

YEARS = 10


class Authority(msgspec.Struct, frozen=True):
    """Certificate and key as PEM. The repr shows neither."""

    certificate: bytes
    key: bytes

    def __repr__(self) -> str:
        return "Authority()"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, in hexadecimal."""
        return x509.load_pem_x509_certificate(self.certificate).fingerprint(hashes.SHA256()).hex()


def make_authority(now: datetime.datetime) -> Authority:
    """A new CA: P-256, may sign leaves only, ten years."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "hypeman"),
            x509.NameAttribute(x509.NameOID.COMMON_NAME, f"hypeman egress CA {secrets.token_hex(4)}"),
        ]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=365 * YEARS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
                key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    return Authority(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def load_authority(directory: Path) -> Authority:
    """The CA kept in ``directory``, made now if there is none or only half of one."""
    certificate, key = directory / "ca.pem", directory / "ca.key"
    try:
        if not (certificate.exists() and key.exists()):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            made = make_authority(datetime.datetime.now(datetime.UTC))
            write_private(key, made.key, 0o600)
            write_private(certificate, made.certificate, 0o644)
        return Authority(certificate.read_bytes(), key.read_bytes())
    except OSError as error:
        raise InternalError(f"the egress certificate authority in {directory} can not be used: {error}") from error


def write_private(path: Path, data: bytes, mode: int) -> None:
    """Writes a file that is whole or not there, readable by nobody else at any moment."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        temporary.rename(path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
