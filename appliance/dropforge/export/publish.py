"""The spec's `publish.hub`, after the exports: what is verified is pushed, and how that went is one more report.

What was pushed is written to hub.json in the result; a retry pushes again only when that failed or an export came
since.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dropforge.errors import DropforgeError, EnvironmentFault, Reason
from dropforge.export.base_license import license_of
from dropforge.export.hub_plan import HubUpload, plan_uploads
from dropforge.export.hub_push import Card, HubTarget, push
from dropforge.export.request import ExportReport
from dropforge.files import write_json
from dropforge.model_card import model_card
from dropforge.paths import DataRoot, ResultFolder
from dropforge.settings import secret_variable
from dropforge.spec import Spec

if TYPE_CHECKING:
    from dropforge.models.source import ModelSource
    from dropforge.results import TrainingRecord

KIND = "hub"
FILE = "hub.json"


def publish(
    result: ResultFolder, reports: tuple[ExportReport, ...], *, repo: str, target: HubTarget, card: Card,
    log: Callable[[str], None],
) -> ExportReport:  # fmt: skip
    """Push the good exports of `reports`, unless an earlier report among them says that just these were pushed."""
    exports = tuple(report for report in reports if report.kind != KIND)
    kinds = sorted(report.kind for report in exports if report.ok)
    earlier = next((report for report in reports if report.kind == KIND and report.ok), None)
    if earlier is not None and earlier.checks.get("kinds") == kinds and (result.path / FILE).exists():
        return earlier
    start = time.monotonic()
    try:
        done = push(plan_uploads(result, exports, repo=repo), target=target, card=card, log=log)
    except DropforgeError as error:
        log(f"{KIND} failed: {error.problems[0].what}")
        return ExportReport.failed(KIND, error, seconds=round(time.monotonic() - start, 3))
    path = result.path / FILE
    write_json(path, done)
    return ExportReport(
        kind=KIND, ok=True, path=FILE, bytes=path.stat().st_size, seconds=round(time.monotonic() - start, 3),
        checks={"kinds": kinds, "repositories": [entry["repo"] for entry in done], "dry_run": target.dry_run},
    )  # fmt: skip


def publish_result(
    spec: Spec, *, result: ResultFolder, source: ModelSource, record: TrainingRecord,
    reports: tuple[ExportReport, ...], root: DataRoot, log: Callable[[str], None],
) -> tuple[ExportReport, ...]:  # fmt: skip
    """`reports` with one more for the spec's `publish.hub`; just `reports` when it names no repository."""
    hub = spec.publish.hub
    if hub is None:
        return reports
    exports = tuple(report for report in reports if report.kind != KIND)

    def card(upload: HubUpload) -> str:
        return model_card(
            spec, source=source, record=record, exports=exports, relation=upload.relation,
            license_name=license_of(source.path),
        )  # fmt: skip

    target = HubTarget(private=hub.private, token=token_of(spec, root), dry_run=hub.dry_run)
    return (*exports, publish(result, reports, repo=hub.repo, target=target, card=card, log=log))


def token_of(spec: Spec, root: DataRoot) -> str | None:
    """The token named by `publish.hub.secret`: a file in secrets/, else the environment. None without a push.

    Raises EnvironmentFault (hub-auth) when a push needs one and there is none, before any work was done for nothing.
    """
    hub = spec.publish.hub
    if hub is None or hub.dry_run:
        return None
    path = root.secrets / hub.secret
    found = path.read_text(encoding="utf-8").strip() if path.is_file() else secret_variable(hub.secret)
    if not found and hub.secret == "HF_TOKEN":
        from huggingface_hub import get_token

        found = get_token()
    if not found:
        raise EnvironmentFault(
            "there is no token for the push to the hub", code="hub-auth", where="publish.hub", reason=Reason.AUTH,
            why=f"neither secrets/{hub.secret} nor the environment holds one",
            fix=f"write the token into secrets/{hub.secret}, then `dropforge retry`; or leave publish.hub out",
        )  # fmt: skip
    return found
