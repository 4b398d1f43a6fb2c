"""Dockerfiles of the kinds that people have, built in real guests, compared with what they mean and with what buildah
makes of them: `make test-builds`.

All start from `scratch` and this host's static busybox, so that no registry is asked. Two are built at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.bench.harness import forget_peak, peak_memory
from tests.builds.against import Buildah, compare
from tests.builds.guest import BASE, build, building, finished, follow, output_of, request
from tests.images.trees import describe, mounted
from tests.real.appliance import Appliance, check_host, short_directory

pytestmark = [pytest.mark.real, pytest.mark.slow]

BUSYBOX = """
FROM scratch AS busybox
COPY bin/busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]
ENV PATH=/bin
"""
Files = Mapping[str, bytes | str | Path]


class Case:
    """A Dockerfile, and what an instance of its image prints; or how it fails. ``older``: what is replaced in it for
    the buildah of Debian, and by what; ``differs``: paths that it makes otherwise."""

    def __init__(
        self,
        text: str,
        prints: str = "",
        *,
        fails: str = "",
        files: Files | None = None,
        older: Mapping[str, str] | None = None,
        differs: Collection[bytes] = (),
        **fields: Any,
    ) -> None:
        self.files: dict[str, bytes | str | Path] = {**BASE, "Dockerfile": BUSYBOX + text, **(files or {})}
        for new, old in (older or {}).items():
            assert new in text
            text = text.replace(new, old)
        self.differs = differs
        self.older_files: dict[str, bytes | str | Path] = {**self.files, "Dockerfile": BUSYBOX + text}
        self.prints = prints
        self.fails = fails
        self.fields = fields


CASES = {
    "multi-stage": Case(
        """
FROM busybox AS one
RUN echo one > /one
FROM busybox AS two
RUN echo two > /two
FROM busybox
COPY --from=one /one /
COPY --from=1 /bin/busybox /other
COPY --from=two /two /
CMD ["cat", "/one", "/two"]
""",
        "one\ntwo",
    ),
    "target": Case(
        "FROM busybox AS wanted\nCMD echo the wanted stage\nFROM busybox\nRUN exit 1\n",
        "the wanted stage",
        target="wanted",
    ),
    "heredocs": Case(
        """
FROM busybox
COPY <<EOF /etc/greeting
hello ${UNSET:-default}
EOF
RUN <<SCRIPT
#!/bin/sh
set -e
for n in 1 2 3; do echo $n; done > /numbers
SCRIPT
CMD ["cat", "/etc/greeting", "/numbers"]
""",
        "hello default\n1\n2\n3",
        older={
            "COPY <<EOF /etc/greeting\nhello ${UNSET:-default}\nEOF\n": "COPY greeting /etc/greeting\n",
            "RUN <<SCRIPT\n#!/bin/sh\nset -e\nfor n in 1 2 3; do echo $n; done > /numbers\nSCRIPT\n": (
                "RUN for n in 1 2 3; do echo $n; done > /numbers\n"
            ),
        },
        files={"greeting": "hello default\n"},
    ),
    "arguments": Case(
        'FROM busybox\nARG A=default\nARG B\nENV SAID="$A $B"\nCMD echo $SAID\n',
        "given too",
        build_args={"A": "given", "B": "too"},
    ),
    "ignored files": Case(
        "FROM busybox\nCOPY . /context\nCMD find /context -type f | grep -v /bin/ | sort\n",
        "/context/keep/a.log\n/context/src/main",
        files={
            ".dockerignore": "*\n!bin\n!src\n!keep/a.log\nbig\n",
            "src/main": "main",
            "keep/a.log": "kept",
            "keep/b.log": "dropped",
            "big/blob": bytes(8 << 20),
        },
    ),
    "user": Case(
        """
FROM busybox
RUN echo "app:x:1234:1234::/home/app:/bin/sh" > /etc/passwd && mkdir -p /home/app && chown 1234:1234 /home/app
USER app
WORKDIR /home/app
RUN touch made
CMD ["sh", "-c", "id -u; pwd; stat -c %u made"]
""",
        "1234\n/home/app\n1234",
    ),
    "health check": Case(
        """
FROM busybox
EXPOSE 80
LABEL kind=web
HEALTHCHECK --interval=5s CMD ["true"]
STOPSIGNAL SIGINT
CMD echo ok
""",
        "ok",
        labels={"team": "a"},
    ),
    "copy --link": Case(
        """
FROM busybox AS files
RUN mkdir -p /d/e && echo deep > /d/e/f && ln -s e/f /d/link && echo x > /h1 && ln /h1 /h2
FROM busybox
COPY --link --from=files --chmod=0640 /d /copied
COPY --link --chown=7:8 bin/busybox /owned
CMD ["sh", "-c", "cat /copied/link; stat -c '%a' /copied/e/f; stat -c '%u:%g' /owned"]
""",
        "deep\n640\n7:8",
        older={"COPY --link ": "COPY "},
        differs=[b"copied"],
    ),
    "failing step": Case(
        "FROM busybox\nRUN echo before && sh -c 'echo the reason >&2; exit 42'\nRUN echo never\n", fails="exit code: 42"
    ),
    "no such stage": Case("FROM busybox\nCOPY --from=busybox /absent /x\n", fails="/absent"),
    "onbuild": Case(
        "FROM team/onbuild:v1\nCMD cat /triggered\n", "from the child", files={"child": "from the child\n"}
    ),
}

PARENT: Files = {**BASE, "Dockerfile": BUSYBOX + "ONBUILD COPY child /triggered\n"}


@pytest.fixture
def directory() -> Iterator[Path]:
    check_host()
    yield from short_directory("builds")


async def test_dockerfiles(directory: Path) -> None:
    results: dict[str, tuple[Any, list[str]]] = {}
    async with building(directory) as appliance:
        parent, log = await build(
            appliance,
            PARENT,
            image_name="team/onbuild:v1",
        )
        assert parent["status"] == "ready", (parent["error"], log)
        limit = trio.CapacityLimiter(2)

        async def one(name: str, case: Case) -> None:
            async with limit:
                fields = {"image_name": f"cases/{name.replace(' ', '-').replace('---', '-')}:v1", **case.fields}
                results[name] = await build(appliance, case.files, **fields)

        async with trio.open_nursery() as nursery:
            for name, case in CASES.items():
                nursery.start_soon(one, name, case)
        wrong = {name: said for name in CASES if (said := await judge(appliance, name, *results[name]))}
        assert not wrong, wrong
        await check_against_buildah(appliance, directory, {name: done for name, (done, _) in results.items()})
        await check_config(appliance)
        await check_provenance(appliance)
        await check_platforms(appliance)
        await check_scoped_cache(appliance)


async def judge(appliance: Appliance, name: str, done: Any, log: list[str]) -> str:
    """What is wrong with the result of a case; empty: nothing."""
    case = CASES[name]
    if case.fails:
        good = done["status"] == "failed" and case.fails in done["error"] and not done["image_ref"]
        return "" if good else f"{done}\n{log[-20:]}"
    if done["status"] != "ready":
        return f"{done}\n{log[-20:]}"
    printed = await output_of(appliance, done["image_ref"], f"case-{len(name)}-{abs(hash(name)) % 1000}")
    return "" if case.prints in printed.replace("\r", "") else f"printed {printed!r}"


async def config_of(appliance: Appliance, repository: str) -> Any:
    """Of the image of the tag v1 in the registry."""
    document = (await appliance.ask("GET", f"/v2/{repository}/manifests/v1")).json()
    return (await appliance.ask("GET", f"/v2/{repository}/blobs/{document['config']['digest']}")).json()["config"]


async def check_against_buildah(appliance: Appliance, directory: Path, done: Mapping[str, Any]) -> None:
    """Files, modes, owners and configurations of the images."""
    buildah = Buildah(directory / "buildah")
    await trio.to_thread.run_sync(buildah.build, "team/onbuild:v1", PARENT, {})
    config = await config_of(appliance, "team/onbuild")
    wrong = {"triggers": compare(({}, config), ({}, buildah.config("team/onbuild:v1")))}
    for name, case in CASES.items():
        if case.fails:
            continue
        ref = done[name]["image_ref"].removeprefix("docker.io/")
        await trio.to_thread.run_sync(buildah.build, ref, case.older_files, case.fields)
        disk = appliance.data / "images" / done[name]["image_digest"].removeprefix("sha256:") / "root.erofs"
        with mounted(disk) as root:
            ours = describe(root), await config_of(appliance, ref.partition(":")[0])
        wrong[name] = compare(ours, (buildah.tree(ref), buildah.config(ref)), case.differs)
    assert not any(wrong.values()), "\n".join(f"{name}:\n" + "\n".join(lines) for name, lines in wrong.items())


async def check_config(appliance: Appliance) -> None:
    """The image's config has what the Dockerfile says; its blobs are in the registry under its name."""
    config = await config_of(appliance, "cases/health-check")
    assert config["Labels"] == {"kind": "web", "team": "a"}
    assert config["ExposedPorts"] == {"80/tcp": {}} and config["StopSignal"] == "SIGINT"
    assert config["Healthcheck"]["Test"] == ["CMD", "true"]


async def check_provenance(appliance: Appliance) -> None:
    """Attestations are kept in the registry beside the image, under each name; the VM has no network here."""
    done, log = await build(
        appliance,
        {**BASE, "Dockerfile": BUSYBOX + "CMD echo attested\n", "package-lock.json": "{}"},
        image_name="quay.io/team/attested:v1",
        image_names=["team/attested:latest"],
        provenance="mode=max",
        network="isolated",
    )
    assert done["status"] == "ready", (done["error"], log)
    assert done["provenance"]["lockfile_hashes"].keys() == {"package-lock.json"}
    for repository, tag in (("quay.io/team/attested", "v1"), ("team/attested", "latest")):
        index = (await appliance.ask("GET", f"/v2/{repository}/manifests/{tag}")).json()
        kinds = [manifest.get("annotations", {}).get("vnd.docker.reference.type") for manifest in index["manifests"]]
        assert kinds == [None, "attestation-manifest"], index
    assert "attested" in await output_of(appliance, "team/attested", "attested")


async def check_platforms(appliance: Appliance) -> None:
    """An image for two platforms is one index; here, that of the host runs."""
    text = "FROM scratch\nARG TARGETARCH\nCOPY bin/busybox /bin/sh\nLABEL for=$TARGETARCH\nCMD echo runs\n"
    done, log = await build(
        appliance, {**BASE, "Dockerfile": text}, image_name="team/two:v1", platform="linux/amd64,linux/arm64"
    )
    assert done["status"] == "ready", (done["error"], log)
    index = (await appliance.ask("GET", "/v2/team/two/manifests/v1")).json()
    assert [one["platform"]["architecture"] for one in index["manifests"]] == ["amd64", "arm64"], index
    assert "runs" in await output_of(appliance, "team/two:v1", "two")


async def check_scoped_cache(appliance: Appliance) -> None:
    """Builds without a builder share a cache in the registry by its name; two of other names do not."""
    files: Files = {**BASE, "Dockerfile": BUSYBOX + "RUN echo shared > /file\n"}
    for scope, cached in (("team/a", False), ("team/a", True), ("team/b", False)):
        done, log = await build(appliance, files, cache_scope=scope, image_name="team/scoped")
        assert done["status"] == "ready", (done["error"], log)
        assert any(line.endswith("CACHED") for line in log) is cached, (scope, log)
    tags = (await appliance.ask("GET", "/v2/cache/team/a/tags/list")).json()["tags"]
    assert tags == ["latest"]


async def test_ten_uploads_and_two_builds_at_once(directory: Path) -> None:
    """All of them end well, and what passes through the server takes no memory in it."""
    uploads, size, piece = 10, 24 << 20, 1 << 20
    async with building(directory) as appliance:
        before = forget_peak(appliance.pid)
        done = list[Any]()

        async def one_build(number: int) -> None:
            files: Files = {
                **BASE,
                "big": os.urandom(size),
                "Dockerfile": BUSYBOX + f"COPY big /{number}\nCMD echo {number}\n",
            }
            made, log = await build(appliance, files, image_name=f"many/build{number}")
            done.append(made)
            assert made["status"] == "ready", (made["error"], log)

        async def one_upload(number: int) -> None:
            data = os.urandom(size)
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            at = (await appliance.ask("POST", f"/v2/many/{number}/blobs/uploads/")).headers["location"]
            for begin in range(0, size, 8 * piece):
                sent = await appliance.ask("PATCH", at, content=data[begin : begin + 8 * piece])
                assert sent.status_code == 202, sent.text
            assert (await appliance.ask("PUT", at, params={"digest": digest})).status_code == 201
            found = await appliance.ask(
                "GET", f"/v2/many/{number}/blobs/{digest}", headers={"Range": f"bytes={piece}-"}
            )
            assert found.status_code == 206 and found.content == data[piece:]

        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(one_build, number)
            for number in range(uploads):
                nursery.start_soon(one_upload, number)
        grown = peak_memory(appliance.pid) - before
        print(f"the server had {before >> 20} MB, and {grown >> 20} MB more while it received {12 * size >> 20} MB")
        assert grown < 64 << 20
        for number in range(2):
            assert str(number) in await output_of(appliance, f"many/build{number}", f"many{number}")


async def test_cancelled_limited_and_killed(directory: Path) -> None:
    """A running build ends at once, at its limit, and with its VMM or server; the next one succeeds, with the cache."""
    forever: Files = {**BASE, "Dockerfile": BUSYBOX + "RUN echo begun && sleep 100000\n"}
    async with building(directory) as appliance:
        await appliance.post("/builders", {"id": "b", "disk_size_gb": 2})
        first = await request(appliance, forever, builder_id="b")
        await wait_line(appliance, first["id"], "begun")
        assert (await appliance.ask("DELETE", f"/builds/{first['id']}")).status_code == 204
        assert [e["status"] for e in await follow(appliance, first["id"]) if e["type"] == "status"][-1] == "cancelled"

        second = await request(appliance, forever, builder_id="b")
        await wait_line(appliance, second["id"], "begun")
        appliance.kill()
        await appliance.start()
        await wait_line(appliance, second["id"], "begun", times=2)
        log = [event["content"] for event in await lines_so_far(appliance, second["id"])]
        assert any("begins again" in line for line in log) and any(line.endswith("CACHED") for line in log), log
        await appliance.delete(f"/builds/{second['id']}")

        third = await request(appliance, forever, builder_id="b")
        await wait_line(appliance, third["id"], "begun")
        [vmm] = appliance.vmms()
        os.kill(vmm, signal.SIGKILL)
        done, log = await finished(appliance, third)
        assert done["status"] == "failed" and done["error"], (done, log)
        print(f"a build whose VMM is killed: {done['error']}")

        done, log = await build(appliance, forever, builder_id="b", timeout_seconds="60")
        assert done["status"] == "failed" and "60 s" in done["error"], (done, log)
        done, log = await build(appliance, {**BASE, "Dockerfile": BUSYBOX}, builder_id="b", image_name="a/b")
        assert done["status"] == "ready" and any(line.endswith("CACHED") for line in log), (done, log)


async def lines_so_far(appliance: Appliance, build_id: str) -> list[Any]:
    text = (await appliance.ask("GET", f"/builds/{build_id}/events")).text
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


async def wait_line(appliance: Appliance, build_id: str, word: str, *, times: int = 1) -> None:
    with trio.fail_after(600):
        while True:
            found = [
                one for one in await lines_so_far(appliance, build_id) if one.get("content", "").endswith(f" {word}")
            ]
            if len(found) >= times:
                return
            build = await appliance.get(f"/builds/{build_id}")
            assert build["status"] in ("queued", "building"), build["error"]
            await trio.sleep(1)
