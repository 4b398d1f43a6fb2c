"""Instructions that a request by an ingress costs outside the kernel, against nginx: exact where CPU time is not, since
neither the processor's model nor what else runs on it counts. Callgrind counts them (some fifty times slower), in the
processes of bench_ingress and under its load; the engine is not confined, which valgrind does not survive.

    python -m tests.bench.bench_instructions [round milliseconds]

The files that callgrind leaves in build/callgrind say where they went: callgrind_annotate FILE.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.bench.bench_egress import HERE, TESTS, tree
from tests.bench.bench_ingress import IngressBench
from tests.bench.harness import Result

ROUND_MS = 4000
OUTPUT = HERE.parents[1] / "build" / "callgrind"


class CountingBench(IngressBench):
    under = ("valgrind", "--tool=callgrind", "--dump-before=nothing", f"--callgrind-out-file={OUTPUT}/%p")
    logs = (False,)
    tests = {name: ([path, "2"], more) for name, ((path, _), more) in TESTS.items()}
    """Few connections: what is under way at the end of a round is counted, but not as a request."""

    def cost(self, proxy: str, test: str) -> Callable[[], float]:
        load = self.load(proxy, test)
        counted = self.counted(proxy)

        def measure() -> float:
            control("--zero", counted)
            requests = load()
            control("--dump", counted)
            newest = max(OUTPUT.glob(f"{counted}.*"), key=lambda path: int(path.suffix[1:]))
            kept = newest.rename(OUTPUT / f"{proxy.split()[0]}-{test.replace(' ', '-').replace(',', '')}")
            found = re.search(r"^totals: (\d+)", kept.read_text(), re.MULTILINE)
            assert found is not None
            return int(found[1]) / requests

        return measure

    def counted(self, proxy: str) -> int:
        """The process under valgrind: the proxy, or the engine below our server."""
        return next(
            pid for pid in reversed(tree(self.pids[proxy][0])) if "callgrind" in Path(f"/proc/{pid}/exe").resolve().name
        )


def control(what: str, pid: int) -> None:
    subprocess.run(["callgrind_control", what, str(pid)], check=True, capture_output=True)


def run(round_ms: int = ROUND_MS) -> list[Result]:
    if not shutil.which("nginx") or not shutil.which("valgrind"):
        return []
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for old in OUTPUT.iterdir():
        old.unlink()
    results = []
    with ExitStack() as stack:
        bench = CountingBench(stack, round_ms)
        for test in TESTS:
            ours, theirs = bench.cost("hypeman without log", test), bench.cost("nginx", test)
            for warm in (ours, theirs):
                warm()
            results.append(Result(f"ingress, {test}", ours(), "instructions/request", "nginx", theirs()))
    return results


if __name__ == "__main__":
    for result in run(*(int(each) for each in sys.argv[1:])):
        print(
            f"{result.name:50} {result.value:12.0f}  {result.peer} {result.peer_value:12.0f}  ratio {result.ratio:.2f}"
        )
