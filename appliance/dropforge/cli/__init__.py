"""The `dropforge` command: parse, call, print. No product logic, and nothing heavy imported before a command runs.

Exit status: 0 ok, 1 the job failed, 2 bad input, 3 this machine cannot do it, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence

from dropforge import __version__
from dropforge.cli.commands import COMMANDS, Command


def build_parser() -> argparse.ArgumentParser:
    """Every command and option; docs/reference/cli.md is generated from this."""
    parser = argparse.ArgumentParser(
        prog="dropforge",
        description="Drop a job in a folder, get a trained model out.",
        epilog="First job: docs/guides/first-job.md. Spec: docs/reference/spec.md.",
    )
    parser.add_argument("--version", action="version", version=f"dropforge {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = subparsers.add_parser(command.name, help=command.help, description=command.help)
        for flags, options in command.arguments:
            sub.add_argument(*flags, **options)
        sub.add_argument("--json", action="store_true", help="print JSON for programs")
        sub.set_defaults(entry=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    from dropforge.errors import DropforgeError

    command: Command = arguments.entry
    try:
        module = importlib.import_module(f"dropforge.cli.{command.module}")
        return int(getattr(module, command.function)(arguments))
    except DropforgeError as error:
        if arguments.json:
            print(json.dumps({"error": error.as_dict()}, ensure_ascii=False))
        else:
            print(error, file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader went away (`dropforge logs ID | head`); close quietly instead of failing at exit.
        sys.stderr.close()
        return 0
