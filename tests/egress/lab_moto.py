"""moto's server, behind a check that each request is signed with the real keys: python -m … LEAF ADDRESS.

The check computes the signature anew from the request as it arrived, for header and presigned forms, and verifies the
hash of the body where one is signed. A request that fails it gets 403, as from AWS. Prints "ready" when it listens.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qsl, quote

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

KEY_ID, SECRET, TOKEN = "AKIAREALREALREAL", "real/secret+key", "real-session-token"
VALUE = f"{KEY_ID}:{SECRET}:{TOKEN}"


def _hmac(key: bytes, text: str) -> bytes:
    return hmac.digest(key, text.encode(), "sha256")


class Check:
    """WSGI middleware."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app = app

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        chunked = environ.pop("HTTP_TRANSFER_ENCODING", "") == "chunked"
        body = environ["wsgi.input"].read(-1 if chunked else int(environ.get("CONTENT_LENGTH") or 0))
        if not is_signed(environ, body):
            start("403 Forbidden", [("Content-Type", "text/plain")])
            return [b"SignatureDoesNotMatch\n"]
        environ["wsgi.input"], environ["CONTENT_LENGTH"] = io.BytesIO(body), str(len(body))
        return self._app(environ, start)


def is_signed(environ: dict[str, Any], body: bytes) -> bool:
    path, _, query = str(environ["RAW_URI"]).partition("?")
    pairs = parse_qsl(query, keep_blank_values=True)
    fields = {name[5:].lower().replace("_", "-"): value for name, value in environ.items() if name.startswith("HTTP_")}
    fields |= {"content-type": environ.get("CONTENT_TYPE", ""), "content-length": environ.get("CONTENT_LENGTH", "")}
    if "authorization" in fields:
        found = re.fullmatch(r"AWS4-HMAC-SHA256 Credential=([^,]+), SignedHeaders=([^,]+), Signature=([0-9a-f]{64})",
                             fields["authorization"])  # fmt: skip
        if found is None:
            return False
        (credential, names, signature), when, token = (
            found.groups(),
            fields["x-amz-date"],
            fields["x-amz-security-token"],
        )
        payload = fields.get("x-amz-content-sha256", hashlib.sha256(body).hexdigest())
        if len(payload) == 64 and payload != hashlib.sha256(body).hexdigest():
            return False
    else:
        given = dict(pairs)
        credential, names, signature = (given[f"X-Amz-{name}"] for name in ("Credential", "SignedHeaders", "Signature"))
        when, token, payload = given["X-Amz-Date"], given["X-Amz-Security-Token"], "UNSIGNED-PAYLOAD"
        pairs = [(name, value) for name, value in pairs if name != "X-Amz-Signature"]
    key_id, date, region, service, end = credential.split("/")
    if (key_id, token, end, date) != (KEY_ID, TOKEN, "aws4_request", when[:8]):
        return False
    uri = path if service == "s3" else quote(path, safe="/~")
    canonical = "\n".join([
        environ["REQUEST_METHOD"], uri,
        "&".join(f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}" for name, value in sorted(pairs)),
        "".join(f"{name}:{' '.join(fields[name].split())}\n" for name in names.split(";")), names, payload,
    ])  # fmt: skip
    scope = f"{date}/{region}/{service}/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{when}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    signing = b"AWS4" + SECRET.encode()
    for part in (date, region, service, "aws4_request"):
        signing = _hmac(signing, part)
    return _hmac(signing, text).hex() == signature


class Handler(WSGIRequestHandler):
    def log(self, *args: Any) -> None:
        """Nothing: standard output is read by the test."""


def main(leaf: str, address: str) -> None:
    app = Check(DomainDispatcherApplication(create_backend_app))
    server = make_server(address, 443, app, threaded=True, ssl_context=(leaf, leaf), request_handler=Handler)
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
