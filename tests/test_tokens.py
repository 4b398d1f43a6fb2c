"""Tokens and scopes: who gets in, and the reason that others get."""

from __future__ import annotations

import time
from typing import Any

import jwt
import pytest

from hypeman.errors import Forbidden, InvalidRequest, Unauthorized
from hypeman.tokens import Access, Caller, Scope, Verifier, check_scope, may_access, mint, parse_grants, verify

SECRET = "a secret that is long enough for HS256"


def signed(algorithm: str = "HS256", secret: str = SECRET, **claims: Any) -> str:
    return "Bearer " + jwt.encode({"sub": "someone", **claims}, secret, algorithm=algorithm)


def test_a_minted_token_opens() -> None:
    caller = verify(f"Bearer {mint(SECRET, subject='ann')}", SECRET)
    assert (caller.subject, caller.permissions) == ("ann", None)
    narrow = verify(f"bearer {mint(SECRET, subject='ann', scopes=['device:read'])}", SECRET)
    assert narrow.permissions == frozenset(["device:read"])


def test_a_token_for_repositories_does_not_open_the_api() -> None:
    """Also one that names permissions."""
    grants = parse_grants("team/app") | parse_grants("quay.io:5000/a:delete,unknown")
    narrow = verify(f"Bearer {mint(SECRET, subject='ci', scopes=['image:read'], grants=grants)}", SECRET)
    may = {
        (name, access)
        for name in ("team/app", "quay.io:5000/a")
        for access in Access
        if may_access(narrow, name, access)
    }
    assert may == {("team/app", Access.PULL), ("team/app", Access.PUSH), ("quay.io:5000/a", Access.DELETE)}
    for scope in Scope:
        with pytest.raises(Forbidden, match="registry alone"):
            check_scope(narrow, scope)
    pushes = verify(signed(repo_access=[{"repo": "a", "scope": "push"}]), SECRET)
    assert may_access(pushes, "a", Access.PULL) and not may_access(pushes, "a", Access.DELETE)


def test_a_token_lives_a_day() -> None:
    claims = jwt.decode(mint(SECRET, subject="ann"), options={"verify_signature": False})
    assert claims["exp"] - claims["iat"] == 24 * 3600


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_every_hmac_is_accepted(algorithm: str) -> None:
    assert verify(signed(algorithm), SECRET).subject == "someone"


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (None, "missing"),
        ("", "missing"),
        ("Basic abc", "Bearer"),
        ("Bearer", "Bearer"),
        ("Bearer ", "Bearer"),
        ("Bearer  double", "Bearer"),
        ("Bearer a b", "Bearer"),
        ("Bearer nonsense", "not valid"),
        (signed(secret="another secret, also long enough"), "not valid"),
        (signed(exp=1), "expired"),
        (signed(nbf=time.time() + 10**8), "not valid"),
        ("Bearer " + jwt.encode({"sub": "x"}, "", algorithm="none"), "not valid"),
        (signed(repos=["a"]), "builder"),
        (signed(scope="push"), "builder"),
        (signed(build_id="b"), "builder"),
        (signed(sub="builder-1"), "builder"),
        (signed(permissions="*"), "list"),
        (signed(permissions=[1]), "list"),
        (signed(repo_access="a"), "repo_access"),
        (signed(repo_access=[{"repo": 1, "scope": "pull"}]), "repo_access"),
        (signed(repo_access=[{"repo": "a", "scope": "own"}]), "repo_access"),
        (signed(repo_access=7), "repo_access"),
    ],
)
def test_refused(header: str | None, word: str) -> None:
    with pytest.raises(Unauthorized) as refused:
        verify(header, SECRET)
    assert word in refused.value.message
    assert header is None or len(header) < 20 or header[7:] not in refused.value.message


def test_a_known_token_still_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = Verifier(SECRET)
    header = f"Bearer {mint(SECRET, subject='ann', lifetime=60)}"
    first = verifier.caller(header)
    assert verifier.caller(header) is first
    later = first.expires_at
    monkeypatch.setattr("hypeman.tokens.time.time", lambda: later)
    monkeypatch.setattr("hypeman.tokens.verify", lambda *_: pytest.fail("looked at again"))
    with pytest.raises(pytest.fail.Exception):
        verifier.caller(header)


def test_what_is_refused_is_not_remembered() -> None:
    verifier = Verifier(SECRET)
    for number in range(3000):
        with pytest.raises(Unauthorized):
            verifier.caller(f"Bearer {number}")
    for number in range(1500):
        verifier.caller(signed(number=number))
    assert len(verifier._known) <= 1000


def test_without_a_secret_every_token_is_refused() -> None:
    with pytest.raises(Unauthorized):
        verify(signed(), "")
    with pytest.raises(InvalidRequest):
        mint("", subject="ann")


def test_scopes() -> None:
    check_scope(Caller("old token"), Scope.INSTANCE_DELETE)
    check_scope(verify(signed(permissions=["*"]), SECRET), Scope.INSTANCE_DELETE)
    narrow = Caller("ann", frozenset({"instance:read"}))
    check_scope(narrow, Scope.INSTANCE_READ)
    with pytest.raises(Forbidden, match="instance:delete"):
        check_scope(narrow, Scope.INSTANCE_DELETE)


def test_the_names_of_scopes_are_those_of_the_contract() -> None:
    """Tokens that were issued have them."""
    kinds = ("instance", "image", "volume", "snapshot", "build", "device", "ingress", "resource")
    names = {f"{kind}:{right}" for kind in kinds for right in ("read", "write", "delete")} - {"resource:delete"}
    assert {scope.value for scope in Scope} == names
    assert mint(SECRET, subject="ann", scopes=["*", *names])


def test_unknown_scopes_are_not_minted() -> None:
    with pytest.raises(InvalidRequest, match="instance:fly"):
        mint(SECRET, subject="ann", scopes=["instance:read", "instance:fly"])


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": "9999999999"},
        {"exp": [9999999999]},
        {"exp": {}},
        {"exp": True},
        {"exp": 1e400},
        {"exp": "nonsense"},
        {"iat": "x"},
        {"iat": 1e400},
        {"nbf": "x"},
        {"nbf": 1e400},
        {"sub": 5},
        {"sub": None},
        {"permissions": {"*": 1}},
        {"aud": 1},
        {"iss": 1},
    ],
    ids=str,
)
def test_odd_claims_get_the_same_answer_every_time(claims: dict[str, Any]) -> None:
    """A correctly signed token with claims of another type: never an error of the server, first or later."""
    import base64
    import hashlib
    import hmac
    import json

    def part(content: bytes) -> str:
        return base64.urlsafe_b64encode(content).rstrip(b"=").decode()

    signed_part = ".".join(part(json.dumps(each).encode()) for each in ({"alg": "HS256"}, {"sub": "ann", **claims}))
    signature = hmac.new(SECRET.encode(), signed_part.encode(), hashlib.sha256).digest()
    verifier = Verifier(SECRET)
    answers = []
    for _ in range(3):
        try:
            answers.append(verifier.caller(f"Bearer {signed_part}.{part(signature)}").subject)
        except Unauthorized:
            answers.append("refused")
    assert answers in (["refused"] * 3, ["ann"] * 3)
    assert "exp" not in claims or answers[0] == "refused"
