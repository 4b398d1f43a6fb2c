"""The C against its readable twin, and against llhttp, on heads that are nearly right."""

from __future__ import annotations

import httptools
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hypeman._native.egress import rewrite_head
from hypeman._native.egress_head_py import Origin, Refused, Rule
from hypeman._native.egress_head_py import rewrite_head as rewrite_head_py
from hypeman.egress.policy import compile_policy
from tests.egress.conftest import credential

CREDENTIALS = {
    "KEY": credential("api.example.com", "*.b.c"),
    "OTHER": credential("api.example.com", header="X-Key", template="${value}", env="OTHER_KEY"),
}
SECRETS = {"REAL_KEY": "sk-1", "OTHER_KEY": "sk-2"}
COMPILED = compile_policy(CREDENTIALS, SECRETS)
RULES = (
    Rule("mock-KEY", "authorization", "Bearer sk-1", ("api.example.com", "*.b.c")),
    Rule("mock-OTHER", "x-key", "sk-2", ("api.example.com",)),
)

hosts = st.sampled_from(
    ["api.example.com", "API.example.com.", "a.b.c", "b.c", "x.a.b.c", "evil.test", "127.0.0.1", "127.1", "[::1]",
     "[0:0::1]", "a_b.c", "-a.b", "", "a..b", "a%23.b", "1.0x7f", "999.1.1.1", "a" * 64]
)  # fmt: skip
authorities = st.builds(lambda host, port: host + port, hosts,
                        st.sampled_from(["", "", "", ":443", ":80", ":8443", ":0", ":", ":99999", ":x"]))  # fmt: skip
names = st.sampled_from(
    ["Host", "Content-Length", "Transfer-Encoding", "Connection", "TE", "Upgrade", "Expect", "Authorization", "Cookie",
     "X-Key", "x_key", "Max-Forwards", "X-Other", "Keep-Alive", "Proxy-Authorization", "HTTP2-Settings", "x y",
     "", "X:"]
)  # fmt: skip
values = st.sampled_from(
    ["", "a", " a\t", "5", "0", "+5", "chunked", "Chunked", "gzip", "close", "keep-alive, X-Other", "upgrade",
     "Upgrade, x-key", "Authorization", "trailers", "gzip, trailers", "websocket", "h2c", "websocket, h2c",
     "100-continue", "100-Continue", "other", "Bearer mock-KEY", "mock-OTHER!", "a\0b", "a\rb", "é", "\x7f", "a b, c"]
)  # fmt: skip
lines = st.one_of(
    st.builds("{}: {}\r\n".format, names, values),
    st.builds("{}:{}\r\n".format, names, values),
    st.sampled_from([" folded\r\n", "X: y\n", "X\r\n", "X : y\r\n"]),
)
common = st.builds("Host: {}\r\n".format, authorities)
targets = st.one_of(
    st.sampled_from(["/", "/a?b", "*", "x", "/a#b", "/é", "?q", "//x", ""]),
    st.builds("{}{}{}".format, st.sampled_from(["http://", "https://", "HTTPS://", "ftp://"]), authorities,
              st.sampled_from(["", "/", "/p", "?q"])),
)  # fmt: skip
heads = st.builds(
    "{} {} {}\r\n{}{}\r\n".format,
    st.sampled_from(["GET", "POST", "OPTIONS", "TRACE", "CONNECT", "get", "M-SEARCH", "G T", ""]),
    targets,
    st.sampled_from(["HTTP/1.1"] * 6 + ["HTTP/1.0"] * 2 + ["HTTP/1.2", "HTTP/2", "http/1.1"]),
    st.one_of(common, common, st.just("")),
    st.lists(lines, max_size=5).map("".join),
)
origins = st.builds(
    Origin,
    st.sampled_from(["api.example.com", "a.b.c", "evil.test", None]),
    st.booleans(),
    st.sampled_from([443, 80, 8443]),
)


@settings(max_examples=1500, deadline=None)
@given(heads, origins)
@example(
    "GET / HTTP/1.1\r\nHost: api.example.com\r\nConnection: authorization\r\n\r\n",
    Origin("api.example.com", False, 443),
)
def test_same_as_the_twin(text: str, origin: Origin) -> None:
    """The same bytes for the host, or the same reason."""
    data = text.encode("latin-1")
    name = origin.tls_name.encode() if origin.tls_name else None
    found = rewrite_head(data, COMPILED, name, origin.explicit_proxy, origin.port)
    try:
        wanted: bytes | str = rewrite_head_py(data, RULES, origin)
    except Refused as refused:
        wanted = str(refused)
    if found is None:  # an input that never becomes a head: the twin sees only that it is none
        assert wanted == "bad_request"
    else:
        assert found == wanted


class Seen:
    """What llhttp reads."""

    def __init__(self) -> None:
        self.url = b""
        self.fields: list[tuple[bytes, bytes]] = []
        self.complete = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name, value))

    def on_headers_complete(self) -> None:
        self.complete = True


@settings(max_examples=600, deadline=None)
@given(heads)
def test_llhttp_reads_what_we_write(text: str) -> None:
    """Whatever we let through, an independent strict parser reads as one head with one credential and one Host."""
    found = rewrite_head(text.encode("latin-1"), COMPILED, b"api.example.com", False, 443)
    if not isinstance(found, bytes):
        return
    seen = Seen()
    parser = httptools.HttpRequestParser(seen)
    try:
        parser.feed_data(found)
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserInvalidMethodError:
        return  # llhttp knows a list of methods only
    assert seen.complete
    lowered = [name.lower() for name, _ in seen.fields]
    assert lowered.count(b"host") == 1
    assert [value for name, value in seen.fields if name.lower() == b"authorization"] == [b"Bearer sk-1"]
    assert [value for name, value in seen.fields if name.lower() == b"x-key"] == [b"sk-2"]
    assert not (b"content-length" in lowered and b"transfer-encoding" in lowered)
