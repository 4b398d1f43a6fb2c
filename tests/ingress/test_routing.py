"""Host names, patterns and the data plane's routing table; the table against a plain search through all routes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman._native.egress import Sites
from hypeman.ingress.hostnames import capture_of, parse_hostname, references, shape
from hypeman.ingress.routing import Route, compile_routes


def route(hostname: str, instance: str = "web", port: int = 80) -> Route:
    return Route(hostname=hostname, port=port, instance=instance, target_port=8080)


def table_of(*routes: Route) -> Sites:
    """Each route is an ingress of its own, whose id is its host name."""
    table = Sites()
    for each in routes:
        table.put(each.hostname.encode(), compile_routes([each]))
    return table


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
        ("a..b", "invalid label"),
        ("a.b.", "invalid label"),
        ("-a.b", "invalid label"),
        ("a b.c", "invalid label"),
        ("a.b:80", "invalid label"),
        ("x" * 64 + ".b", "invalid label"),
        (".".join(["abc"] * 70), "1 to 253"),
        ("ü.example.com", "invalid label"),
    ],
)
def test_host_names_that_are_none(hostname: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_hostname(hostname)


def test_captures_are_filled_in() -> None:
    table = table_of(route("{app}.{env}.example.com", "{app}-{env}"))
    assert table.find(b"shop.test.example.com", 80) == ("{app}.{env}.example.com", "shop-test")
    assert table.find(b"test.example.com", 80) is None
    assert table.find(b"a.shop.test.example.com", 80) is None


def test_a_name_that_no_instance_can_have() -> None:
    table = table_of(route("{a}.{b}.x", "{a}-{b}"))
    assert table.find(b"%b.%b.x" % (b"a" * 31, b"b" * 31), 80) == ("{a}.{b}.x", "a" * 31 + "-" + "b" * 31)
    assert table.find(b"%b.%b.x" % (b"a" * 32, b"b" * 31), 80) is None


def test_what_is_written_out_wins() -> None:
    exact, near, far = route("a.example.com"), route("{x}.example.com", "{x}"), route("a.{y}.com", "{y}")
    for order in ([exact, near, far], [far, near, exact], [near, exact, far]):
        table = table_of(*order)
        for host, wanted in [("a.example.com", exact), ("b.example.com", near), ("a.other.com", far)]:
            found = table.find(host.encode(), 80)
            assert found is not None
            assert found[0] == wanted.hostname
        assert table.find(b"b.other.com", 80) is None


def test_ports_are_apart() -> None:
    table = Sites()
    table.put(b"i", compile_routes([route("a.b", "one", 80), route("a.b", "two", 81)]))
    assert table.find(b"a.b", 81) == ("a.b", "two")
    assert table.find(b"a.b", 82) is None


def test_routes_are_replaced_and_dropped() -> None:
    table = table_of(route("a.b"))
    table.put(b"a.b", compile_routes([route("c.d")]))
    assert (table.find(b"a.b", 80), table.find(b"c.d", 80)) == (None, ("c.d", "web"))
    assert (table.drop(b"a.b"), table.drop(b"a.b"), table.find(b"c.d", 80)) == (True, False, None)


def test_only_whole_routes_are_taken() -> None:
    table, data = Sites(), compile_routes([route("{a}.b", "{a}"), route("c.d")])
    for size in range(len(data)):
        with pytest.raises(ValueError):
            table.put(b"i", data[:size] or b"x")
    with pytest.raises(ValueError):
        table.put(b"i", data + b"x")
    assert table.find(b"c.d", 80) is None


def test_a_thousand_ingresses() -> None:
    table = table_of(*(route(f"h{n}.example.com", f"i{n}") for n in range(1000)))
    assert table.find(b"h999.example.com", 80) == ("h999.example.com", "i999")
    for n in range(1000):
        assert table.drop(f"h{n}.example.com".encode())
    assert table.find(b"h999.example.com", 80) is None


def test_references() -> None:
    assert references("{a}-{b}") == {"a", "b"}
    for wrong in ("{a", "a}", "{{a}", "{a}}"):
        with pytest.raises(ValueError, match="brace"):
            references(wrong)


def test_the_secret_is_not_in_the_repr() -> None:
    secret = Route(hostname="a", port=80, instance="w", target_port=1, auth_header="X-A", auth_value="s3cret")
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
    table = table_of(*data.draw(st.permutations(list(routes.values()))))
    removed = data.draw(st.sets(st.sampled_from(sorted(routes)))) if routes else set()
    for key in removed:
        assert table.drop(routes[key].hostname.encode())
    fitting = [by_shape[key] for key in routes if key not in removed and _matches(by_shape[key], host)]
    best = min(fitting, key=lambda labels: [label.startswith("{") for label in reversed(labels)], default=None)
    found = table.find(".".join(host).encode(), 80)
    assert (found[0] if found else None) == (".".join(best) if best else None)
