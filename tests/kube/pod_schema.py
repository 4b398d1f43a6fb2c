"""The fields of a pod's spec as Kubernetes publishes them: names and types, for every type that a spec consists of.

    python -m tests.kube.pod_schema FILE    write golden/pod_schema.json from an OpenAPI document (v3) of the API
                                            group ``v1``: api/openapi-spec/v3/api__v1_openapi.json of the module
                                            k8s.io/kubernetes, or `kubectl get --raw /openapi/v3/api/v1`

``tests/fleet`` compares it with what the API server says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden" / "pod_schema.json"
ROOT = "PodSpec"
_PREFIX = "io.k8s.api.core.v1."

Schema = dict[str, dict[str, str]]
"""Type → field → ``string``, ``integer``, ``boolean``, ``map`` or another type; with ``[]`` before it: a list of it."""


def load() -> Schema:
    found: Schema = json.loads(GOLDEN.read_text())
    return found


def reduce(document: Any) -> Schema:
    """All that ``ROOT`` is made of."""
    schemas = document["components"]["schemas"]
    found: Schema = {}
    waiting = [_PREFIX + ROOT]
    while waiting:
        name = waiting.pop()
        if _short(name) in found:
            continue
        properties = schemas[name].get("properties", {})
        found[_short(name)] = {field: _type(schemas, body) for field, body in sorted(properties.items())}
        waiting += [made for body in properties.values() if (made := _made_of(schemas, body))]
    return dict(sorted(found.items()))


def _type(schemas: Any, body: Any) -> str:
    if body.get("type") == "array":
        return "[]" + _type(schemas, body["items"])
    if made := _made_of(schemas, body):
        return _short(made)
    simple = body.get("type") or ("string" if _reference(body) else "")
    return "map" if simple == "object" else simple


def _made_of(schemas: Any, body: Any) -> str:
    """The schema of an object with fields; quantities and times have none."""
    inner = body["items"] if body.get("type") == "array" else body
    name = _reference(inner)
    return name if name and "properties" in schemas[name] else ""


def _reference(body: Any) -> str:
    for each in (body, *body.get("allOf", ())):
        if "$ref" in each:
            return str(each["$ref"]).rpartition("/")[2]
    return ""


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def render(schema: Schema) -> str:
    return json.dumps(schema, indent=1) + "\n"


if __name__ == "__main__":
    GOLDEN.write_text(render(reduce(json.loads(Path(sys.argv[1]).read_text()))))
