"""Requests signed with placeholder keys leave signed with the real ones: published examples, botocore as oracle.

The examples are those of the SigV4 test suite and of the Amazon S3 API Reference ("Authenticating Requests"): requests,
keys and signatures are facts; here they are signed by a guest's SDK with placeholder keys first, as it would.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import botocore.auth
import botocore.awsrequest
import botocore.credentials
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from hypeman._native.egress import rewrite_head
from hypeman.egress.policy import compile_policy, guest_environment
from hypeman.egress.types import CredentialPolicy, CredentialSource, InjectAs, InjectRule, SigV4Form
from hypeman.errors import InvalidRequest
from tests.egress.conftest import HOST, World
from tests.egress.test_http2 import GrpcLike, client, grpc, through
from tests.egress.test_transforms import used_as

__all__ = ["grpc"]  # a fixture

ID, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
S3_ID, S3_SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
SUITE, BUCKET = "example.amazonaws.com", "examplebucket.s3.amazonaws.com"
SUITE_TIME, S3_TIME = datetime(2015, 8, 30, 12, 36, tzinfo=UTC), datetime(2013, 5, 24, tzinfo=UTC)
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
FORM = "application/x-www-form-urlencoded"


def compiled(host: str, service: str, value: str, region: str = "us-east-1") -> bytearray:
    rule = InjectRule(hosts=(host,), as_=InjectAs(sigv4=SigV4Form(region=region, service=service)))
    return compile_policy({"AWS": CredentialPolicy(source=CredentialSource(env="K"), inject=(rule,))}, {"K": value})


def placeheld(service: str, names: str, region: str = "us-east-1") -> str:
    """What a guest's SDK would write: only which key, scope and fields matters."""
    return (
        f"AWS4-HMAC-SHA256 Credential=mock-AWS/20000101/{region}/{service}/aws4_request, SignedHeaders={names}, "
        f"Signature={'0' * 64}"
    )


def sign(
    rules: bytearray, host: str, line: str, fields: dict[str, str], when: datetime, body: bytes = b""
) -> tuple[str, dict[str, str], bytes]:
    """The request line, fields and body that leave."""
    head = f"{line} HTTP/1.1\r\nHost: {host}\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items())
    if body:
        head += f"Content-Length: {len(body)}\r\n"
    sent = bytearray(body)
    found = rewrite_head((head + "\r\n").encode(), rules, host.encode(), False, 443, int(when.timestamp()), sent)
    assert isinstance(found, bytes), found
    lines = found.decode().split("\r\n")
    return lines[0], {n.lower(): v for n, _, v in (line.partition(": ") for line in lines[1:] if line)}, bytes(sent)


def signature(fields: dict[str, str]) -> str:
    return fields["authorization"].rpartition("Signature=")[2]


@pytest.mark.parametrize(
    ("line", "fields", "body", "wanted"),
    [
        ("GET /", {}, b"", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
        ("POST /", {}, b"", "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"),
        ("GET /?Param1=value1", {}, b"", "a67d582fa61cc504c4bae71f336f98b97f1ea3c7a6bfe1b6e45aec72011b9aeb"),
        ("GET /?Param2=value2&Param1=value1", {}, b"",
         "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500"),
        ("GET /example/..", {}, b"", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
        ("GET //", {}, b"", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
        ("POST /", {"Content-Type": FORM}, b"Param1=value1",
         "ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a"),
    ],
)  # fmt: skip
def test_the_suite(line: str, fields: dict[str, str], body: bytes, wanted: str) -> None:
    names = "content-type;host;x-amz-date" if fields else "host;x-amz-date"
    given = {**fields, "X-Amz-Date": "20000101T000000Z", "Authorization": placeheld("service", names)}
    rules = compiled(SUITE, "service", f"{ID}:{SECRET}")
    sent, left, _ = sign(rules, SUITE, line, given, SUITE_TIME, body)
    assert (signature(left), left["x-amz-date"]) == (wanted, "20150830T123600Z")
    assert sent == f"{line} HTTP/1.1"
    assert left["authorization"].startswith(
        f"AWS4-HMAC-SHA256 Credential={ID}/20150830/us-east-1/service/aws4_request, "
    )


S3_EXAMPLES = [
    ("GET /test.txt", {"Range": "bytes=0-9", "x-amz-content-sha256": EMPTY},
     "host;range;x-amz-content-sha256;x-amz-date",
     "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"),
    ("PUT /test%24file.text",
     {"Date": "Fri, 24 May 2013 00:00:00 GMT", "x-amz-storage-class": "REDUCED_REDUNDANCY",
      "x-amz-content-sha256": "44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072"},
     "date;host;x-amz-content-sha256;x-amz-date;x-amz-storage-class",
     "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"),
    ("GET /?lifecycle", {"x-amz-content-sha256": EMPTY}, "host;x-amz-content-sha256;x-amz-date",
     "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"),
    ("GET /?max-keys=2&prefix=J", {"x-amz-content-sha256": EMPTY}, "host;x-amz-content-sha256;x-amz-date",
     "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "fields", "names", "wanted"), S3_EXAMPLES)
def test_s3(line: str, fields: dict[str, str], names: str, wanted: str) -> None:
    rules = compiled(BUCKET, "s3", f"{S3_ID}:{S3_SECRET}")
    given = {**fields, "Authorization": placeheld("s3", names)}
    assert signature(sign(rules, BUCKET, line, given, S3_TIME)[1]) == wanted


PRESIGNED = (
    "/test.txt?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential={}%2F{}%2Fus-east-1%2Fs3%2Faws4_request"
    "&X-Amz-Date={}&X-Amz-Expires=86400&X-Amz-SignedHeaders=host"
)


def test_s3_presigned() -> None:
    rules = compiled(BUCKET, "s3", f"{S3_ID}:{S3_SECRET}")
    given = PRESIGNED.format("mock-AWS", "20300101", "20300101T000000Z") + "&X-Amz-Signature=" + "0" * 64
    line, fields, _ = sign(rules, BUCKET, f"GET {given}", {}, S3_TIME)
    wanted = PRESIGNED.format(S3_ID, "20130524", "20130524T000000Z")
    sum_ = "aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"
    assert line == f"GET {wanted}&X-Amz-Signature={sum_} HTTP/1.1"
    assert "authorization" not in fields


def test_s3_chunks() -> None:
    """The example of an upload in chunks of 64 KB: seed, both chunks and the last one."""
    rules = compiled("s3.amazonaws.com", "s3", f"{S3_ID}:{S3_SECRET}")
    names = "content-encoding;content-length;host;x-amz-content-sha256;x-amz-date;x-amz-decoded-content-length;"
    fields = {
        "x-amz-storage-class": "REDUCED_REDUNDANCY",
        "Authorization": placeheld("s3", names + "x-amz-storage-class"),
        "x-amz-content-sha256": "STREAMING-AWS4-HMAC-SHA256-PAYLOAD",
        "Content-Encoding": "aws-chunked",
        "x-amz-decoded-content-length": "66560",
    }
    signatures = (
        "ad80c730a21e5b8d04586a2213dd63b9a0e99e0e2307b0ade35a65485a288648",
        "0055627c9e194cb4542bae2aa5492e3c1575bbb81b612b7d234b86a503ef5497",
        "b6c6ea8a5354eaf15b3cb7646744f4275b71ea724fed81ceb9323e279d449df9",
    )
    parts = (b"a" * 65536 + b"\r\n", b"a" * 1024 + b"\r\n", b"\r\n")

    def body(of: tuple[str, ...]) -> bytes:
        sizes = (65536, 1024, 0)
        return b"".join(
            b"%x;chunk-signature=%b\r\n%b" % (size, each.encode(), part)
            for size, each, part in zip(sizes, of, parts, strict=True)
        )

    line = "PUT /examplebucket/chunkObject.txt"
    _, left, sent = sign(rules, "s3.amazonaws.com", line, fields, S3_TIME, body(("0" * 64,) * 3))
    assert signature(left) == "4f232c4386841ef735655705268965c44a0e4690baa4adea153f7db9fa80a0a9"
    assert sent == body(signatures)


# ── botocore as oracle ───────────────────────────────────────────────────────────────────────────

words = st.text("abcXYZ019-_.~ +%/:é&=?", min_size=1, max_size=6)
paths = st.lists(words, max_size=4).map(lambda parts: "/" + "/".join(quote(part, safe="") for part in parts))
queries = st.lists(
    st.tuples(words, words).map(lambda pair: "=".join(quote(part, safe="-_.~") for part in pair)), max_size=3
).map("&".join)
extra = st.dictionaries(
    st.sampled_from(["x-amz-meta-a", "X-Amz-Target", "Content-Type", "X-Other"]),
    st.text("ab 12,;=/", min_size=1, max_size=9).map(str.strip),
    max_size=3,
)


class Unsigned(botocore.auth.S3SigV4Auth):  # type: ignore[misc]
    def payload(self, request: Any) -> str:
        return "UNSIGNED-PAYLOAD"


def oracle(kind: Any, service: str, request: Any, token: str | None) -> str:
    """The signature that botocore makes of the same request at the same time."""
    signer = kind(botocore.credentials.Credentials(ID, SECRET, token), service, "us-east-1")
    request.context["timestamp"] = "20150830T123600Z"
    signer._modify_request_before_signing(request)
    return str(signer.signature(signer.string_to_sign(request, signer.canonical_request(request)), request))


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["GET", "PUT", "POST", "DELETE"]), paths, queries, extra, st.binary(max_size=20),
    st.sampled_from(["s3", "dynamodb"]), st.sampled_from([None, "tok+en/=="]),
)  # fmt: skip
def test_as_botocore(
    method: str, path: str, query: str, fields: dict[str, str], body: bytes, service: str, token: str | None
) -> None:
    host = "x.us-east-1.amazonaws.com"
    target = path + (f"?{query}" if query else "")
    names = ";".join(sorted({*(name.lower() for name in fields), "host", "x-amz-date"}))
    given_ = {**fields, "Authorization": placeheld(service, names)}
    if service == "s3":
        given_["x-amz-content-sha256"] = "UNSIGNED-PAYLOAD"
    rules = compiled(host, service, f"{ID}:{SECRET}" + (f":{token}" if token else ""))
    _, left, _ = sign(rules, host, f"{method} {target}", given_, SUITE_TIME, body)
    assert left.get("x-amz-security-token") == token
    kept = {name: value for name, value in left.items() if name in names.split(";") and name != "host"}
    kept |= {n: v for n, v in left.items() if n.startswith("x-amz-")}
    kept.pop("x-amz-date")
    kind = Unsigned if service == "s3" else botocore.auth.SigV4Auth
    request = botocore.awsrequest.AWSRequest(method, f"https://{host}{target}", headers=kept, data=body)
    assert signature(left) == oracle(kind, service, request, token)


# ── Through the engine ───────────────────────────────────────────────────────────────────────────

SIGV4 = InjectAs(sigv4=SigV4Form(region="eu-west-1", service="dynamodb"))
H = f"Host: {HOST}\r\n"


async def allow(world: World, value: str = f"{ID}:{SECRET}", shape: InjectAs = SIGV4) -> None:
    await world.allow(secret=value, AWS=used_as(shape))


def signed_head(method: str, path: str, more: str = "", *, names: str = "host;x-amz-date", **scope: str) -> str:
    given = placeheld(scope.get("service", "dynamodb"), names, scope.get("region", "eu-west-1"))
    if "key" in scope:
        given = given.replace("mock-AWS", scope["key"])
    return f"{method} {path} HTTP/1.1\r\n{H}Authorization: {given}\r\n{more}\r\n"


def expected(fields: list[tuple[str, str]], method: str, path: str, body: bytes) -> str:
    """The signature for the request as the origin got it."""
    got = {name.lower(): value for name, value in fields}
    names = re.search("SignedHeaders=([^,]*)", got["authorization"])
    assert names is not None
    kept = {
        name: got[name] for name in names[1].split(";") if name not in ("host", "x-amz-date", "x-amz-security-token")
    }
    request = botocore.awsrequest.AWSRequest(method, f"https://{got['host']}{path}", headers=kept, data=body)
    request.context["timestamp"] = got["x-amz-date"]
    token = got.get("x-amz-security-token")
    signer = botocore.auth.SigV4Auth(botocore.credentials.Credentials(ID, SECRET, token), "dynamodb", "eu-west-1")
    signer._modify_request_before_signing(request)
    return str(signer.signature(signer.string_to_sign(request, signer.canonical_request(request)), request))


@pytest.mark.parametrize("framing", ["length", "chunked", "expect"])
async def test_body_is_hashed(world: World, framing: str) -> None:
    """It is complete before the head leaves, whatever its form; the next request on the connection is untouched."""
    await allow(world)
    body = b'{"TableName": "t"}' * 10_000
    wire = await world.tls()
    more = {
        "length": f"Content-Length: {len(body)}\r\n",
        "chunked": "Transfer-Encoding: chunked\r\n",
        "expect": f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n",
    }[framing]
    await wire.send(signed_head("POST", "/", more).encode())
    if framing == "expect":
        assert await wire.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue"
    if framing == "chunked":
        half = len(body) // 2
        await wire.send(b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\nX-T: 1\r\n\r\n" % (half, body[:half], half, body[half:]))
    else:
        await wire.send(body[:7])
        await wire.send(body[7:])
    assert b" 200 " in await wire.until(b"\r\n\r\n")
    await wire.exactly(len(f"POST / {len(body)}"))
    request = world.origin.requests[0]
    assert request.body == body and request.all("content-length") == [str(len(body))]
    assert not request.all("transfer-encoding") and not request.all("expect") and not request.trailers
    assert signature(dict(request.fields)) == expected(request.fields, "POST", "/", body)
    assert (await world.ask(wire, signed_head("GET", "/next").encode()))[0] == 200
    assert signature(dict(world.origin.requests[1].fields)) == expected(
        world.origin.requests[1].fields, "GET", "/next", b""
    )


GIVEN = ("authorization", placeheld("dynamodb", "host;x-amz-date", "eu-west-1"))


async def test_http2_body_is_hashed(world: World) -> None:
    """Larger than the windows: they are granted while it is gathered."""
    await allow(world)
    peer = await client(world)
    stream = await peer.ask(GIVEN, method="POST", end=False)
    await peer.upload(stream, 3_000_000)
    assert (await peer.answer(stream))[2] == b"POST / 3000000"
    request = world.origin.requests[0]
    assert request.all("content-length") == ["3000000"]
    assert signature(dict(request.fields)) == expected(request.fields, "POST", "/", request.body)


async def test_http2_on_both_sides(world: World, grpc: GrpcLike) -> None:
    await allow(world)
    peer = await through(world, grpc)
    stream = await peer.ask(GIVEN, method="POST", end=False)
    await peer.upload(stream, 2_000_000)
    assert (await peer.answer(stream))[2] == b"2000000"
    fields = [(name.removeprefix(":").replace("authority", "host"), value) for name, value in grpc.heads[0].items()]
    assert signature(dict(fields)) == expected(fields, "POST", "/", b"x" * 2_000_000)
    stream = await peer.ask(GIVEN, ("content-length", "5000000"), method="POST", end=False)
    assert (await peer.answer(stream))[1][":status"] == "413"


async def test_token_and_rotation(world: World) -> None:
    """A session token comes and goes with the keys, whatever the guest sends for one."""
    await allow(world, f"{ID}:{SECRET}:tok+/=")
    wire = await world.tls()
    more = "X-Amz-Security-Token: mine\r\nX-Amz-Date: 20000101T000000Z\r\n"
    assert (await world.ask(wire, signed_head("GET", "/?b=2&a=1", more).encode()))[0] == 200
    request = world.origin.requests[0]
    assert request.all("x-amz-security-token") == ["tok+/="]
    assert request.all("x-amz-date")[0].startswith(f"{datetime.now(UTC):%Y%m}"), "the host's time, not the guest's"
    assert signature(dict(request.fields)) == expected(request.fields, "GET", "/?b=2&a=1", b"")
    await allow(world)
    assert (await world.ask(wire, signed_head("GET", "/", more).encode()))[0] == 200
    assert world.origin.requests[1].all("x-amz-security-token") == []


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (signed_head("GET", "/", region="us-east-1"), "region and service"),
        (signed_head("GET", "/", service="s3"), "region and service"),
        (signed_head("GET", "/", key="AKIAREAL"), "access key"),
        (signed_head("GET", "/?X-Amz-Algorithm=AWS4-HMAC-SHA256"), "twice"),
        (f"GET / HTTP/1.1\r\n{H}Authorization: AWS mock-AWS:c2ln\r\n\r\n", "usual form"),
        (f"GET / HTTP/1.1\r\n{H}Authorization: AWS4-HMAC-SHA256 Credential=mock-AWS\r\n\r\n", "usual form"),
        (f"GET / HTTP/1.1\r\n{H}Authorization: Bearer x\r\n\r\n", "usual form"),
        (f"GET /?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Expires=9999999 HTTP/1.1\r\n{H}\r\n", "usual form"),
        (signed_head("GET", "/", "X-Amz-Content-Sha256: STREAMING-AWS4-ECDSA-P256-SHA256-PAYLOAD\r\n"), "unknown kind"),
        (signed_head("PUT", "/", "X-Amz-Content-Sha256: STREAMING-AWS4-HMAC-SHA256-PAYLOAD\r\nContent-Length: 5\r\n")
         + "abcde", "aws-chunked"),
    ],
)  # fmt: skip
async def test_refused(world: World, head: str, reason: str) -> None:
    """What cannot be signed again does not leave, and says why."""
    await allow(world)
    wire = await world.tls()
    status, fields, body = await world.ask(wire, head.encode())
    assert (status, fields["x-hypeman-egress"]) == (403, "signature_refused")
    assert reason in body.decode() and SECRET not in body.decode()
    assert world.origin.requests == []


async def test_unsigned_request_stays_so(world: World) -> None:
    await allow(world)
    assert (await world.get("/public"))[0] == 200
    assert world.origin.requests[0].all("authorization") == []


async def test_body_too_large_to_be_held(world: World) -> None:
    """By its length at once, or where it becomes too long."""
    await allow(world)
    wire = await world.tls()
    head = signed_head("POST", "/", "Content-Length: 5000000\r\n")
    status, fields, _ = await world.ask(wire, head.encode())
    assert (status, fields["x-hypeman-egress"]) == (413, "body_too_large")
    wire = await world.tls()
    await wire.send(signed_head("POST", "/", "Transfer-Encoding: chunked\r\n").encode())
    with trio.move_on_after(30):
        try:
            for _ in range(90):
                await wire.send(b"10000\r\n" + bytes(65536) + b"\r\n")
        except trio.BrokenResourceError:
            pass
    assert b" 413 " in await wire.until(b"\r\n\r\n")
    assert world.origin.requests == []


@pytest.mark.parametrize(
    "value", ["", "id", "id:", ":secret", "a/b:secret", "id:se cret", "{}", '{"AccessKeyId": "sec"}', "a:b:c:d"]
)
def test_keys_refused_unspoken(value: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compiled(SUITE, "s3", value)
    assert "sec" not in str(caught.value).replace("secret key", "").replace("SECRET", "")


def test_keys_of_a_credential_process() -> None:
    said = '{"Version": 1, "AccessKeyId": "A", "SecretAccessKey": "S+/", "SessionToken": "T", "Expiration": "x"}'
    assert compiled(SUITE, "s3", said) == compiled(SUITE, "s3", "A:S+/:T")


def test_guest_environment() -> None:
    """An SDK finds keys to sign with, unless the guest has its own."""
    rule = InjectRule(as_=InjectAs(sigv4=SigV4Form(region="r", service="s")))
    rules = {"AWS": CredentialPolicy(source=CredentialSource(env="K"), inject=(rule,))}
    seen = guest_environment(rules, {"K": "a:b", "AWS_SECRET_ACCESS_KEY": "x"})
    assert seen == {"AWS": "mock-AWS", "AWS_ACCESS_KEY_ID": "mock-AWS", "AWS_SECRET_ACCESS_KEY": "x"}


def test_two_scopes_of_one_host() -> None:
    """The guest's signature says which is meant; a header for the same host would overwrite it."""
    both = tuple(
        InjectRule(hosts=("a.b",), as_=InjectAs(sigv4=SigV4Form(region="r", service=service))) for service in "st"
    )
    source = CredentialSource(env="K")
    compile_policy({"A": CredentialPolicy(source=source, inject=both)}, {"K": "a:b"})
    bearer = InjectRule(hosts=("a.b",), as_=InjectAs(header="Authorization", format="Bearer ${value}"))
    for clash in ((both[0], both[0]), (both[0], bearer)):
        with pytest.raises(InvalidRequest, match="same host"):
            compile_policy({"A": CredentialPolicy(source=source, inject=clash)}, {"K": "a:b"})
