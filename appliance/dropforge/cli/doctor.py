"""doctor: look at this machine, name every cause, say how to mend it. Exit status 3 when a job could not run."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict

from dropforge.cli.output import data_root, emit
from dropforge.doctor.examination import examine
from dropforge.hardware import probe
from dropforge.settings import settings


def doctor(arguments: Namespace) -> int:
    root = data_root(arguments, create=True)
    findings = list(examine(root, probe(root.path), device=settings().device))
    signs = {"ok": "ok   ", "note": "note ", "fault": "FAULT"}
    lines = [f"{signs[f.level]}  {f.what}" + (f"\n         fix: {f.fix}" if f.fix else "") for f in findings]
    faults = sum(f.level == "fault" for f in findings)
    lines.append(
        "A job can run here." if not faults else f"{faults} fault(s): no job can run here before they are mended."
    )
    emit(arguments, {"findings": [asdict(f) for f in findings], "faults": faults}, "\n".join(lines))
    return 3 if faults else 0
