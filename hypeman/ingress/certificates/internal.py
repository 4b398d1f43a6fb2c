"""The internal CA: for hosts without a public name. Blocking.

    ingress/ca.pem      the root's certificate, which clients have to trust      0644
    ingress/ca.key      its private key                                          0600

Leaves are not stored: they are valid for a week, and a restarted server makes others.
"""

from __future__ import annotations

import datetime
import threading
from pathlib import Path

from hypeman.egress.authority import Authority, load_authority
from hypeman.errors import InternalError
from hypeman.ingress.certificates.pem import key_pem
from hypeman.ingress.certificates.types import Pair

LIFETIME = datetime.timedelta(days=7)
RENEW_BEFORE = datetime.timedelta(days=3)
"""Before its end a leaf is replaced."""
_BACKDATED = datetime.timedelta(hours=1)
"""For clients whose clocks are behind."""


class InternalCA:
    """The root is made when it is first needed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._loading = threading.Lock()

    def root(self) -> str:
        """The root's certificate, PEM. Raises InternalError."""
        return self._load().certificate.decode()

    def _load(self) -> Authority:
        with self._loading:  # two threads that make one at a time could leave the key of the one with the other
            return load_authority(self._directory, "ingress")

    def issue(self, name: str, now: datetime.datetime) -> Pair:
        """A certificate with a new key. Raises InternalError."""
        try:
            return self._issue(name, now)
        except (ValueError, TypeError) as error:  # the files were changed by others, or ten years are over
            raise InternalError(f"the certificate authority in {self._directory} cannot be used: {error}") from None

    def _issue(self, name: str, now: datetime.datetime) -> Pair:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID

        authority = self._load()
        root = x509.load_pem_x509_certificate(authority.certificate)
        signer = serialization.load_pem_private_key(authority.key, password=None)
        if not isinstance(signer, ec.EllipticCurvePrivateKey) or signer.public_key() != root.public_key():
            raise ValueError("the key does not belong to the certificate")
        key = ec.generate_private_key(ec.SECP256R1())
        begin = (now - _BACKDATED).replace(microsecond=0)
        end = min((now + LIFETIME).replace(microsecond=0), root.not_valid_after_utc)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))  # a common name has 64 characters at most, a host name 253
            .issuer_name(root.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(end)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
                    key_agreement=False, key_cert_sign=False, crl_sign=False, encipher_only=False, decipher_only=False,
                ),
                critical=True,
            )
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(signer, hashes.SHA256())
        )  # fmt: skip
        return Pair(
            chain=certificate.public_bytes(serialization.Encoding.PEM).decode(),
            key=key_pem(key),
            names=(name,),
            not_before=begin,
            not_after=end,
        )
