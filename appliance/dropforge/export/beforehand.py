"""What about a job's exports can be refused before its long work starts, and the importance matrix it brings along."""

from __future__ import annotations

import shutil

from dropforge.errors import DataError, ExportError
from dropforge.export.precheck import precheck
from dropforge.export.user_imatrix import check_imatrix
from dropforge.locate import data_locator
from dropforge.models.source import ModelSource
from dropforge.paths import DataRoot, RunFolder
from dropforge.pinned import pinned
from dropforge.spec import Spec


def refuse_beforehand(
    spec: Spec, kinds: tuple[str, ...], *, run: RunFolder, root: DataRoot, source: ModelSource
) -> None:
    """Raise for the first of `kinds` that cannot be made, and for a bad `imatrix`.

    Codes: precheck's, and export-imatrix. An importance matrix that is good is kept in the run folder, so that
    every later export of this job has it.
    """
    precheck(
        kinds, base=source.path, use_dora=spec.adapter.use_dora, modules_to_save=spec.adapter.modules_to_save
    )  # fmt: skip
    if spec.imatrix is not None and not run.imatrix.exists():
        _keep_imatrix(spec.imatrix, run=run, root=root, source=source)


def _keep_imatrix(path: str, *, run: RunFolder, root: DataRoot, source: ModelSource) -> None:
    into = run.path / "cache" / "imatrix"
    try:
        found = pinned(data_locator(root, run), below=root.path, into=into)(path)
    except DataError as error:
        problem = error.problems[0]
        raise ExportError(
            f"the importance matrix: {problem.what}", code="export-imatrix", where="imatrix", why=problem.why,
            fix=problem.fix,
        ) from error  # fmt: skip
    check_imatrix(found, base=source.path)
    temporary = run.imatrix.with_name(f".tmp-{run.imatrix.name}")
    shutil.copyfile(found, temporary)
    temporary.replace(run.imatrix)
    shutil.rmtree(into, ignore_errors=True)
