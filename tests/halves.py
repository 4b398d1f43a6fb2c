"""``python -m tests.halves``: the whole suite as two runs of pytest side by side, one with guests and one without.

A guest under emulation keeps one processor busy and the test waits for it, so that two runs take little longer than the
longer of them. Tests of one half share nothing with those of the other. With paths among the arguments, or on a machine
with one processor, it is one run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WITH_GUESTS = ("tests/real", "tests/guest", "tests/walls", "tests/habits")
LOG = ROOT / "build" / "test-without-guests.log"


def main(arguments: list[str]) -> int:
    """The exit code of pytest; of two runs, the one of the run that failed."""
    pytest = [sys.executable, "-m", "pytest", "-q", *arguments]
    if any((ROOT / argument.partition("::")[0]).exists() for argument in arguments) or (os.cpu_count() or 1) < 2:
        return subprocess.run(pytest, cwd=ROOT, check=False).returncode
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("wb") as log:
        ignored = [f"--ignore={path}" for path in WITH_GUESTS]
        other = subprocess.Popen([*pytest, *ignored], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        print(f"== with guests; the others meanwhile, into {LOG.relative_to(ROOT)}", flush=True)
        try:
            code = subprocess.run([*pytest, *WITH_GUESTS], cwd=ROOT, check=False).returncode
            other.wait()
        finally:
            if other.poll() is None:
                other.kill()
                other.wait()
    print("== without guests", flush=True)
    sys.stdout.buffer.write(LOG.read_bytes())
    sys.stdout.flush()
    return code or other.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
