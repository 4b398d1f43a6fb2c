"""What is refused when it is configured, and what is compiled; sealing and the authority."""

from __future__ import annotations

import base64
import stat
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from hypeman.egress.authority import Authority, load_authority
from hypeman.egress.guest_env import proxy_environment, trust_environment
from hypeman.egress.policy import (
    MAX_RULES_PER_HOST,
    HostPattern,
    Unmatched,
    check_credentials,
    compile_policy,
    guest_environment,
    parse_host,
    rotate,
    secrets_of,
    sources_of,
    wipe,
)
from hypeman.egress.sealing import load_sealer
from hypeman.egress.transforms import FIXED_HEADERS, Value, form_of, render_value
from hypeman.egress.types import BodyForm, CredentialPolicy, CredentialSource, InjectAs, InjectRule
from hypeman.errors import InternalError, InvalidRequest
from tests.egress.conftest import credential

ENV = {"REAL_KEY": "sk-1", "OTHER_KEY": "sk-2", "PLAIN": "x"}


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("API.example.com", "api.example.com"), ("a.b.", "a.b"), ("*.X.y", "*.x.y"), ("localhost", "localhost"),
     ("xn--bcher-kva.example", "xn--bcher-kva.example"), ("a_b.c", "a_b.c")],
)  # fmt: skip
def test_hosts(text: str, canonical: str) -> None:
    assert parse_host(text) == canonical


@pytest.mark.parametrize(
    "text",
    ["", ".", "*", "*.", "*.com", "a..b", "-a.b", "a-.b", "a b", "bücher.example", "a.b:443", "https://a.b", "a/b",
     "*.*.x.y", "a.*.y", "x*.y.z", "127.0.0.1", "127.1", "1.0x7f", "[::1]", "::1", "a@b.c", "a%2e.b", "a" * 64 + ".b",
     "a." * 130 + "b", "a#b.c", "a.b.."],
)  # fmt: skip
def test_hosts_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_host(text)


def test_wildcard_covers_one_label() -> None:
    pattern = parse_host("*.x.y")
    assert [pattern.covers(name) for name in ("a.x.y", "x.y", "a.b.x.y", "ax.y", "a.x.yz")] == [True] + [False] * 4


@pytest.mark.parametrize(
    ("template", "value"),
    [
        ("Bearer ${value}", "Bearer s3"),
        ("${value}", "s3"),
        ("a${value}b${value}", "as3bs3"),
        ("Basic ${base64(x-access-token:value)}", "Basic " + base64.b64encode(b"x-access-token:s3").decode()),
        ("Basic ${base64(value:)}", "Basic " + base64.b64encode(b"s3:").decode()),
    ],
)
def test_templates(template: str, value: str) -> None:
    assert render_value(template, "s3") == value


@pytest.mark.parametrize(
    "template",
    ["", "Bearer", "$value", "${VALUE}", "${value", "${other} ${value}", "${base64(a:b)}", "${base64(value)}",
     "${value}\r\nX: y", " ${value}", "${value}\0", "é${value}"],
)  # fmt: skip
def test_templates_refused(template: str) -> None:
    with pytest.raises(InvalidRequest):
        render_value(template, "s3")


@pytest.mark.parametrize("secret", ["", "a\r\nb", "a\nb", "a\0b", "é", "\x7f", "x" * 9000])
def test_values_refused_unspoken(secret: str) -> None:
    """The error never repeats the value."""
    with pytest.raises(InvalidRequest) as caught:
        render_value("Bearer ${value}", secret)
    assert not secret or secret not in str(caught.value)


@pytest.mark.parametrize("header", [*sorted(FIXED_HEADERS), "Host", "Transfer-Encoding", "a b", "", "a:", "é", ":path"])
def test_headers_refused(header: str) -> None:
    with pytest.raises(InvalidRequest):
        compile_policy({"K": credential("a.b", header=header)}, ENV)


@pytest.mark.parametrize(
    ("one", "two", "clash"),
    [
        (("a.b.c",), ("a.b.c",), True),
        (("a.b.c",), ("A.b.C.",), True),
        (("a.b.c",), ("*.b.c",), True),
        (("*.b.c",), ("*.b.c",), True),
        ((), ("a.b.c",), True),
        (("a.b.c",), (), True),
        ((), (), True),
        (("a.b.c",), ("d.b.c",), False),
        (("*.b.c",), ("b.c",), False),
        (("*.b.c",), ("x.a.b.c",), False),
        (("*.b.c",), ("*.d.c",), False),
    ],
)
def test_two_rules_for_one_header_of_one_host(one: tuple[str, ...], two: tuple[str, ...], clash: bool) -> None:
    """Refused, since chance would choose; another header is no clash."""
    pair = {"K": credential(*one), "L": credential(*two, env="OTHER_KEY", header="authorization")}
    if clash:
        with pytest.raises(InvalidRequest, match="same host"):
            compile_policy(pair, ENV)
    else:
        compile_policy(pair, ENV)
    compile_policy({"K": credential(*one), "L": credential(*two, header="X-Key")}, ENV)


def body_rule(*hosts: str, ports: tuple[int, ...] | None = None) -> CredentialPolicy:
    """One of those of which several may be for one host, since each has a placeholder of its own."""
    rule = InjectRule(hosts=hosts or None, as_=InjectAs(body=BodyForm()), ports=ports)
    return CredentialPolicy(source=CredentialSource(env="REAL_KEY"), inject=(rule,))


def test_a_placeholder_stands_for_one_rule_in_the_bodies_for_a_host() -> None:
    """Two credentials have one each; two rules of one credential would replace the same."""
    check_credentials({"K": body_rule("a.b"), "L": body_rule("a.b")}, ENV)
    twice = CredentialPolicy(source=CredentialSource(env="REAL_KEY"), inject=body_rule("a.b").inject * 2)
    with pytest.raises(InvalidRequest, match="same host"):
        check_credentials({"K": twice}, ENV)


@pytest.mark.parametrize(
    ("another", "refused"),
    [(("a.x.y",), True), (("*.x.y",), True), ((), True), (("other.y", "a.x.y"), True), (("b.x.y",), False)],
)
def test_more_rules_for_one_host_than_are_applied(another: tuple[str, ...], refused: bool) -> None:
    """A rule beyond the limit would be ignored, and the placeholder sent in place of the value."""
    given = {f"KEY{number}": body_rule("a.x.y", "c.y") for number in range(MAX_RULES_PER_HOST)}
    check_credentials({**given, "ANOTHER": body_rule(*another, ports=(8443,))}, ENV)
    with pytest.raises(InvalidRequest, match="17 inject rules are for the same host") if refused else nullcontext():
        check_credentials({**given, "ANOTHER": body_rule(*another)}, ENV)


def used(key: str = "K", source: CredentialSource | None = None, **rule: Any) -> dict[str, CredentialPolicy]:
    """One credential with one rule."""
    shape = InjectAs(header="X-Key", format="${value}")
    made = InjectRule(**{"as_": shape, "hosts": ("a.b",), **rule})
    return {key: CredentialPolicy(source=source or CredentialSource(env="REAL_KEY"), inject=(made,))}


def many(count: int, **rule: Any) -> dict[str, CredentialPolicy]:
    return {f"K{n}": policy for n in range(count) for policy in used(hosts=(f"h{n}.b",), **rule).values()}


LONG = {"REAL_KEY": "a-secret-of-some-length"}


@pytest.mark.parametrize(
    ("last", "beyond", "reason"),
    [
        (used(ports=(1, 65535)), used(ports=(0,)), "numbers from 1 to 65535"),
        (used(ports=(1,)), used(ports=(443, 65536)), "numbers from 1 to 65535"),
        (used(ports=tuple(range(1, 17))), used(ports=tuple(range(1, 18))), "1 to 16 numbers"),
        (used(ports=(1,)), used(ports=()), "1 to 16 numbers"),
        (used("K" * 256), used("K" * 257), "named like an environment variable"),
        (used("K"), used("K K"), "named like an environment variable"),
        (used(), used(source=CredentialSource()), "exactly one source"),
        (
            used(source=CredentialSource(named="x")),
            used(source=CredentialSource(env="REAL_KEY", named="x")),
            "one source",
        ),
        (used(hosts=("*.b.c",)), used(hosts=("*.c",)), "top-level domain"),
        (used(hosts=(".".join(["a" * 62] * 4) + ".b",)), used(hosts=(".".join(["a" * 62] * 4) + ".bb",)), "such as"),
        (used("K" * 64, scrub=True), used("K" * 65, scrub=True), "at most 64 characters"),
        (many(256), many(257), "at most 256 are allowed"),
        (many(16, scrub=True), many(33, scrub=True), "too many values"),
    ],
)
def test_the_last_that_is_accepted_and_the_first_that_is_refused(
    last: dict[str, CredentialPolicy], beyond: dict[str, CredentialPolicy], reason: str
) -> None:
    compile_policy(last, LONG)
    with pytest.raises(InvalidRequest, match=reason):
        compile_policy(beyond, LONG)


def test_rules_for_other_ports_or_of_other_forms_do_not_clash() -> None:
    compile_policy(used("K", ports=(443, 8443)) | used("L", ports=(80, 9443)), LONG)
    with pytest.raises(InvalidRequest, match="same host"):
        compile_policy(used("K", ports=(443, 8443)) | used("L", ports=(80, 8443)), LONG)
    with pytest.raises(InvalidRequest, match="same host"):
        compile_policy(used("K") | used("L", ports=(444,)), LONG, usual_port=444)


def test_where_a_value_comes_from() -> None:
    """From the request's env, or from what the server has obtained; without it, the rule has no value yet."""
    named = used("K", CredentialSource(named="file"))
    env = used("L", hosts=("c.d",))
    assert secrets_of(named | env, LONG) == LONG, "only sources in env are looked up there"
    assert sources_of(named | env) == {"REAL_KEY"}
    assert b"obtained" in compile_policy(named, {}, obtained={"K": Value("obtained")})
    assert compile_policy(named, {}, obtained={"L": Value("other")}) == compile_policy(named, {})
    with pytest.raises(InvalidRequest, match="value of credential 'L' is not known"):
        compile_policy(named | env, {"OTHER_KEY": "x"})


def test_the_compiled_rules_byte_by_byte() -> None:
    """As ext/egress/policy.c reads them: head, then key, placeholder, form, ports and hosts of each rule."""
    header = InjectAs(header="X-Key", format="${value}")
    rules = used(hosts=("a.b", "*.c.d"), ports=(443, 8443)) | used("L", hosts=None, as_=InjectAs(body=BodyForm()))
    first = form_of(header, "mock-K").compile(Value("s3"))
    second = form_of(InjectAs(body=BodyForm()), "mock-L").compile(Value("s3"))
    expected = (
        b"HEG3" + bytes([2, 1]) + (444).to_bytes(2, "little") + b"\2\0" + b"\2\0"
        + b"\1\0K" + b"\6\0mock-K" + first
        + bytes([0, 2]) + (443).to_bytes(2, "little") + (8443).to_bytes(2, "little")
        + b"\2\0" + b"\0\3\0a.b" + b"\1\3\0c.d"
        + b"\1\0L" + b"\6\0mock-L" + second
        + bytes([1, 1]) + (444).to_bytes(2, "little") + b"\0\0"
        + b"access"
    )  # fmt: skip
    found = compile_policy(rules, {"REAL_KEY": "s3"}, Unmatched.DENY, web_only=True, usual_port=444, access=b"access")
    assert bytes(found) == expected


def test_missing_value() -> None:
    with pytest.raises(InvalidRequest, match="REAL_KEY"):
        check_credentials({"K": credential("a.b")}, {"PLAIN": "x"})


def test_empty_lists() -> None:
    source = CredentialSource(env="REAL_KEY")
    shape = InjectAs(header="X", format="${value}")
    for inject in ((), (InjectRule(as_=shape, hosts=()),)):
        with pytest.raises(InvalidRequest):
            compile_policy({"K": CredentialPolicy(source=source, inject=inject)}, ENV)


def test_guest_environment() -> None:
    """The guest sees stand-ins and what is no secret."""
    seen = guest_environment({"API_KEY": credential("a.b"), "REAL_KEY": credential("c.d", env="REAL_KEY")}, ENV)
    assert seen == {"OTHER_KEY": "sk-2", "PLAIN": "x", "API_KEY": "mock-API_KEY", "REAL_KEY": "mock-REAL_KEY"}


def test_rotation_merges_and_refuses_other_keys() -> None:
    credentials = {"K": credential("a.b"), "L": credential("c.d", env="OTHER_KEY")}
    assert rotate(credentials, {"REAL_KEY": "1", "OTHER_KEY": "2"}, {"REAL_KEY": "3"}) == {
        "REAL_KEY": "3", "OTHER_KEY": "2",
    }  # fmt: skip
    for changes in ({"PLAIN": "x"}, {"REAL_KEY": "a\nb"}):
        with pytest.raises(InvalidRequest):
            rotate(credentials, {"REAL_KEY": "1", "OTHER_KEY": "2"}, changes)


def test_wipe() -> None:
    compiled = compile_policy({"K": credential("a.b")}, {"REAL_KEY": "very-secret"})
    assert b"Bearer very-secret" in compiled
    wipe(compiled)
    assert set(compiled) == {0}


labels = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_", min_size=1, max_size=8)


@given(st.lists(labels, min_size=1, max_size=4), st.lists(labels, min_size=1, max_size=4))
def test_overlap_agrees_with_coverage(one: list[str], two: list[str]) -> None:
    """Patterns overlap exactly if some name is covered by both: a witness is one of the two with * replaced."""
    for left in (".".join(one), "*." + ".".join(one)):
        for right in (".".join(two), "*." + ".".join(two)):
            a, b = HostPattern(left), HostPattern(right)
            witness = any(
                a.covers(name) and b.covers(name) for name in (left.replace("*", "w"), right.replace("*", "w"))
            )
            assert a.overlaps(b) == witness == b.overlaps(a)


def test_authority_is_made_once(tmp_path: Path) -> None:
    first = load_authority(tmp_path / "egress")
    assert load_authority(tmp_path / "egress") == first
    assert stat.S_IMODE((tmp_path / "egress" / "ca.key").stat().st_mode) == 0o600
    assert b"PRIVATE" not in repr(first).encode()
    certificate = x509.load_pem_x509_certificate(first.certificate)
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    (tmp_path / "egress" / "ca.key").unlink()
    assert load_authority(tmp_path / "egress").fingerprint != first.fingerprint
    assert isinstance(first, Authority)


def test_sealing(tmp_path: Path) -> None:
    """Opens for the same instance with the same key, and for nothing else."""
    sealer = load_sealer(tmp_path)
    sealed = sealer.seal("inst-a", {"REAL_KEY": "sk-1"})
    assert b"sk-1" not in sealed
    assert stat.S_IMODE((tmp_path / "seal.key").stat().st_mode) == 0o600
    assert load_sealer(tmp_path).open("inst-a", sealed) == {"REAL_KEY": "sk-1"}
    for instance, data in (("inst-b", sealed), ("inst-a", sealed[:-1] + bytes([sealed[-1] ^ 1])), ("inst-a", b"")):
        with pytest.raises(InternalError):
            sealer.open(instance, data)


def test_variables_for_programs_in_the_guest() -> None:
    """Those that replace roots get the whole bundle; a program's own settings are for the caller to keep."""
    found = trust_environment("/b.pem", "/ca.pem") | proxy_environment("10.0.0.1", 18080, direct=("x.test",))
    assert found["SSL_CERT_FILE"] == found["GIT_SSL_CAINFO"] == "/b.pem"
    assert found["NODE_EXTRA_CA_CERTS"] == "/ca.pem"
    assert found["https_proxy"] == found["HTTPS_PROXY"] == "http://10.0.0.1:18080"
    assert found["no_proxy"] == "localhost,127.0.0.1,::1,10.0.0.1,x.test"
