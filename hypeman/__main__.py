"""``python -m hypeman``, and where the bundled program begins."""

from __future__ import annotations

import sys


def main() -> None:
    if sys.argv[1:2] == ["@image-worker"]:  # a helper process of our own, see images/worker.py
        from hypeman.images.worker import main as work

        sys.exit(work(int(sys.argv[2])))
    from hypeman.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
