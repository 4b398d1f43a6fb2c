"""Heads on their way through, without a network."""

from __future__ import annotations

import pytest

from hypeman.ingress.heads import BadRequest, Headers, is_authorized, read_head, request_headers, response_headers

HOST = (b"host", b"Web.Example.com:80")


def head(
    *headers: tuple[bytes, bytes], method: bytes = b"GET", target: bytes = b"/a?b", version: bytes = b"1.1"
) -> Headers:
    read = read_head(method, target, version, [HOST, *headers])
    return request_headers(read, client="192.0.2.7", scheme="http", secret="X-Secret")


def test_forwarding_is_said_once_and_by_us() -> None:
    lies = [
        (b"x-forwarded-for", b"10.0.0.1"), (b"x-forwarded-host", b"bank"), (b"x-forwarded-anything", b"1"),
        (b"forwarded", b"for=10.0.0.1"), (b"x_forwarded_for", b"10.0.0.1"), (b"x-real-ip", b"10.0.0.1"),
        (b"x-real_ip", b"10.0.0.1"),
    ]  # fmt: skip
    assert head(*lies, (b"accept", b"*/*")) == [
        HOST,
        (b"accept", b"*/*"),
        (b"x-forwarded-for", b"192.0.2.7"),
        (b"x-forwarded-proto", b"http"),
        (b"x-forwarded-host", b"Web.Example.com:80"),
        (b"forwarded", b'for=192.0.2.7;host="Web.Example.com:80";proto=http'),
    ]


def test_ipv6_clients_are_quoted() -> None:
    read = read_head(b"GET", b"/", b"1.1", [HOST])
    assert (b"forwarded", b'for="[2001:db8::1]";host="Web.Example.com:80";proto=https') in request_headers(
        read, client="2001:db8::1", scheme="https"
    )


def test_what_is_for_this_connection_ends_here() -> None:
    kept = dict(
        head(
            (b"connection", b"close, X-Mine, host"),
            (b"x-mine", b"1"),
            (b"keep-alive", b"5"),
            (b"te", b"trailers"),
            (b"proxy-authorization", b"x"),
            (b"upgrade", b"websocket"),
            (b"x-secret", b"s"),
            (b"x_secret", b"s"),
        )
    )
    assert kept.keys() == {b"host", b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"forwarded"}


def test_upgrades_are_passed_on() -> None:
    upgrade = ((b"connection", b"keep-alive, Upgrade"), (b"upgrade", b"websocket"))
    assert head(*upgrade)[-2:] == [(b"connection", b"upgrade"), (b"upgrade", b"websocket")]
    assert (b"upgrade", b"websocket") not in head(*upgrade, version=b"1.0")


def test_no_change_to_http2_behind_our_back() -> None:
    """Later requests on it would not be routed, nor asked for the header."""
    kept = head((b"connection", b"Upgrade, HTTP2-Settings"), (b"upgrade", b"h2c"), (b"http2-settings", b"AAMAAABk"))
    assert not {b"upgrade", b"connection", b"http2-settings"} & {name for name, _ in kept}


@pytest.mark.parametrize(
    ("method", "target", "headers", "status"),
    [
        (b"CONNECT", b"a:443", [HOST], 405),
        (b"TRACE", b"/", [HOST], 405),
        (b"GET", b"/", [], 400),
        (b"GET", b"/", [HOST, HOST], 400),
        (b"GET", b"/", [(b"host", b"a b")], 404),
        (b"GET", b"/", [(b"host", b"[::1]")], 404),
        (b"GET", b"http://other.com/", [HOST], 400),
        (b"GET", b"ftp://Web.Example.com:80/", [HOST], 400),
        (b"GET", b"nonsense", [HOST], 400),
        (b"GET", b"*", [HOST], 400),
        (b"POST", b"/", [HOST, (b"content-length", b"3"), (b"transfer-encoding", b"chunked")], 400),
    ],
)
def test_refusals(method: bytes, target: bytes, headers: Headers, status: int) -> None:
    with pytest.raises(BadRequest) as caught:
        read_head(method, target, b"1.1", headers)
    assert caught.value.status == status


def test_the_absolute_form_becomes_the_origin_form() -> None:
    assert read_head(b"GET", b"http://web.example.com:80/x?y", b"1.1", [HOST]).target == b"/x?y"
    assert read_head(b"GET", b"http://web.example.com:80", b"1.1", [HOST]).target == b"/"


def test_authorization_wants_one_exact_header() -> None:
    assert is_authorized([(b"x-key", b"right")], "X-Key", "right")
    for wrong in ([], [(b"x-key", b"wrong")], [(b"x-key", b"right"), (b"x-key", b"right")], [(b"x-key", b"")]):
        assert not is_authorized(wrong, "X-Key", "right")


def test_responses() -> None:
    given = [(b"connection", b"close, X-Hop"), (b"x-hop", b"1"), (b"transfer-encoding", b"chunked"), (b"a", b"b")]
    assert response_headers(given) == [(b"a", b"b")]
    switching = [(b"connection", b"Upgrade"), (b"upgrade", b"websocket"), (b"sec-websocket-accept", b"x")]
    assert response_headers(switching, switching=True) == [
        (b"sec-websocket-accept", b"x"), (b"connection", b"upgrade"), (b"upgrade", b"websocket"),
    ]  # fmt: skip
