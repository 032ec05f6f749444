"""`python -m dropforge` and the `dropforge` command."""

from __future__ import annotations

import sys


def main() -> int:
    from dropforge.cli import main as cli_main

    return cli_main()


if __name__ == "__main__":
    sys.exit(main())
