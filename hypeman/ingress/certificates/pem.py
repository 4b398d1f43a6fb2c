"""Reads certificates and keys, and refuses what a TLS server could not use."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hypeman.ingress.certificates.types import Pair

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes

MAX_PEM = 64 << 10
"""Bytes of a chain, and of a key: both go into one message to the carrier."""
_MIN_RSA = 2048
_WEAK = ("md5", "sha1")


class BadCertificate(Exception):
    """The message says what is wrong, and never contains a key."""


def read_pair(chain: bytes, key: bytes) -> Pair:
    """Raises BadCertificate."""
    # Loaded late: 19 MB that a host without TLS does not need.
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if len(chain) > MAX_PEM or len(key) > MAX_PEM:
        raise BadCertificate(f"it is larger than {MAX_PEM >> 10} KB")
    try:
        certificates = x509.load_pem_x509_certificates(chain)
        leaf = certificates[0]
        alternative = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = tuple(dict.fromkeys(name.lower() for name in alternative.get_values_for_type(x509.DNSName)))
        required = _required_features(leaf)
        public = leaf.public_key()
        not_before, not_after = leaf.not_valid_before_utc, leaf.not_valid_after_utc
        weak = [
            used.name
            for certificate in certificates
            if certificate.issuer != certificate.subject
            and (used := certificate.signature_hash_algorithm)
            and used.name in _WEAK
        ]
    except x509.ExtensionNotFound:
        raise BadCertificate("the certificate has no subject alternative names") from None
    except Exception as error:  # malformed extensions raise many kinds
        raise BadCertificate(f"the certificate cannot be read as PEM: {_short(error)}") from None
    try:
        private = serialization.load_pem_private_key(key, password=None)
    except TypeError:
        raise BadCertificate("the key is encrypted; it must have no password") from None
    except Exception:  # the text of the error may quote the key
        raise BadCertificate("the key cannot be read as PEM") from None
    match private:
        case rsa.RSAPrivateKey():
            if private.key_size < _MIN_RSA:
                raise BadCertificate(f"the key has {private.key_size} bits; RSA needs {_MIN_RSA}")
        case ec.EllipticCurvePrivateKey():
            if private.curve.name not in ("secp256r1", "secp384r1", "secp521r1"):
                raise BadCertificate(f"the key is on {private.curve.name}, which TLS clients do not support")
        case ed25519.Ed25519PrivateKey():
            pass
        case _:
            raise BadCertificate("the key is neither RSA, ECDSA nor Ed25519")
    if public != private.public_key():
        raise BadCertificate("the key does not belong to the certificate")
    if weak:
        raise BadCertificate(f"it is signed with {weak[0]}, which TLS clients refuse")
    if not names:
        raise BadCertificate("the certificate has no DNS names")
    if required:
        raise BadCertificate("the certificate requires OCSP stapling, which is not supported; order one without it")
    return Pair(
        chain="".join(certificate.public_bytes(serialization.Encoding.PEM).decode() for certificate in certificates),
        key=key_pem(private),
        names=names,
        not_before=not_before,
        not_after=not_after,
    )


def _required_features(leaf: x509.Certificate) -> int:
    """How many extensions of TLS a server that shows it must support (RFC 7633): of OCSP stapling."""
    from cryptography import x509

    try:
        return len(list(leaf.extensions.get_extension_for_class(x509.TLSFeature).value))
    except x509.ExtensionNotFound:
        return 0


def key_pem(key: CertificateIssuerPrivateKeyTypes) -> str:
    """Not encrypted."""
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def is_expired(pair: Pair, now: datetime) -> bool:
    return pair.not_after <= now.astimezone(UTC)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
