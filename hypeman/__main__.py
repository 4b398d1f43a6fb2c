"""``python -m hypeman``, and the entry point of the bundled program."""

from __future__ import annotations

import sys


def main() -> None:
    if sys.argv[1:2] == ["@image-worker"]:  # a helper process, see images/worker.py
        from hypeman.images.worker import main as work

        sys.exit(work(int(sys.argv[2])))
    if sys.argv[1:2] == ["@engine"]:  # the data plane, see egress/engine.py
        from hypeman.egress.engine import main as carry

        sys.exit(carry(int(sys.argv[2])))
    from hypeman.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
