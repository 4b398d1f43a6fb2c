"""Every method of the published Python SDK, once, with strict validation of responses.

    python python_client.py URL TOKEN       run by tests/conformance/sdks.py, with the SDK's own interpreter

Prints {"failed": {method: error}, "unused": [methods that are not called]}. The server serves the fakes, filled by
``sdks.py``: instance ``web`` (Running), image ``alpine``, volume ``data``, device ``gpu`` and the PCI function
0000:03:00.0. What the server does not implement yet answers 501.
"""

from __future__ import annotations

import gzip
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

sdk: Any = importlib.import_module("hypeman")  # the SDK has our package's name


def methods(resource: Any, path: str = "") -> Iterator[str]:
    """Names of all methods of the client, such as ``instances.volumes.attach``."""
    for name in dir(resource):
        if name.startswith(("_", "with_")):
            continue
        found = getattr(resource, name)
        if type(found).__name__.endswith("Resource"):
            yield from methods(found, f"{path}{name}.")
        elif path and inspect.ismethod(found):
            yield path + name


class Calls:
    def __init__(self, client: Any) -> None:
        self.client = client
        self.failed: dict[str, str] = {}
        self.used: set[str] = set()

    def __call__(self, name: str, /, *args: Any, **fields: Any) -> Any:
        """The response of method ``name``; None if it failed, which is noted. 501 is an answer."""
        self.used.add(name)
        method: Callable[..., Any] = self.client
        for part in name.split("."):
            method = getattr(method, part)
        try:
            answer = method(*args, **fields)
            return list(answer) if isinstance(answer, sdk.Stream) else answer
        except sdk.APIStatusError as error:
            if error.status_code != 501:
                self.failed[name] = f"{error.status_code} {error.message}"
        except Exception as error:
            self.failed[name] = f"{type(error).__name__}: {error}"
        return None


def call_everything(call: Calls) -> None:
    call("health.check")
    call("capabilities.get")
    call("resources.get")
    call("resources.reclaim_memory", reclaim_bytes=0, dry_run=True, reason="test")

    call("images.create", name="nginx", tags={"a": "b"}, platform="linux/amd64")
    call("images.list", tags={"a": "b"})
    call("images.get", "alpine")
    call("images.tag", "alpine", target="alpine:copy")
    call("images.delete", "docker.io/library/nginx:latest")

    call("instances.create", name="made", image="alpine", vcpus=1, size="512MB", env={"A": "b"}, tags={"team": "x"})
    call("instances.list", state="Running", tags={"team": "x"})
    call("instances.get", "web")
    call("instances.update", "web", ttl="1h")
    call("instances.wait", "web", state="Running", api_timeout="1s")
    call("instances.logs", "web", tail=1, follow=False)
    call("instances.stat", "web", path="/etc", follow_links=True)
    call("instances.stats", "web")
    call("instances.volumes.attach", "data", id="web", mount_path="/data", readonly=True)
    call("instances.volumes.detach", "data", id="web")
    call("instances.auto_standby.status", "web")
    call("instances.auto_standby.hold", "web")
    call("instances.snapshot_schedule.update", "web", interval="1h", retention={"max_count": 2})
    call("instances.snapshot_schedule.get", "web")
    call("instances.snapshot_schedule.delete", "web")
    call("instances.standby", "web", compression={"enabled": True, "algorithm": "zstd", "level": 1})
    call("instances.restore", "web")
    made = call("instances.snapshots.create", "web", kind="Standby", name="first", tags={"a": "b"})
    snapshot = made.id if made is not None else "none"
    call("instances.snapshots.restore", snapshot, id="web", target_state="Running")
    call("instances.fork", "web", name="forked", from_running=True, target_state="Running")
    call("instances.stop", "web")
    call("instances.start", "web", cmd=["true"])
    call("instances.delete", "made", graceful_shutdown=False)

    call("snapshots.list", kind="Standby", name="first", tags={"a": "b"})
    call("snapshots.get", snapshot)
    call("snapshots.fork", snapshot, name="again", target_state="Running")
    call("snapshots.delete", snapshot)

    call("volumes.create", name="more", size_gb=1, id="more", tags={"a": "b"})
    call("volumes.create_from_archive", gzip.compress(b""), name="filled", size_gb=1)
    call("volumes.list", tags={"a": "b"})
    call("volumes.get", "more")
    call("volumes.delete", "more")

    call("devices.list_available")
    device = call("devices.create", pci_address="0000:03:00.0", name="card", tags={"a": "b"})
    call("devices.list", tags={"a": "b"})
    call("devices.retrieve", device.id if device is not None else "none")
    call("devices.delete", device.id if device is not None else "none")

    rule = {"match": {"hostname": "a.example.com"}, "target": {"instance": "web", "port": 80}}
    ingress = call("ingresses.create", name="front", rules=[rule])
    call("ingresses.list")
    call("ingresses.get", ingress.id if ingress is not None else "none")
    call("ingresses.delete", ingress.id if ingress is not None else "none")

    builder = call("builders.create", name="fast", id="fast", disk_size_gb=1)
    call("builders.list")
    call("builders.get", "fast" if builder is None else builder.id)
    call("builders.prune", "fast" if builder is None else builder.id)
    call("builders.delete", "fast" if builder is None else builder.id)
    build = call("builds.create", source=("source.tar.gz", gzip.compress(b"")), dockerfile="FROM scratch")
    identifier = build.id if build is not None else "none"
    call("builds.list")
    call("builds.get", identifier)
    call("builds.events", identifier, follow=False)
    call("builds.cancel", identifier)
    push = call("pushes.create", image="alpine", target="registry.example.com/alpine:1")
    call("pushes.list")
    call("pushes.get", push.id if push is not None else "none")


def main(url: str, token: str) -> None:
    client = sdk.Hypeman(base_url=url, api_key=token, max_retries=0, _strict_response_validation=True)
    call = Calls(client)
    call_everything(call)
    json.dump({"failed": call.failed, "unused": sorted(set(methods(client)) - call.used)}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
