"""Specs checked many per child process, so that a flood of files costs one start of Python per batch.

The child answers spec by spec, each under its own limit of CPU time. When one kills it, that spec is checked again in a
child of its own (which settles its verdict) and the rest goes on in a new batch: a hostile file costs others nothing.
"""

from __future__ import annotations

import base64
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import IO, Any

from dropforge.errors import EnvironmentFault, SpecError
from dropforge.files import sha256_bytes
from dropforge.spec_check import (
    CPU_SECONDS,
    MEMORY_BYTES,
    WALL_SECONDS,
    CheckedSpec,
    answer,
    check_in_child,
    read_answer,
)

CheckSpec = Callable[..., CheckedSpec]
BATCH_SECONDS = 8.0
"""A thousand files that each keep a child as long as they can would hold up the daemon for an hour."""
LOOK_SECONDS = 0.2
SpecFile = tuple[bytes, str]
"""Bytes of a spec, and the name whose ending says how to parse it."""
_COMMAND = (sys.executable, "-P", "-m", "dropforge.daemon.spec_batch")


class SpecChecker:
    """Checks specs, on demand or ahead of it.

    Args:
        check: replaces the limited children (tests); then nothing is done ahead.
    """

    def __init__(self, check: CheckSpec = check_in_child) -> None:
        self._check = check
        self._ahead: dict[tuple[str, str], CheckedSpec | SpecError] = {}
        self._child: Child | None = None

    def get_ready(self) -> None:
        """Specs will come in a moment: start the child for them."""
        if self._child is None and self._check is check_in_child:
            with suppress(OSError):  # whoever has specs meets it again, and says so
                self._child = Child()

    def close(self) -> None:
        """No specs will come."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def ahead(self, specs: Sequence[SpecFile]) -> int:
        """Check `specs` in one go; the verdicts wait for `check` until the next call of this.

        Returns how many, from the first, `check` can be asked for now; for the others there was no time.
        """
        keys = [_key(*spec) for spec in specs]
        self._ahead = {key: self._ahead[key] for key in keys if key in self._ahead}
        unknown = [spec for spec, key in zip(specs, keys, strict=True) if key not in self._ahead]
        if self._check is check_in_child and len(unknown) > 1:
            try:
                verdicts = check_batch(unknown, child=self._child)
            finally:
                self.close()
            self._ahead |= {_key(*spec): verdict for spec, verdict in zip(unknown, verdicts, strict=False)}
            if len(verdicts) < len(unknown):
                return next(number for number, key in enumerate(keys) if key not in self._ahead)
        return len(specs)

    def check(self, raw: bytes, *, filename: str) -> CheckedSpec:
        """Raises SpecError with every problem found."""
        verdict = self._ahead.get(_key(raw, filename))
        if verdict is None:
            return self._check(raw, filename=filename)
        if isinstance(verdict, SpecError):
            raise verdict
        return verdict


def check_batch(
    specs: Sequence[SpecFile],
    *,
    child: Child | None = None,
    wall_seconds: float = WALL_SECONDS,
    seconds: float = BATCH_SECONDS,
) -> list[CheckedSpec | SpecError]:
    """One verdict per spec, in order, whatever the specs do to the child; fewer when time runs out.

    Args:
        child: one that was started ahead; it is used up.
        wall_seconds: so long may one child take.
        seconds: after this time nothing more is begun, as long as there is one verdict.
    """
    verdicts: list[CheckedSpec | SpecError] = []
    until = time.monotonic() + seconds
    while len(verdicts) < len(specs):
        verdicts += [_verdict(value) for value in _ask_child(specs[len(verdicts) :], wall_seconds, child)]
        child = None
        if verdicts and time.monotonic() >= until:
            break
        if len(verdicts) < len(specs):
            try:
                verdicts.append(_alone(specs[len(verdicts)]))
            except EnvironmentFault:  # no verdict on the spec; whoever asks for one tries again and is told
                break
    return verdicts


def _ask_child(specs: Sequence[SpecFile], wall_seconds: float, child: Child | None) -> list[dict[str, Any]]:
    """Answers up to the first spec that the child did not survive."""
    with child or Child() as asked:
        return asked.answers(specs, wall_seconds)


class Child:
    """A limited process that has imported everything, which takes longer than hundreds of specs, and waits for them.

    It ends by itself when this process does.
    """

    def __init__(self) -> None:
        with ExitStack() as undo:
            self._questions = undo.enter_context(tempfile.TemporaryFile())
            self._answers = undo.enter_context(tempfile.TemporaryFile())
            go, self._go = os.pipe()
            undo.callback(os.close, self._go)
            try:
                self._process = subprocess.Popen(
                    (*_COMMAND, str(go)), stdin=self._questions, stdout=self._answers, stderr=subprocess.DEVNULL,
                    pass_fds=(go,), preexec_fn=_limit,
                )  # fmt: skip
            finally:
                os.close(go)
            self._files = undo.pop_all()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._files.close()

    def answers(self, specs: Sequence[SpecFile], wall_seconds: float) -> list[dict[str, Any]]:
        """Can be asked once."""
        lines = (json.dumps({"raw": base64.b64encode(raw).decode(), "filename": name}) + "\n" for raw, name in specs)
        self._questions.writelines(line.encode() for line in lines)
        self._questions.seek(0)  # for both: it is one open file
        with suppress(BrokenPipeError):  # it is dead, and answers nothing
            os.write(self._go, b"!")
        _wait(self._process, self._answers, wall_seconds)
        self._answers.seek(0)
        return [json.loads(line) for line in self._answers if line.endswith(b"\n")]


def _wait(child: subprocess.Popen[bytes], answers: IO[bytes], wall_seconds: float) -> None:
    """Until the child has ended. It is killed when it has answered something and its time is over, or after all of it.

    On a machine so busy that starting took most of its time, it gets as much again.
    """
    began = time.monotonic()
    enough = wall_seconds
    while (passed := time.monotonic() - began) < min(enough, wall_seconds):
        if enough == wall_seconds and os.fstat(answers.fileno()).st_size:
            enough = max(BATCH_SECONDS, 2 * passed)
        with suppress(subprocess.TimeoutExpired):
            child.wait(min(LOOK_SECONDS, wall_seconds))
            return
    child.kill()
    child.wait()


def _alone(spec: SpecFile) -> CheckedSpec | SpecError:
    raw, name = spec
    try:
        return check_in_child(raw, filename=name)
    except SpecError as error:
        return error


def _verdict(value: dict[str, Any]) -> CheckedSpec | SpecError:
    try:
        return read_answer(value)
    except SpecError as error:
        return error


def _key(raw: bytes, filename: str) -> tuple[str, str]:
    return sha256_bytes(raw), filename


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


_ANY = b"version: 1\nname: any\nmodel: builtin:tiny-llama\ndata: any.jsonl\nexport: [adapter]\n"


def _child() -> None:
    answer(_ANY, filename="any.yaml")  # imports what is needed
    if not os.read(int(sys.argv[1]), 1):
        return  # nobody asks any more
    for line in sys.stdin:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        allowed = int(usage.ru_utime + usage.ru_stime) + 1 + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.RLIM_INFINITY))
        question = json.loads(line)
        said = answer(base64.b64decode(question["raw"]), filename=question["filename"])
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _child()
