"""What a signature for AWS costs per request: a head of 1 KB with a body of 1 KB whose hash is signed.

Measured in CPU time of one call of the engine's functions on a head (probe.c), which reads the policy each time; so the
same head with a rule for a header instead is the peer, and the difference is the cost of the signature.
"""

from __future__ import annotations

import time

from hypeman._native.egress import rewrite_head
from hypeman.egress.policy import compile_policy
from hypeman.egress.types import CredentialPolicy, CredentialSource, InjectAs, InjectRule, SigV4Form
from tests.bench.harness import Result, compare

_HOST = "dynamodb.eu-west-1.amazonaws.com"
_CALLS = 2000
_NOW = 1_800_000_000


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
    signing = _rules(InjectAs(sigv4=SigV4Form(region="eu-west-1", service="dynamodb")), "AKID:secret:" + "t" * 300)
    plain = _rules(InjectAs(header="Authorization", format="Bearer ${value}"), "secret")
    body = bytearray(1024)

    def measure(rules: bytearray) -> float:
        start = time.process_time_ns()
        for _ in range(_CALLS):
            found = rewrite_head(head, rules, _HOST.encode(), False, 443, _NOW, body)
        assert isinstance(found, bytes)
        return (time.process_time_ns() - start) / _CALLS / 1000

    both = compare("egress, head with sigv4", "µs", lambda: measure(signing), "header", lambda: measure(plain))
    assert both.peer_value is not None
    return [both, Result("egress, sigv4 of 1 KB", both.value - both.peer_value, "µs")]
