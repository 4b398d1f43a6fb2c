"""Signatures of webhook deliveries, as https://www.standardwebhooks.com specifies them: libraries of many languages
verify them. Pure.

    webhook-id         the same for every attempt to deliver an event
    webhook-timestamp  seconds since 1970 of this attempt: receivers refuse old ones
    webhook-signature  v1,<base64 of HMAC-SHA256 over id.timestamp.body>
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

_PREFIX = "whsec_"


def key_of(secret: str) -> bytes:
    """The key in a configured secret: base64 after ``whsec_``, else the text itself. Raises ValueError."""
    if not secret.startswith(_PREFIX):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except binascii.Error as error:
        raise ValueError(f"what follows {_PREFIX} in a secret must be base64") from error


def signed_headers(key: bytes, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers that authenticate ``body``."""
    content = f"{message_id}.{timestamp}.".encode() + body
    signature = base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()
    return {"webhook-id": message_id, "webhook-timestamp": str(timestamp), "webhook-signature": f"v1,{signature}"}
