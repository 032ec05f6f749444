"""The table of commands: name, help, arguments, and the function that runs it. Frozen by tests/cli/test_commands.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

Argument = tuple[tuple[str, ...], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Command:
    """`function` lives in dropforge.cli.`module` and takes the parsed arguments, returns the exit status."""

    name: str
    help: str
    module: str
    function: str
    arguments: tuple[Argument, ...] = ()


def _arg(*flags: str, **options: Any) -> Argument:
    return flags, options


_SPEC = _arg("spec", type=Path, metavar="SPEC", help="job spec: .yaml, .yml, .json or .toml")
_JOB = _arg("job", metavar="JOB", help="job id, the start of one, or a job name (its newest job)")
_DATA = _arg("--data", type=Path, metavar="DIR", help="data root (default: DROPFORGE_DATA)")

COMMANDS = (
    Command(
        name="validate", help="check a spec and print every problem at once", module="spec_commands",
        function="validate", arguments=(_SPEC, _DATA),
    ),
    Command(
        name="plan", help="print what a job would do: memory, disk, steps, kernels; no GPU needed",
        module="spec_commands", function="plan", arguments=(_SPEC, _DATA),
    ),
    Command(
        name="submit", help="put a spec, with the data beside it, into the inbox", module="queue_commands",
        function="submit", arguments=(_SPEC, _DATA, _arg("--wait", action="store_true", help="follow it to its end")),
    ),
    Command(
        name="run", help="do one job here and now, in the foreground", module="run_command", function="run",
        arguments=(_SPEC, _DATA),
    ),
    Command(
        name="watch", help="run the daemon in the foreground on the data root", module="watch_command",
        function="watch", arguments=(_DATA,),
    ),
    Command(
        name="status", help="list the jobs, or show one", module="queue_commands", function="status",
        arguments=(_arg("job", nargs="?", metavar="JOB", help="job id, the start of one, or a job name"), _DATA),
    ),
    Command(
        name="logs", help="print a job's events and log", module="queue_commands", function="logs",
        arguments=(_JOB, _DATA, _arg("-f", "--follow", action="store_true", help="go on until the job ends")),
    ),
    Command(name="cancel", help="stop a job, or take it out of the queue", module="queue_commands", function="cancel",
            arguments=(_JOB, _DATA)),
    Command(name="retry", help="run a failed, held or cancelled job again; only the exports of a partial one",
            module="queue_commands", function="retry", arguments=(_JOB, _DATA)),
    Command(
        name="release", help="let a held job go on", module="queue_commands", function="release",
        arguments=(
            _JOB, _arg("--trust-code", metavar="FINGERPRINT", help="approve the code that came with its model; the "
                       "fingerprint, or 12 of its digits, is in the job's message"), _DATA,
        ),
    ),
    Command(
        name="export", help="make more exports from a finished job", module="result_commands", function="export",
        arguments=(
            _JOB, _arg("kinds", nargs="+", metavar="KIND", help="merged, ollama, gguf:q4_k_m, ... as in a spec"), _DATA,
        ),
    ),
    Command(
        name="data", help="report: what is in a data file, what a model would learn from it, and what is wrong with it",
        module="data_commands", function="data",
        arguments=(
            _arg("action", choices=("report",), help="the only one so far"),
            _arg("files", nargs="+", type=Path, metavar="FILE", help="data files or folders, or a job spec"),
            _arg("--model", metavar="ID", help="count with this model's tokenizer and chat template"),
            _arg("--template", default="auto", metavar="NAME", help="chat template (default: the model's own)"),
            _arg("--format", default="auto", metavar="FORMAT", help="format of the rows (default: detected)"),
            _arg("--max-length", type=int, metavar="N", help="cut rows to so many tokens"),
            _arg("--png", type=Path, metavar="FILE", help="draw the histogram of lengths"),
            _arg("--colour", action="store_true", help="colour what is learnt also when not in a terminal"),
            _DATA,
        ),
    ),
    Command(
        name="chat", help="talk to a result", module="result_commands", function="chat",
        arguments=(
            _arg("result", metavar="RESULT", help="job id or name, or a result folder"),
            _arg("--prompt", action="append", metavar="TEXT", help="ask this and print the answer (repeatable)"),
            _arg("--image", action="append", metavar="FILE", help="a PNG or JPEG shown with every --prompt"),
            _arg("--system", metavar="TEXT", help="system message"),
            _arg("--max-tokens", type=int, default=256, metavar="N", help="longest answer (default 256)"),
            _arg("--temperature", type=float, default=0.0, metavar="T", help="0 = greedy (default)"),
            _DATA,
        ),
    ),
    Command(name="doctor", help="check this machine and say how to mend what is missing", module="doctor",
            function="doctor", arguments=(_DATA,)),
    Command(name="schema", help="print the JSON Schema of the spec", module="spec_commands", function="schema"),
    Command(name="models", help="list the models that are at hand", module="spec_commands", function="models",
            arguments=(_DATA,)),
)  # fmt: skip
