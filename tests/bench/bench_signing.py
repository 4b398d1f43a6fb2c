"""What each form of a credential costs per request: a head of 1 KB with a body of 1 KB.

Measured in CPU time of one call of the engine's functions on a head (probe.c), which reads the policy each time; so the
same head with a rule for a header is the peer, and the difference is the cost of the form. Logins: bench_logins.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from hypeman._native.egress import rewrite_head
from hypeman.egress.policy import compile_policy
from hypeman.egress.types import CredentialPolicy, CredentialSource, HmacForm, InjectAs, InjectRule, SigV4Form
from tests.bench.harness import Result, compare

_HOST = "dynamodb.eu-west-1.amazonaws.com"
_CALLS = 2000
_NOW = 1_800_000_000
_KEYS = "AKID:secret:" + "t" * 300
_FORMS = {
    "sigv4": (InjectAs(sigv4=SigV4Form(region="eu-west-1", service="dynamodb")), _KEYS),
    "hmac": (InjectAs(hmac=HmacForm(scheme="github")), "secret-of-some-length"),
    "query": (InjectAs(query="key"), "secret-of-some-length"),
}


def _rules(shape: InjectAs, value: str) -> bytearray:
    rule = InjectRule(hosts=(_HOST,), as_=shape)
    return compile_policy({"AWS": CredentialPolicy(source=CredentialSource(env="K"), inject=(rule,))}, {"K": value})


def run() -> list[Result]:
    fields = "".join(f"X-Amz-Meta-{number}: {'v' * 40}\r\n" for number in range(10))
    head = (
        f"POST /?a=1&b=2 HTTP/1.1\r\nHost: {_HOST}\r\nContent-Type: application/x-amz-json-1.0\r\n{fields}"
        "Content-Length: 1024\r\nAuthorization: AWS4-HMAC-SHA256 Credential=mock-AWS/20270115/eu-west-1/dynamodb/"
        f"aws4_request, SignedHeaders=content-type;host;x-amz-date, Signature={'0' * 64}\r\n\r\n"
    ).encode()
    unsigned = head.replace(b"Authorization: AWS4-HMAC-SHA256", b"X-Other: AWS4-HMAC-SHA256").replace(b"mock-AWS", b"x")
    body = bytearray(1024)

    def measured(rules: bytearray, sent: bytes) -> Callable[[], float]:
        def measure() -> float:
            start = time.process_time_ns()
            for _ in range(_CALLS):
                found = rewrite_head(sent, rules, _HOST.encode(), False, 443, _NOW, body)
            assert isinstance(found, bytes), found
            return (time.process_time_ns() - start) / _CALLS / 1000

        return measure

    plain = _rules(InjectAs(header="Authorization", format="Bearer ${value}"), "secret")
    results = []
    for name, (shape, value) in _FORMS.items():
        sent = head if name == "sigv4" else unsigned
        both = compare(
            f"egress, head with {name}", "µs", measured(_rules(shape, value), sent), "header", measured(plain, sent)
        )
        assert both.peer_value is not None
        results += [both, Result(f"egress, {name} of 1 KB", both.value - both.peer_value, "µs")]
    return results
