"""export, chat: what can be done with a finished job."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from dropforge.cli.output import data_root, emit, table
from dropforge.daemon.query import find_job
from dropforge.errors import CommandError
from dropforge.paths import DataRoot


def chat(arguments: Namespace) -> int:
    from dropforge.chat import answer, converse

    result = result_folder(data_root(arguments), arguments.result)
    options = {
        "max_tokens": arguments.max_tokens,
        "system": arguments.system,
        "temperature": arguments.temperature,
    }
    if not arguments.prompt and not arguments.image:
        return converse(result, **options)
    prompts = arguments.prompt or ["What does this picture show?"]
    answers = answer(result, prompts, images=tuple(map(Path, arguments.image or ())), **options)
    pairs = [{"prompt": prompt, "answer": text} for prompt, text in zip(prompts, answers, strict=True)]
    emit(arguments, pairs, "\n".join(answers))
    for prompt, text in zip(prompts, answers, strict=True):
        if not text.strip():
            print(f"{prompt!r}: the model ended its answer before the first word", file=sys.stderr)
    return 0


def result_folder(root: DataRoot, text: str) -> Path:
    """A result given as a folder, a job id or a job name. Raises CommandError when there is none."""
    as_path = Path(text)
    if (as_path / "provenance.json").exists():
        return as_path
    job = find_job(root, text)
    if job.result is None:
        raise CommandError(
            f"job {job.id} has no result yet",
            code="result-missing",
            why=f"it is {job.state.value}: {job.message or job.state.meaning}",
            fix=f"`dropforge status {job.id}` shows where it stands",
        )
    return job.result


def export(arguments: Namespace) -> int:
    from dropforge.job import export_more

    root = data_root(arguments)
    job = find_job(root, arguments.job)
    reports = export_more(
        root, job.id, tuple(arguments.kinds), log=lambda text: print(text, file=sys.stderr, flush=True)
    )
    rows = [
        (r.kind, "ok" if r.ok else "FAILED", r.path if r.ok else r.problem.what if r.problem else "") for r in reports
    ]
    emit(arguments, [asdict(report) for report in reports], table(rows))
    return 0 if all(report.ok for report in reports) else 1
