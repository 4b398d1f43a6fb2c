"""Which chains prove a host's name: what hosts send beside the one good path must not hide it, and nothing that has no
good path may pass. Each verdict is compared with Go's as well."""

from __future__ import annotations

import datetime
import itertools
import json
import shutil
import ssl
import subprocess
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.egress.conftest import HOST, PORTS, Origin
from tests.egress.test_connect import SIGNS, connect

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
Certificate = x509.Certificate


class Name:
    """A certificate authority's name and key; certificates for it may have many issuers."""

    def __init__(self, name: str, key: ec.EllipticCurvePrivateKey | None = None) -> None:
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.key = key or ec.generate_private_key(ec.SECP256R1())

    def certify(
        self,
        subject: Name,
        *,
        ca: bool | None = True,
        host: str | None = None,
        expired: bool = False,
        early: bool = False,
        path_length: int | None = None,
        permitted: str | None = None,
        excluded: str | None = None,
        usage: x509.ObjectIdentifier | None = None,
        signs: bool = True,
        identifier: bytes | None = None,
        no_identifiers: bool = False,
        signed_by: Name | None = None,
        critical: x509.ObjectIdentifier | None = None,
    ) -> Certificate:
        start = NOW - 3 * DAY if expired else NOW + DAY if early else NOW - DAY
        end = NOW - DAY if expired else NOW + 2 * DAY
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject.name)
            .issuer_name(self.name)
            .public_key(subject.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
        )
        if ca is not None:
            builder = builder.add_extension(x509.BasicConstraints(ca, path_length if ca else None), critical=True)
        if ca and signs:
            builder = builder.add_extension(SIGNS, critical=True)
        if not no_identifiers:
            known = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
            if identifier:
                known = x509.AuthorityKeyIdentifier(identifier, None, None)
            builder = builder.add_extension(known, critical=False)
            builder = builder.add_extension(
                x509.SubjectKeyIdentifier.from_public_key(subject.key.public_key()), critical=False
            )
        if host:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        if permitted or excluded:
            builder = builder.add_extension(
                x509.NameConstraints(
                    [x509.DNSName(permitted)] if permitted else None, [x509.DNSName(excluded)] if excluded else None
                ),
                critical=True,
            )
        if usage:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if critical:
            builder = builder.add_extension(x509.UnrecognizedExtension(critical, b"\x05\x00"), critical=True)
        return builder.sign((signed_by or self).key, hashes.SHA256())


class Case(NamedTuple):
    good: bool
    roots: list[Certificate]
    sent: list[Certificate]
    """The host's own first."""


ROOT, OTHER_ROOT, STRANGER = Name("root"), Name("other root"), Name("stranger")
A, B, C, LEAF = Name("a"), Name("b"), Name("c"), Name("leaf")
A_OTHER_KEY = Name("a")
UNKNOWN = x509.ObjectIdentifier("1.3.6.1.4.1.99999.1")


@cache
def cases() -> dict[str, Case]:
    root, other, strange = (each.certify(each) for each in (ROOT, OTHER_ROOT, STRANGER))
    old_root = ROOT.certify(ROOT, expired=True)
    a, b = ROOT.certify(A), A.certify(B)
    by_a = partial(A.certify, LEAF, ca=False, host=HOST)
    leaf = by_a()
    by_b = B.certify(LEAF, ca=False, host=HOST)
    found: dict[str, Case] = {}

    def case(name: str, good: bool, roots: list[Certificate], *sent: Certificate) -> None:
        found[name] = Case(good, roots, list(sent))

    def either(name: str, bad: Certificate, good: Certificate = a, roots: list[Certificate] | None = None) -> None:
        """The bad one alone is refused; beside a good one, in either order, it does no harm."""
        trusted = roots or [root]
        case(f"{name}, alone", False, trusted, leaf, bad)
        case(f"{name}, before a good one", True, trusted, leaf, bad, good)
        case(f"{name}, behind a good one", True, trusted, leaf, good, bad)

    case("by the root", True, [root], ROOT.certify(LEAF, ca=False, host=HOST))
    case("one intermediate", True, [root], leaf, a)
    case("two intermediates", True, [root], by_b, b, a)
    case("in the wrong order", True, [root], by_b, a, b)
    case("with the root", True, [root], leaf, a, root)
    case("root first", True, [root], leaf, root, a)
    case("strangers in between", True, [root], by_b, strange, b, other, a)
    case("sent twice", True, [root], leaf, a, a)
    case("intermediate missing", False, [root], by_b, b)
    case("nothing sent", False, [root], leaf)
    case("root unknown", False, [other], leaf, a, root)
    case("stranger's own root sent", False, [root], STRANGER.certify(LEAF, ca=False, host=HOST), strange)

    either("expired", ROOT.certify(A, expired=True))
    either("not yet valid", ROOT.certify(A, early=True))
    either("by a stranger", STRANGER.certify(A))
    either("no CA", ROOT.certify(A, ca=False))
    either("no basic constraints", ROOT.certify(A, ca=None))
    either("may not sign", ROOT.certify(A, usage=CLIENT))
    either("names permitted elsewhere", ROOT.certify(A, permitted="other.test"))
    either("names excluded", ROOT.certify(A, excluded=HOST))
    either("signature of another", ROOT.certify(A, signed_by=STRANGER))
    either("unknown critical extension", ROOT.certify(A, critical=UNKNOWN))
    either("another key of that name", ROOT.certify(A_OTHER_KEY))
    either("cross sign by an untrusted root", STRANGER.certify(A), OTHER_ROOT.certify(A), [other])
    case("constraints that permit", True, [root], leaf, ROOT.certify(A, permitted="example.com"))
    case("for servers", True, [root], leaf, ROOT.certify(A, usage=SERVER))
    case("signature of another, same key identifier", False, [root], leaf,
         ROOT.certify(A, signed_by=STRANGER, identifier=b"\1" * 20))  # fmt: skip

    short = ROOT.certify(A, path_length=0)
    case("path too long, alone", False, [root], by_b, b, short)
    case("path too long, before a good one", True, [root], by_b, b, short, a)
    case("path too long, behind a good one", True, [root], by_b, b, a, short)
    case("path just long enough", True, [root], by_b, b, ROOT.certify(A, path_length=1))
    case("constraints two above", False, [root], by_b, b, ROOT.certify(A, permitted="other.test"))
    case("constraints two above, with a way round", True, [root], by_b, b,
         ROOT.certify(A, permitted="other.test"), OTHER_ROOT.certify(A), ROOT.certify(OTHER_ROOT))  # fmt: skip

    case("root renewed under the same key", True, [old_root, root], leaf, a)
    case("old root behind the new one", True, [root, old_root], leaf, a)
    case("old root alone", False, [old_root], leaf, a)
    case("root cross-signed by a stranger", True, [root], leaf, a, STRANGER.certify(ROOT), strange)
    case("root cross-signed, expired", True, [root], leaf, a, OTHER_ROOT.certify(ROOT, expired=True))
    case("root cross-signed by the only trusted", True, [other], leaf, a, OTHER_ROOT.certify(ROOT))
    case("cross sign of both, one expired", True, [other], leaf, a, OTHER_ROOT.certify(ROOT, expired=True),
         OTHER_ROOT.certify(ROOT))  # fmt: skip

    case("wrong key identifier in the leaf", True, [root], by_a(identifier=b"\1" * 20), a)
    case("wrong key identifier in an intermediate", True, [root], leaf, ROOT.certify(A, identifier=b"\1" * 20))
    case(
        "wrong key identifiers everywhere",
        True,
        [root],
        by_a(identifier=b"\2" * 20),
        ROOT.certify(A, identifier=b"\3" * 20),
    )
    case("loop beside the path", True, [root], by_b, A.certify(B), B.certify(A), a)
    case("loop only", False, [root], by_b, A.certify(B), B.certify(A))
    case("trusted intermediate", True, [a], leaf)
    case("trusted intermediate, sent too", True, [a], leaf, a)
    case("trusted intermediate, expired", False, [ROOT.certify(A, expired=True)], leaf)
    case(
        "leaf signs a leaf",
        False,
        [root],
        LEAF.certify(C, ca=False, host=HOST),
        ROOT.certify(LEAF, ca=False, host=HOST),
    )

    # A mesh: each level has two names, each signed by both of the level above; one of all paths is not expired.
    levels = [(Name(f"left {n}"), Name(f"right {n}")) for n in range(4)]
    mesh = [ROOT.certify(levels[0][0]), ROOT.certify(levels[0][1], expired=True)]
    for above, below in itertools.pairwise(levels):
        for i, upper in enumerate(above):
            mesh += [upper.certify(lower, expired=i == 1 or k == 1) for k, lower in enumerate(below)]
    last = levels[-1][0].certify(LEAF, ca=False, host=HOST)
    case("mesh", True, [root], last, *mesh)
    case("mesh, backwards", True, [root], last, *reversed(mesh))
    case("mesh without a way", False, [other], last, *mesh)

    case("leaf expired", False, [root], by_a(expired=True), a)
    case("leaf not yet valid", False, [root], by_a(early=True), a)
    case("leaf of another name", False, [root], A.certify(LEAF, ca=False, host="other.test"), a)
    case("leaf without a name", False, [root], A.certify(LEAF, ca=False), a)
    case("leaf for clients", False, [root], by_a(usage=CLIENT), a)
    case("leaf with an unknown critical extension", False, [root], by_a(critical=UNKNOWN), a)
    case("leaf that is self-signed", False, [root], LEAF.certify(LEAF, ca=False, host=HOST))
    case("leaf that is a CA", True, [root], A.certify(LEAF, host=HOST), a)

    case("no key identifiers in the leaf", False, [root], by_a(no_identifiers=True), a)
    case("no key identifiers in the intermediate", False, [root], leaf, ROOT.certify(A, no_identifiers=True))
    case("intermediate without key usage", False, [root], leaf, ROOT.certify(A, signs=False))
    return found


STRICTER = {
    "no key identifiers in the leaf": "RFC 5280 4.2.1.1: MUST be there",
    "no key identifiers in the intermediate": "RFC 5280 4.2.1.2: MUST be there in a CA",
    "intermediate without key usage": "RFC 5280 4.2.1.3: MUST be there in a CA",
}
"""Chains that Go accepts and we refuse, and why. There is none the other way round."""


def pem(certificates: list[Certificate]) -> str:
    return "".join(certificate.public_bytes(serialization.Encoding.PEM).decode() for certificate in certificates)


@pytest.mark.parametrize("name", list(cases()))
async def test_path(make_world: Any, tmp_path: Path, name: str) -> None:
    """200 over a good path, else 502 and the host has not seen a byte of the request."""
    case = cases()[name]
    roots = tmp_path / "roots.pem"
    roots.write_text(pem(case.roots))
    key = next(each.key for each in (LEAF, C) if each.key.public_key() == case.sent[0].public_key())
    own = tmp_path / "own.pem"
    own.write_text(pem(case.sent))
    secret = tmp_path / "key.pem"
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    async with make_world(extra_ca_file=str(roots)) as world:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(own, secret)
        host = Origin()
        listeners = await world.nursery.start(
            partial(trio.serve_ssl_over_tcp, host.serve, 0, context, host="127.0.0.1", handler_nursery=world.nursery)
        )
        port = listeners[0].transport_listener.socket.getsockname()[1]
        PORTS.append(port)
        await world.allow()
        wire, _, _ = await connect(world, f"{HOST}:{port}")
        inside = await world.tls(over=wire)
        status, fields, body = await world.ask(inside, f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        if case.good:
            assert status == 200, body
        else:
            assert (status, fields["x-hypeman-egress"]) == (502, "upstream_certificate"), body
            assert host.requests == []


@pytest.mark.skipif(not shutil.which("go"), reason="go is not installed")
def test_go_says_the_same() -> None:
    """But for the chains of STRICTER."""
    told = {name: {"roots": pem(case.roots), "sent": pem(case.sent), "host": HOST} for name, case in cases().items()}
    program = Path(__file__).with_name("chain_verdicts.go")
    result = subprocess.run(["go", "run", str(program)], input=json.dumps(told), capture_output=True, text=True,
                          check=True, timeout=300)  # fmt: skip
    output = json.loads(result.stdout)
    differ = {name: output[name] for name, case in cases().items() if case.good != (output[name] == "")}
    assert set(differ) == set(STRICTER), differ
