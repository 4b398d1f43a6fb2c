"""What a request for an ingress may say, and which code each refusal has."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from hypeman.errors import HypemanError, NotFound
from hypeman.ingress.types import CreateIngressRequest, IngressRecord
from hypeman.ingress.validate import check_request
from tests.fakes.services.resources import refuse_tls

NOW = datetime(2026, 1, 2, tzinfo=UTC)
SECRET = "0123456789abcdef0123456789abcdef"


def find(ref: str) -> str:
    if ref not in ("web", "abc123"):
        raise NotFound(f"no instance {ref!r}")
    return "web"


def rule(hostname: str = "a.example.com", instance: str = "web", **more: Any) -> dict[str, Any]:
    return {"match": {"hostname": hostname}, "target": {"instance": instance, "port": 8080}, **more}


def check(*rules: dict[str, Any], name: str = "site", **more: Any) -> IngressRecord:
    request = msgspec.convert({"name": name, "rules": rules, **more}, CreateIngressRequest)
    return check_request(request, find, refuse_tls, NOW)


def test_what_is_stored() -> None:
    auth = {"header": "X-Key", "value": SECRET}
    record = check(
        rule("A.Example.com", "abc123", request_header_auth=auth), rule("{name}.example.com", "{name}"), tags={"a": "b"}
    )
    first, second = record.rules
    assert (first.match.hostname, first.match.port, first.target.instance) == ("a.example.com", 80, "web")
    assert msgspec.to_builtins(first.request_header_auth) == auth
    assert second.target.instance == "{name}"
    assert (record.tags, record.ports) == ({"a": "b"}, frozenset([80]))


def test_what_is_shown_always_has_its_defaults() -> None:
    shown = msgspec.to_builtins(check(rule(request_header_auth=None)).rules[0])
    defaults = {"tls": False, "tls_passthrough": False, "redirect_http": False}
    assert shown == rule() | {"match": {"hostname": "a.example.com", "port": 80}} | defaults


@pytest.mark.parametrize(
    ("rules", "code"),
    [
        ([], "bad_request"),
        ([rule("*.example.com")], "bad_request"),
        ([rule(instance="nobody")], "instance_not_found"),
        ([rule(instance="")], "bad_request"),
        ([rule(instance="{name}")], "bad_request"),
        ([rule("{name}.example.com", "web")], "bad_request"),
        ([rule("{name}.example.com", "{other}")], "bad_request"),
        ([rule("{name}.example.com", "{name")], "bad_request"),
        ([rule(redirect_http=True)], "bad_request"),
        ([rule(tls=True)], "config_validation_failed"),
        ([rule(tls=True, tls_passthrough=True)], "bad_request"),
        ([rule(tls_passthrough=True, request_header_auth={"header": "X-Key", "value": SECRET})], "bad_request"),
        ([rule(tls_passthrough=True), rule()], "hostname_in_use"),
        ([rule(), rule("A.example.com")], "hostname_in_use"),
        ([rule("{a}.b", "{a}"), rule("{c}.b", "{c}")], "hostname_in_use"),
        ([rule(f"a{n}.b") for n in range(101)], "bad_request"),
        *(
            ([rule(request_header_auth={"header": header, "value": value})], "bad_request")
            for header, value in [
                ("Authorization", SECRET), ("cookie", SECRET), ("Host", SECRET), ("Content-Length", SECRET),
                ("Transfer-Encoding", SECRET), ("Connection", SECRET), ("X-Forwarded-For", SECRET),
                ("Proxy-Authorization", SECRET), ("X Key", SECRET), ("", SECRET), ("X-Key", SECRET[:-1]),
                ("X-Key", SECRET * 9), ("X-Key", SECRET + " x"), ("X-Key", SECRET + "ü"),
            ]
        ),
    ],
)  # fmt: skip
def test_refusals(rules: list[dict[str, Any]], code: str) -> None:
    with pytest.raises(HypemanError) as caught:
        check(*rules)
    assert caught.value.code == code
    assert caught.value.status == (409 if code == "hostname_in_use" else 400)
    assert SECRET not in caught.value.message


def test_tls_that_is_passed_through_needs_no_certificate() -> None:
    record = check(rule(tls_passthrough=True, redirect_http=True) | {"match": {"hostname": "a.b", "port": 443}})
    assert (sorted(record.ports), sorted(record.tls_hosts)) == ([80, 443], [])


def test_a_wrong_name_is_a_bad_request() -> None:
    with pytest.raises(HypemanError) as caught:
        check(rule(), name="Site!")
    assert caught.value.code == "bad_request"
