"""The egress path as a process of its own, for tests and benchmarks that want it in a namespace or alone on a core.

Takes one JSON document on the command line: `settings` of the service, `directory`, `names` (host to addresses),
`policies` ([instance, source, credentials, secrets], and rules on destinations if there are any). Prints the port and
the CA, one JSON line; ends with its stdin.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import msgspec
import trio

from hypeman.egress.rules import check_access
from hypeman.egress.service import Egress, Settings
from hypeman.egress.types import CredentialPolicy, EgressAccess


async def main() -> None:
    told = json.loads(sys.argv[1])
    settings = msgspec.convert(told["settings"], Settings)

    async def resolve(name: str) -> list[str]:
        return list(told["names"].get(name, []))

    egress = Egress(settings, Path(told["directory"]), resolve=resolve)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(egress.run, grace=0.5))
        for instance, source, given, secrets, *rules in told["policies"]:
            credentials = msgspec.convert(given, dict[str, CredentialPolicy])
            access = check_access(msgspec.convert(rules[0], EgressAccess)) if rules else None
            await egress.set_policy(instance, source, credentials, secrets, access=access)
        await egress.accept()
        egress.on_audit(lambda record: told.get("audit") and print(json.dumps(msgspec.to_builtins(record)), flush=True))
        ready = {"port": egress.port, "ca": egress.ca_pem.decode(), "pid": egress.engine_pid}
        print(json.dumps(ready), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
