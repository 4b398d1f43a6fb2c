"""An API server in memory: objects by path, versions, watches, and failures at chosen requests.

It does what the node relies on: uids and resourceVersions, optimistic preconditions, merge patches, the life cycle of a
deleted pod, lists with a field selector, watches that begin at a version, and 410 for one that is too old.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any, Literal
from urllib.parse import parse_qs

import httpx
import trio

Object = dict[str, Any]
Fault = int | Literal["cut", "killed"]
"""An HTTP status that is answered, a connection that breaks, or the program's death."""


class Refuse(Exception):
    def __init__(self, code: int, reason: str, message: str = "", name: str = "") -> None:
        super().__init__(message)
        self.body = {
            "kind": "Status",
            "code": code,
            "reason": reason,
            "message": message or reason,
            **({"details": {"name": name}} if name else {}),
        }
        self.code = code


class Answered(Exception):
    """The fake answers with this status instead."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Faults:
    """Counts the requests of a fake and the events that it sends, and breaks one of them: before or after it takes
    effect."""

    def __init__(self) -> None:
        self.count = 0
        self.at: int | None = None
        self.after = False
        self.fault: Fault = "cut"
        self.died = trio.Event()
        """With the fault "killed" set instead of breaking the connection: the whole program dies."""
        self.away = False
        """Every request fails."""
        self.seen: list[str] = []
        """Method and path; EVENT and path for one of a watch."""

    def arm(self, at: int, fault: Fault, *, after: bool = False) -> None:
        self.count, self.at, self.after, self.fault = 0, at, after, fault

    async def before(self, what: str) -> None:
        here = self._count(what)
        await trio.lowlevel.checkpoint()
        if self.away:
            raise httpx.ConnectError("away")
        if here:
            await self._break()

    async def event(self, path: str) -> None:
        """Before it is sent; several are sent at once, as by a server."""
        if self._count(f"EVENT {path}"):
            await self._break()

    def _count(self, what: str) -> bool:
        """Whether it is to be broken before it takes effect."""
        self.count += 1
        self.seen.append(what)
        return self.count == self.at and not self.after

    async def done(self) -> None:
        if self.count == self.at and self.after:
            await self._break()

    async def _break(self) -> None:
        if isinstance(self.fault, int):
            raise Answered(self.fault)
        if self.fault == "cut":
            raise httpx.ReadError("cut")
        self.died.set()
        await trio.sleep_forever()


class Lines(httpx.AsyncByteStream):
    """A response body that is made while it is read."""

    def __init__(self, lines: AsyncIterator[bytes]) -> None:
        self._lines = lines

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for line in self._lines:
            yield line


class FakeCluster(httpx.AsyncBaseTransport):
    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.log: list[tuple[int, str, str, Object]] = []
        """Version, change, path and object; what watches send."""
        self.forgotten = 0
        """Versions up to this one are too old to watch from."""
        self.faults = Faults()
        self._versions = itertools.count(100)
        self._uids = itertools.count(1)
        self._changed = trio.Event()
        self.version = 99
        self._generation = 0
        self.clock: Callable[[], datetime] = lambda: datetime.now(UTC)

    # ── For tests ───────────────────────────────────────────────────────────────────────────────

    def put(self, path: str, body: Object) -> Object:
        """Create or replace the object at ``path``, as another client would."""
        namespace, name = _split(path)
        made = copy.deepcopy(body)
        about = made.setdefault("metadata", {})
        about["name"] = name
        if namespace:
            about["namespace"] = namespace
        before = self.objects.get(path)
        about.setdefault("uid", before["metadata"]["uid"] if before else f"uid-{next(self._uids)}-0000")
        about.setdefault("creationTimestamp", _now())
        self._write("MODIFIED" if before else "ADDED", path, made)
        return made

    def get(self, path: str) -> Object | None:
        return self.objects.get(path)

    def remove(self, path: str) -> None:
        """As a controller with all powers, or a force deletion."""
        self._write("DELETED", path, self.objects[path])

    def delete_pod(self, path: str, grace: int = 30) -> None:
        self._delete(path, {"gracePeriodSeconds": grace})

    def drop_watches(self, *, expire: bool = False) -> None:
        """End all watches; with ``expire``, their versions are too old to continue."""
        if expire:
            self.forgotten = self.version
        self._generation += 1
        self._wake()

    def events(self) -> list[tuple[str, str]]:
        """Reason and message."""
        return [(each["reason"], each["message"]) for path, each in self.objects.items() if "/events/" in path]

    # ── The protocol ────────────────────────────────────────────────────────────────────────────

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        content = await request.aread()
        path = request.url.path
        query = {key: values[0] for key, values in parse_qs(request.url.query.decode()).items()}
        try:
            await self.faults.before(f"{request.method} {path}")
            if query.get("watch"):
                return self._watch(path, query)
            try:
                answer = self._answer(request.method, path, query, json.loads(content) if content else None)
            finally:
                if request.method != "GET":
                    await self.faults.done()
        except Refuse as refusal:
            return httpx.Response(refusal.code, json=refusal.body)
        except Answered as fault:
            return httpx.Response(fault.code, json=Refuse(fault.code, "InternalError").body)
        return httpx.Response(200, json=answer, headers={"Date": format_datetime(self.clock(), usegmt=True)})

    def _answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Object:
        match method:
            case "GET" if path in self.objects:
                return self.objects[path]
            case "GET" if path.rpartition("/")[0].endswith("/pods"):
                raise Refuse(403, "Forbidden", "no relationship found between node and this object")
            case "GET" if _is_collection(path):
                items = [each for place, each in self.objects.items() if _within(place, path) and _fits(each, query)]
                return {"metadata": {"resourceVersion": str(self.version)}, "items": items}
            case "POST" if path.endswith("/token"):
                return {"status": {"token": "token-of-" + path.split("/")[-2]}}
            case "POST":
                return self._create(path, body)
            case "PATCH":
                return self._patch(path, body)
            case "DELETE":
                return self._delete(path, body or {})
        raise Refuse(404, "NotFound", f"{path} not found", path.rpartition("/")[2])

    def _create(self, path: str, body: Object) -> Object:
        about = body["metadata"]
        name = about.get("name") or f"{about['generateName']}{next(self._uids)}"
        place = f"{path}/{name}"
        if place in self.objects:
            raise Refuse(409, "AlreadyExists", f"{place} exists", name)
        return self.put(place, body)

    def _patch(self, path: str, body: Object) -> Object:
        place = path.removesuffix("/status")
        before = self.objects.get(place)
        if before is None:
            raise Refuse(404, "NotFound", f"{place} not found", place.rpartition("/")[2])
        uid = body.get("metadata", {}).get("uid")
        if uid not in (None, before["metadata"]["uid"]):
            raise Refuse(409, "Conflict", "another uid")
        after: Object = _merged(before, body)
        self._write("MODIFIED", place, after)
        return after

    def _delete(self, path: str, options: Object) -> Object:
        before = self.objects.get(path)
        if before is None:
            raise Refuse(404, "NotFound", f"{path} not found", path.rpartition("/")[2])
        uid = options.get("preconditions", {}).get("uid")
        if uid not in (None, before["metadata"]["uid"]):
            raise Refuse(409, "Conflict", "another uid")
        grace = options.get("gracePeriodSeconds", 30)
        if "/pods/" in path and grace and before["spec"].get("nodeName"):
            dying = copy.deepcopy(before)
            dying["metadata"] |= {"deletionTimestamp": _now(), "deletionGracePeriodSeconds": grace}
            self._write("MODIFIED", path, dying)
            return dying
        self._write("DELETED", path, before)
        return before

    def _write(self, change: str, path: str, made: Object) -> None:
        self.version = next(self._versions)
        made = copy.deepcopy(made)
        made["metadata"]["resourceVersion"] = str(self.version)
        if change == "DELETED":
            del self.objects[path]
        else:
            self.objects[path] = made
        self.log.append((self.version, change, path, made))
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    def _watch(self, path: str, query: dict[str, str]) -> httpx.Response:
        version = int(query["resourceVersion"])
        if version < self.forgotten:
            expired = {"type": "ERROR", "object": {"code": 410, "reason": "Expired", "message": "too old"}}
            return httpx.Response(200, content=json.dumps(expired).encode() + b"\n")
        return httpx.Response(200, stream=Lines(self._changes(path, query, version)))

    async def _changes(self, path: str, query: dict[str, str], version: int) -> AsyncIterator[bytes]:
        generation = self._generation
        while generation == self._generation and not self.faults.away:
            changed = self._changed
            for at, change, place, each in [entry for entry in self.log if entry[0] > version]:
                version = at
                if _within(place, path) and _fits(each, query):
                    try:
                        await self.faults.event(path)
                    except Answered as fault:
                        error = {"type": "ERROR", "object": Refuse(fault.code, "InternalError").body}
                        yield json.dumps(error).encode() + b"\n"
                        return
                    yield json.dumps({"type": change, "object": each}).encode() + b"\n"
            if version >= self.version:
                await changed.wait()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _split(path: str) -> tuple[str, str]:
    parts = path.split("/")
    namespace = parts[parts.index("namespaces") + 1] if "namespaces" in parts else ""
    return namespace, parts[-1]


def _is_collection(path: str) -> bool:
    parts = [part for part in path.split("/") if part]
    body = parts[2:] if parts[0] == "api" else parts[3:]
    return len(body) == 1 or (body[:1] == ["namespaces"] and len(body) == 3)


def _within(place: str, collection: str) -> bool:
    """Whether the object at ``place`` is of the collection, which may be of all namespaces."""
    kind = collection.rpartition("/")[2]
    if place.split("/")[-2] != kind:
        return False
    return "namespaces" not in collection or place.startswith(collection)


def _fits(each: Object, query: dict[str, str]) -> bool:
    for condition in filter(None, query.get("fieldSelector", "").split(",")):
        field, _, wanted = condition.partition("=")
        part, _, name = field.partition(".")
        if each.get(part, {}).get(name) != wanted:
            return False
    return True


def _merged(before: Any, patch: Any) -> Any:
    """A merge patch, with the parts of strategic ones that the node uses."""
    if not isinstance(patch, dict):
        return patch
    after = copy.deepcopy(before) if isinstance(before, dict) else {}
    for key, value in patch.items():
        if value is None:
            after.pop(key, None)
        elif key == "conditions":
            known = {each["type"]: each for each in after.get(key, [])}
            for each in value:
                known[each["type"]] = _merged(known.get(each["type"], {}), each)
            after[key] = list(known.values())
        elif isinstance(value, list):
            after[key] = [each for each in value if each != {"$patch": "replace"}]
        else:
            after[key] = _merged(after.get(key), value)
    return after
