"""Host names, patterns and the routing table; the table against a plain search through all routes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman.ingress.hostnames import capture_of, fill_in, parse_host, parse_hostname, references, shape
from hypeman.ingress.routing import Route, RoutingTable


def route(hostname: str, instance: str = "web", port: int = 80) -> Route:
    return Route(ingress="i", hostname=hostname, port=port, instance=instance, target_port=8080)


@pytest.mark.parametrize(
    ("hostname", "labels"),
    [
        ("Web.Example.COM", ("web", "example", "com")),
        ("{instance}.example.com", ("{instance}", "example", "com")),
        ("{App}.{env}.x", ("{App}", "{env}", "x")),
        ("localhost", ("localhost",)),
        ("_dmarc.a-b.c", ("_dmarc", "a-b", "c")),
    ],
)
def test_host_names(hostname: str, labels: tuple[str, ...]) -> None:
    assert parse_hostname(hostname) == labels


@pytest.mark.parametrize(
    ("hostname", "reason"),
    [
        ("*.example.com", "wildcard"),
        ("*", "wildcard"),
        ("app-{name}.example.com", "whole label"),
        ("{a}.{a}.com", "twice"),
        ("{a}", "two labels"),
        ("{1a}.com", "whole label"),
        ("{}.com", "whole label"),
        ("", "1 to 253"),
        ("a..b", "none"),
        ("a.b.", "none"),
        ("-a.b", "none"),
        ("a b.c", "none"),
        ("a.b:80", "none"),
        ("x" * 64 + ".b", "none"),
        (".".join(["abc"] * 70), "1 to 253"),
        ("ü.example.com", "none"),
    ],
)
def test_host_names_that_are_none(hostname: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_hostname(hostname)


@pytest.mark.parametrize(
    ("header", "host"),
    [
        ("Web.Example.com:8080", "web.example.com"),
        ("web.example.com.", "web.example.com"),
        ("web", "web"),
        ("web:", "web"),
        ("192.0.2.1:80", "192.0.2.1"),
        ("[::1]:80", None),
        ("a b", None),
        ("", None),
        (":80", None),
        ("a..b", None),
        ("a:b:c", None),
        ("a:80x", None),
        ("a.{b}", None),
    ],
)
def test_host_headers(header: str, host: str | None) -> None:
    assert parse_host(header) == host


def test_captures_are_filled_in() -> None:
    table = RoutingTable([route("{app}.{env}.example.com", "{app}-{env}")])
    found = table.find("shop.test.example.com", 80)
    assert found is not None
    assert found.instance == "shop-test"
    assert table.find("test.example.com", 80) is None
    assert table.find("a.shop.test.example.com", 80) is None


def test_what_is_written_out_wins() -> None:
    exact, near, far = route("a.example.com"), route("{x}.example.com", "{x}"), route("a.{y}.com", "{y}")
    for order in ([exact, near, far], [far, near, exact], [near, exact, far]):
        table = RoutingTable(order)
        for host, wanted in [("a.example.com", exact), ("b.example.com", near), ("a.other.com", far)]:
            found = table.find(host, 80)
            assert found is not None
            assert found.route == wanted
        assert table.find("b.other.com", 80) is None


def test_ports_are_apart() -> None:
    table = RoutingTable([route("a.b", "one", 80), route("a.b", "two", 81)])
    found = table.find("a.b", 81)
    assert found is not None
    assert found.instance == "two"
    assert table.find("a.b", 82) is None


def test_references() -> None:
    assert references("{a}-{b}") == {"a", "b"}
    assert fill_in("{a}-x", {"a": "{b}"}) == "{b}-x"
    for wrong in ("{a", "a}", "{{a}", "{a}}"):
        with pytest.raises(ValueError, match="brace"):
            references(wrong)


def test_the_secret_is_not_in_the_repr() -> None:
    secret = Route(
        ingress="i", hostname="a", port=80, instance="w", target_port=1, auth_header="X-A", auth_value="s3cret"
    )
    assert "s3cret" not in repr(secret)


_WORDS = st.sampled_from(["a", "b", "c", "{x}", "{y}"])
_PATTERNS = (
    st.lists(_WORDS, min_size=2, max_size=4)
    .map(tuple)
    .filter(lambda labels: all(labels.count(label) == 1 for label in labels if label.startswith("{")))
)
_HOSTS = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=4)


def _matches(pattern: tuple[str, ...], host: list[str]) -> bool:
    return len(pattern) == len(host) and all(
        capture_of(part) is not None or part == label for part, label in zip(pattern, host, strict=True)
    )


@given(st.lists(_PATTERNS, max_size=12), st.data(), _HOSTS)
def test_the_table_finds_what_a_search_finds(
    patterns: list[tuple[str, ...]], data: st.DataObject, host: list[str]
) -> None:
    """The most specific one by labels from the right, whatever was added or removed, in any order."""
    by_shape = {shape(".".join(pattern)): pattern for pattern in patterns}
    routes = {key: route(".".join(pattern)) for key, pattern in by_shape.items()}
    table = RoutingTable(data.draw(st.permutations(list(routes.values()))))
    removed = data.draw(st.sets(st.sampled_from(sorted(routes)))) if routes else set()
    for key in removed:
        table.remove(routes[key])
    fitting = [by_shape[key] for key in routes if key not in removed and _matches(by_shape[key], host)]
    best = min(fitting, key=lambda labels: [label.startswith("{") for label in reversed(labels)], default=None)
    found = table.find(".".join(host), 80)
    assert (found.route.hostname if found else None) == (".".join(best) if best else None)


@given(st.lists(_PATTERNS, max_size=12))
def test_nothing_is_left_when_all_are_removed(patterns: list[tuple[str, ...]]) -> None:
    by_shape = {shape(".".join(pattern)): pattern for pattern in patterns}
    routes = [route(".".join(pattern)) for pattern in by_shape.values()]
    table = RoutingTable(routes)
    for each in routes:
        table.remove(each)
        table.remove(each)
    root = table._root
    assert not (root.below or root.capture or root.routes) or len({shape(r.hostname) for r in routes}) < len(
        set(routes)
    )
