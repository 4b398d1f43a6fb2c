"""This host's server in memory: the part of its API that the node uses, with failures at chosen requests."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, unquote

import httpx
import msgspec
import trio

from hypeman.instances.model.types import CreateInstanceRequest
from hypeman.instances.model.validate import MAX_GRACE
from tests.kube.fake_cluster import Answered, Faults, Lines

Object = dict[str, Any]
GIB = 1 << 30


class Refuse(Exception):
    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(message)
        self.response = httpx.Response(status, json={"code": code, "message": message or code})


class FakeHost(httpx.AsyncBaseTransport):
    def __init__(self) -> None:
        self.instances: dict[str, Object] = {}
        self.requests: dict[str, Object] = {}
        """Bodies that instances were made from, by their id."""
        self.images: dict[str, Object] = {}
        self.pulls: list[Object] = []
        self.volumes: dict[str, Object] = {}
        self.archives: dict[str, bytes] = {}
        self.devices: list[Object] = []
        self.calls: list[str] = []
        self.made = 0
        self.boots_to = "Running"
        self.room = 100
        self.broken_images: dict[str, str] = {}
        self.broken_verbs: dict[str, tuple[int, str]] = {}
        """Status and code with which a verb is refused."""
        self.faults = Faults()
        self._ids = itertools.count(1)
        self._changed = trio.Event()

    def named(self, start: str) -> list[Object]:
        return [each for each in self.instances.values() if each["name"].startswith(start)]

    def change(self, identifier: str, **fields: Any) -> None:
        self.instances[identifier] |= fields
        self._note()

    def end(self, identifier: str, code: int) -> None:
        """Its program ends by itself."""
        self.change(
            identifier, state="Stopped", exit_code=code, exit_message=f"exited with code {code}", stopped_at=_now()
        )

    # ── The protocol ────────────────────────────────────────────────────────────────────────────

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        content = await request.aread()
        path = request.url.raw_path.decode().partition("?")[0]
        query = {key: values[0] for key, values in parse_qs(request.url.query.decode()).items()}
        try:
            await self.faults.before(f"{request.method} {path}")
            if path == "/events":
                return httpx.Response(200, stream=Lines(self._events()))
            try:
                answer = self._answer(request.method, path, query, content)
            finally:
                if request.method != "GET":
                    self._note()
                    await self.faults.done()
        except Refuse as refusal:
            return refusal.response
        except Answered as fault:
            return Refuse(fault.code, "internal_error").response
        if request.method != "GET":
            self.calls.append(f"{request.method} {path}")
        return httpx.Response(204) if answer is None else httpx.Response(200, json=answer)

    def _answer(self, method: str, path: str, query: dict[str, str], content: bytes) -> Any:
        parts = [unquote(part) for part in path.split("/")[1:]]
        body = json.loads(content) if content[:1] in (b"{", b"[") else {}
        match method, parts:
            case "GET", ["resources"]:
                return self._resources()
            case "GET", ["devices"]:
                return self.devices
            case "GET", ["instances"]:
                return [each for each in self.instances.values() if _tagged(each, query)]
            case "POST", ["instances"]:
                return self._make(body)
            case "PATCH", ["instances", identifier]:
                self._find(identifier).update(body)
                return self._find(identifier)
            case "DELETE", ["instances", identifier]:
                del self.instances[self._find(identifier)["id"]]
                self._detach(identifier)
                return None
            case "POST", ["instances", identifier, verb]:
                return self._verb(self._find(identifier), verb, body)
            case "GET", ["images", name]:
                return self._image(name)
            case "POST", ["images"]:
                return self._pull(body)
            case "GET", ["volumes"]:
                return [each for each in self.volumes.values() if _tagged(each, query)]
            case "POST", ["volumes"]:
                return self._add_volume(body["id"], body["size_gb"], body["tags"])
            case "POST", ["volumes", "from-archive"]:
                tags = {key[5:-1]: value for key, value in query.items() if key.startswith("tags[")}
                self.archives[query["id"]] = content
                return self._add_volume(query["id"], int(query["size_gb"]), tags)
            case "DELETE", ["volumes", identifier]:
                return self._delete_volume(identifier)
        raise AssertionError(f"{method} {path} is not in the fake")

    def _find(self, identifier: str) -> Object:
        if identifier not in self.instances:
            raise Refuse(404, "not_found")
        return self.instances[identifier]

    def _make(self, body: Object) -> Object:
        msgspec.convert(body, CreateInstanceRequest)
        if len(self.instances) >= self.room:
            raise Refuse(409, "insufficient_resources", "memory: 0 bytes are free")
        wanted = [each for each in self.devices if each["id"] in body.get("devices", ())]
        if any(each.get("attached_to") for each in wanted):
            raise Refuse(409, "in_use", "the device is attached")
        for device in wanted:
            device["attached_to"] = body["name"]
        for mount in body.get("volumes", ()):
            self.volumes[mount["volume_id"]]["attachments"] = [
                {"instance_id": body["name"], "mount_path": mount["mount_path"], "readonly": mount["readonly"]}
            ]
        return self._add(body["name"], body.get("tags", {}), body)

    def _add(self, name: str, tags: dict[str, str], body: Object) -> Object:
        if self.named(name):
            raise Refuse(409, "name_conflict")
        number = next(self._ids)
        self.made += 1
        instance = {
            "id": f"i{number}",
            "name": name,
            "image": body["image"],
            "state": self.boots_to,
            "created_at": _now(),
            "started_at": _now(),
            "tags": tags,
            "network": {"enabled": True, "ip": f"10.0.0.{number}"},
            "health_status": {"status": "disabled"},
        }
        self.instances[instance["id"]] = instance
        self.requests[instance["id"]] = body
        return instance

    def _verb(self, instance: Object, verb: str, body: Object) -> Object:
        state = instance["state"]
        wanted, after = {
            "stop": (("Running", "Initializing"), "Stopped"),
            "standby": (("Running",), "Standby"),
            "restore": (("Standby",), "Running"),
            "start": (("Stopped",), "Running"),
            "fork": (("Standby", "Running"), state),
        }[verb]
        if state not in wanted:
            raise Refuse(409, "invalid_state", f"{verb} of one that is {state}")
        if verb in self.broken_verbs:
            raise Refuse(*self.broken_verbs[verb])
        if verb == "stop" and float(body.get("grace", "0s")[:-1]) > MAX_GRACE:
            raise Refuse(400, "invalid_grace")
        if verb == "fork":
            return self._add(body["name"], body["tags"], self.requests[instance["id"]])
        instance["state"] = after
        if verb == "stop":
            instance |= {"stopped_at": _now(), "exit_code": 143, "restart_status": {"blocked_reason": "manual_stop"}}
        if verb == "start":
            instance["started_at"] = _now()
        return instance

    def _image(self, name: str) -> Object:
        if name not in self.images:
            raise Refuse(404, "not_found")
        return self.images[name]

    def _pull(self, body: Object) -> Object:
        self.pulls.append(body)
        name = body["name"]
        if name in self.broken_images:
            raise Refuse(404, "not_found", self.broken_images[name])
        self.images[name] = {"name": name, "digest": "sha256:" + "ab" * 32, "status": "ready", "created_at": _now()}
        return self.images[name]

    def _add_volume(self, identifier: str, size_gb: int, tags: dict[str, str]) -> Object:
        if identifier in self.volumes:
            raise Refuse(409, "already_exists")
        self.volumes[identifier] = {
            "id": identifier, "name": identifier, "size_gb": size_gb, "created_at": _now(), "tags": tags,
        }  # fmt: skip
        return self.volumes[identifier]

    def _delete_volume(self, identifier: str) -> None:
        if identifier not in self.volumes:
            raise Refuse(404, "not_found")
        if self.volumes[identifier].get("attachments"):
            raise Refuse(409, "in_use")
        del self.volumes[identifier]

    def _detach(self, identifier: str) -> None:
        name = self.requests[identifier]["name"]
        for volume in self.volumes.values():
            if any(each["instance_id"] == name for each in volume.get("attachments", ())):
                volume["attachments"] = []
        for device in self.devices:
            if device.get("attached_to") == name:
                device["attached_to"] = None

    def _resources(self) -> Object:
        def of(kind: str, amount: int) -> Object:
            return {
                "type": kind, "capacity": amount, "effective_limit": amount, "allocated": 0, "available": amount,
                "oversub_ratio": 1.0,
            }  # fmt: skip

        return {
            "cpu": of("cpu", 16),
            "memory": of("memory", 64 * GIB),
            "disk": of("disk", 500 * GIB),
            "network": of("network", 0),
            "allocations": [],
        }

    def _note(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def _events(self) -> AsyncIterator[bytes]:
        while not self.faults.away:
            changed = self._changed
            try:
                await self.faults.event("/events")
            except Answered:
                return
            yield b"data: {}\n\n"
            await changed.wait()


def _tagged(each: Object, query: dict[str, str]) -> bool:
    wanted = {key[5:-1]: value for key, value in query.items() if key.startswith("tags[")}
    return all(each.get("tags", {}).get(key) == value for key, value in wanted.items())


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
