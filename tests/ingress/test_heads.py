"""Heads on their way through, without a network."""

from __future__ import annotations

import pytest

from hypeman._native.egress import forward_head

HOST = "Host: Web.Example.com:80"


def forward(*lines: str, first: str = "GET /a?b HTTP/1.1", client: str = "192.0.2.7", tls: bool = False) -> list[str]:
    """The lines that the guest gets after the first one, which must be passed on as it is."""
    data = "".join(f"{line}\r\n" for line in (first, HOST, *lines, "")).encode()
    found = forward_head(data, client.encode(), tls, b"X-Secret")
    assert isinstance(found, tuple), found
    host, head = found
    assert host == "web.example.com"
    assert head.endswith(b"\r\n\r\n")
    passed, *rest = head[:-4].decode().split("\r\n")
    assert passed.split(" ")[:2] == first.split(" ")[:2]
    assert passed.endswith(" HTTP/1.1")
    return rest


def names(lines: list[str]) -> set[str]:
    return {line.partition(":")[0].lower() for line in lines}


OURS = [
    "X-Forwarded-For: 192.0.2.7",
    "X-Forwarded-Proto: http",
    "X-Forwarded-Host: Web.Example.com:80",
    'Forwarded: for=192.0.2.7;host="Web.Example.com:80";proto=http',
]


def test_forwarding_is_said_once_and_by_us() -> None:
    lies = ["x-forwarded-for: 10.0.0.1", "X-Forwarded-Host: bank", "x-forwarded-anything: 1", "forwarded: for=10.0.0.1",
            "Forwarded:", "x_forwarded_for: 10.0.0.1", "x-real-ip: 10.0.0.1", "X-Real_IP: 10.0.0.1"]  # fmt: skip
    assert forward(*lies, "accept: */*") == [HOST, "accept: */*", *OURS]


def test_ipv6_clients_are_quoted() -> None:
    assert 'Forwarded: for="[2001:db8::1]";host="Web.Example.com:80";proto=https' in forward(
        client="2001:db8::1", tls=True
    )


def test_what_is_for_this_connection_ends_here() -> None:
    kept = forward(
        "Connection: close, X-Mine, host", "x-mine: 1", "Keep-Alive: 5", "TE: gzip", "Proxy-Authorization: x",
        "Upgrade: websocket", "X-Secret: s", "x_secret: s",
    )  # fmt: skip
    assert kept == [HOST, *OURS]


def test_upgrades_are_passed_on() -> None:
    upgrade = ("Connection: keep-alive, Upgrade", "Upgrade: websocket")
    assert forward(*upgrade)[-2:] == ["Upgrade: websocket", "Connection: upgrade"]
    assert "upgrade" not in names(forward(*upgrade, first="GET / HTTP/1.0"))


def test_no_change_to_http2_behind_our_back() -> None:
    """Later requests on it would not be routed, nor asked for the header."""
    kept = forward("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
    assert not {"upgrade", "connection", "http2-settings"} & names(kept)


def test_a_body_without_meaning_is_the_last_of_its_connection() -> None:
    """A guest may leave it unread and take it for the next request."""
    assert "Connection: close" in forward("Content-Length: 3", first="GET /a HTTP/1.1")
    assert "Connection: close" not in forward("Content-Length: 3", first="POST /a HTTP/1.1")


@pytest.mark.parametrize(
    ("first", "headers", "reason"),
    [
        ("CONNECT a:443", [HOST], "method_not_allowed"),
        ("TRACE /", [HOST], "method_not_allowed"),
        ("GET /", [], "bad_request"),
        ("GET /", [HOST, HOST], "bad_request"),
        ("GET /", ["Host: a b"], "no_site"),
        ("GET /", ["Host:"], "no_site"),
        ("GET /", ["Host: :80"], "no_site"),
        ("GET /", ["Host: a..b"], "no_site"),
        ("GET /", ["Host: a:b:c"], "no_site"),
        ("GET /", ["Host: a:80x"], "no_site"),
        ("GET /", ["Host: a.{b}"], "no_site"),
        ("GET /", ['Host: a";proto=https'], "no_site"),
        ("GET http://other.com/", [HOST], "bad_request"),
        ("GET ftp://Web.Example.com:80/", [HOST], "bad_request"),
        ("GET nonsense", [HOST], "bad_request"),
        ("GET *", [HOST], "bad_request"),
        ("POST /", [HOST, "Content-Length: 3", "Transfer-Encoding: chunked"], "bad_request"),
    ],
)
def test_refusals(first: str, headers: list[str], reason: str) -> None:
    data = "".join(f"{line}\r\n" for line in (f"{first} HTTP/1.1", *headers, "")).encode()
    assert forward_head(data, b"192.0.2.7", False, b"") == reason


@pytest.mark.parametrize(
    ("header", "host"),
    [
        ("Web.Example.com:8080", "web.example.com"),
        ("web.example.com.", "web.example.com"),
        ("web", "web"),
        ("web:", "web"),
        ("192.0.2.1:80", "192.0.2.1"),
    ],
)
def test_host_headers(header: str, host: str) -> None:
    found = forward_head(f"GET / HTTP/1.1\r\nHost: {header}\r\n\r\n".encode(), b"192.0.2.7", False, b"")
    assert isinstance(found, tuple)
    assert found[0] == host


def test_the_absolute_form_becomes_the_origin_form() -> None:
    for target, passed in (("http://web.example.com:80/x?y", "/x?y"), ("http://web.example.com:80", "/"),
                           ("https://web.example.com:80?y", "/?y")):  # fmt: skip
        data = f"GET {target} HTTP/1.1\r\n{HOST}\r\n\r\n".encode()
        found = forward_head(data, b"192.0.2.7", False, b"")
        assert isinstance(found, tuple)
        assert found[1].startswith(f"GET {passed} HTTP/1.1\r\n".encode())
