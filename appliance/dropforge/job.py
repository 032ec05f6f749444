"""One job, top to bottom: spec -> plan -> model -> data -> adapter -> recipe -> trained weights -> exports -> result.

Every stage leaves its product on disk before the next begins, so a job that is interrupted anywhere goes on from there:
training from the newest good checkpoint, exporting from the trained weights.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from dropforge.checkpoints import CheckpointStore
from dropforge.errors import CommandError, EnvironmentFault, Reason
from dropforge.events import RunLog
from dropforge.export import ExportReport, ExportRequest, export_all
from dropforge.export.base_license import license_of
from dropforge.export.base_weights import original_folders
from dropforge.export.beforehand import refuse_beforehand
from dropforge.export.precheck import with_projector
from dropforge.export.publish import publish_result, token_of
from dropforge.export.samples import EVAL_FILE, read_samples, write_samples
from dropforge.facts import data_facts, model_facts
from dropforge.files import TEMPORARY_PREFIX, read_json, rename_folder, write_json, write_text
from dropforge.hardware import GIB, probe
from dropforge.locate import Locate, data_locator
from dropforge.models.code_approval import resolve_approved
from dropforge.models.source import ModelSource
from dropforge.paths import DataRoot, RunFolder, refuse_links
from dropforge.pinned import pinned
from dropforge.plan import Plan, make_plan
from dropforge.results import TrainingRecord, finish_result, good_exports
from dropforge.spec import Spec
from dropforge.spec_check import check, to_yaml
from dropforge.states import State
from dropforge.stop import StopSignal


def run_job(run: RunFolder, *, root: DataRoot, attempt: int, log: RunLog, stop: StopSignal) -> State:
    """Do the job in `run` to its end.

    Returns:
        SUCCEEDED, or PARTIAL when the trained weights are good and some export failed.

    Raises:
        DropforgeError: with a code, a reason and what to do; JobStopped when `stop` asked for it.
    """
    seconds: dict[str, float] = {}
    started = time.monotonic()
    log.state(State.PREPARING, attempt=attempt)
    source = resolve_approved(read_spec(run).model, root=root, run=run)
    spec = pin_revision(run, source)
    log.event("model", id=source.id, revision=source.revision, kind=source.kind)
    token_of(spec, root)
    if not is_trained(run):
        refuse_beforehand(spec, asked_exports(spec, source), run=run, root=root, source=source)
        shutil.rmtree(root.result(spec.slug, run.id).path, ignore_errors=True)  # of weights that are no more
        train(spec, run=run, root=root, source=source, log=log, stop=stop, seconds=seconds)
    stop.raise_if_requested()

    log.state(State.EXPORTING)
    exporting = time.monotonic()
    reports = export(spec, kinds=asked_exports(spec, source), run=run, root=root, source=source, log=log)
    reports = published(spec, reports, run=run, root=root, source=source, log=log)
    seconds["exporting"] = time.monotonic() - exporting
    seconds["total"] = time.monotonic() - started

    result = root.result(spec.slug, run.id)
    refuse_links(result.path, below=root.path)
    finish_result(
        result, spec=spec, run=run, source=source, record=training_record(run), exports=reports, seconds=seconds,
        root=root,
    )  # fmt: skip
    log.event("result", path=str(result.path.relative_to(root.path)))
    log.progress(problems=[asdict(report.problem) for report in reports if report.problem])
    return State.SUCCEEDED if all(report.ok for report in reports) else State.PARTIAL


def train(
    spec: Spec, *, run: RunFolder, root: DataRoot, source: ModelSource, log: RunLog, stop: StopSignal,
    seconds: dict[str, float],
) -> None:  # fmt: skip
    """From a resolved spec to `run.trained`: the adapter (or the whole model), the tokenizer and a record."""
    import torch

    from dropforge.data import prepare_data
    from dropforge.fast.repairs import untrained_in
    from dropforge.fast_step.kernels import kernels_in
    from dropforge.models.load import attach_adapter, check_fit, load_model, save_trained
    from dropforge.models.plain_lora import initial_pairs
    from dropforge.models.tokenizer import load_tokenizer
    from dropforge.recipes import recipe
    from dropforge.recipes.inputs import TrainingInputs

    started = time.monotonic()
    locate = pinned(data_locator(root, run), below=root.path, into=run.path / "cache" / "input")
    plan = plan_job(spec, root=root, source=source, locate=locate)
    write_json(run.plan, plan.as_dict())
    for note in plan.notes:
        log.event("note", text=note)
    refuse_if_disk_too_small(plan)
    torch.set_num_threads(plan.cpu_threads)
    check_fit(source, adapter=spec.adapter, max_seq_length=spec.model.max_seq_length)

    tokenizer, template = load_tokenizer(source.path, template=spec.data.template)
    data = prepare_data(
        spec, tokenizer, locate=locate, log=lambda text: log.event("data", text=text), work=run.path / "cache",
        cache=root.cache / "tokens",
    )  # fmt: skip
    stop.raise_if_requested()
    model = load_model(source, plan=plan, vocab_size=len(tokenizer))
    model = attach_adapter(model, spec.adapter, seed=spec.train.seed, checkpointing=plan.gradient_checkpointing)
    initial = initial_pairs(model, init=spec.adapter.init_lora_weights)
    if line := untrained_in(data.train, model, tokenizer):
        log.event("note", text=f"{line}: adapter.modules_to_save: [embed_tokens, lm_head] trains them")
    seconds["preparing"] = time.monotonic() - started

    log.state(State.TRAINING)
    store = CheckpointStore(run.checkpoints)
    with kernels_in(model, plan, log) as kernels:
        summary = recipe(spec.method)(
            TrainingInputs(
                spec=spec,
                plan=plan,
                model=model,
                tokenizer=tokenizer,
                data=data,
                store=store,
                log=log,
                stop=stop,
                kernels=kernels,
            )  # fmt: skip
        )
    seconds["training"] = summary.seconds

    temporary = run.path / f"{TEMPORARY_PREFIX}trained"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_trained(model, tokenizer, adapter=spec.adapter, source=source, folder=temporary, initial=initial)
    record = TrainingRecord(
        plan=plan.as_dict(),
        summary=asdict(summary),
        data=asdict(data.report),
        template=asdict(template),
        seconds=dict(seconds),
    )
    write_samples(data.train, temporary)
    if data.eval is not None:
        write_samples(data.eval, temporary, file=EVAL_FILE)
    write_json(temporary / "record.json", json.loads(json.dumps(asdict(record))))
    rename_folder(temporary, run.trained)
    log.event("trained", steps=summary.steps, loss=summary.train_loss)
    del model
    gc.collect()


def export(
    spec: Spec, *, kinds: tuple[str, ...], run: RunFolder, root: DataRoot, source: ModelSource, log: RunLog
) -> tuple[ExportReport, ...]:
    """Make and verify the exports that are not there yet. Returns the reports of all, earlier ones included."""
    result = root.result(spec.slug, run.id)
    refuse_links(result.path, below=root.path)
    result.path.mkdir(parents=True, exist_ok=True)
    earlier = good_exports(result)
    is_lora = spec.adapter.type == "lora"
    request = ExportRequest(
        base_path=source.path,
        runs_code=source.runs_code,
        adapter=run.trained / "adapter" if is_lora else None,
        full=None if is_lora else run.trained / "full",
        tokenizer=run.trained / "tokenizer",
        name=spec.name,
        slug=spec.slug,
        kinds=tuple(kind for kind in kinds if kind not in earlier),
        result=result,
        work=run.path / "export",
        system=spec.data.system or training_record(run).data["system"],
        model_id=source.id,
        license=license_of(source.path),
        imatrix=run.imatrix if run.imatrix.exists() else None,
        originals=original_folders(source.id, base=source.path, root=root),
        samples=read_samples(run.trained),
        eval_samples=read_samples(run.trained, file=EVAL_FILE),
    )
    made = {report.kind: report for report in export_all(request, log=lambda text: log.event("export", text=text))}
    shutil.rmtree(request.work, ignore_errors=True)
    return tuple({**earlier, **made}.values())


def published(
    spec: Spec, reports: tuple[ExportReport, ...], *, run: RunFolder, root: DataRoot, source: ModelSource, log: RunLog
) -> tuple[ExportReport, ...]:
    """The reports, and one more when the spec asks for a push to the hub."""
    return publish_result(
        spec, result=root.result(spec.slug, run.id), source=source, record=training_record(run), reports=reports,
        root=root, log=lambda text: log.event("export", text=text),
    )  # fmt: skip


def asked_exports(spec: Spec, source: ModelSource) -> tuple[str, ...]:
    """The spec's exports, and what belongs to them: the adapter, which is what the training made, and a projector."""
    kinds = with_projector(spec.export, base=source.path)
    return kinds if spec.adapter.type == "full" or "adapter" in kinds else ("adapter", *kinds)


def export_more(
    root: DataRoot, job_id: str, kinds: tuple[str, ...], *, log: Callable[[str], None]
) -> tuple[ExportReport, ...]:
    """Make further exports of a job whose training has ended. Returns the reports of the asked kinds.

    Raises:
        CommandError: the job has not been trained yet.
        SpecError: an unknown kind.
    """
    run = root.run(job_id)
    if not is_trained(run):
        raise CommandError(f"job {job_id} has no trained weights yet", code="job-not-trained", fix="wait for it to end")
    value = json.loads(read_spec(run).model_dump_json()) | {"export": list(kinds), "imatrix": None}
    spec = check(json.dumps(value).encode(), filename="export.json").resolved
    source = resolve_approved(spec.model, root=root, run=run)
    asked = with_projector(spec.export, base=source.path)
    refuse_beforehand(spec, asked, run=run, root=root, source=source)
    started = time.monotonic()
    shown = _Printing(run, log)
    reports = export(spec, kinds=asked, run=run, root=root, source=source, log=shown)
    reports = published(spec, reports, run=run, root=root, source=source, log=shown)
    finish_result(
        root.result(spec.slug, run.id),
        spec=read_spec(run),
        run=run,
        source=source,
        record=training_record(run),
        exports=reports,
        seconds={"exporting": time.monotonic() - started},
        root=root,
    )
    return tuple(report for report in reports if report.kind in asked)


class _Printing(RunLog):
    """A RunLog that also prints its export lines."""

    def __init__(self, run: RunFolder, show: Callable[[str], None]) -> None:
        super().__init__(run)
        self._show = show

    def event(self, action: str, **details: Any) -> None:
        super().event(action, **details)
        self._show(str(details.get("text", action)))


def training_record(run: RunFolder) -> TrainingRecord:
    return TrainingRecord(**read_json(run.trained / "record.json"))


def read_spec(run: RunFolder) -> Spec:
    """The resolved spec of a run; it was checked at intake, and is checked again because people edit files."""
    return check(run.spec_resolved.read_bytes(), filename=run.spec_resolved.name).resolved


def pin_revision(run: RunFolder, source: ModelSource) -> Spec:
    """Write the exact model commit into spec.resolved.yaml, so that the run can be repeated from it alone."""
    spec = read_spec(run)
    if source.kind != "hub" or spec.model.revision == source.revision:
        return spec
    pinned = spec.model_copy(update={"model": spec.model.model_copy(update={"revision": source.revision})})
    write_text(run.spec_resolved, to_yaml(pinned))
    return pinned


def plan_job(spec: Spec, *, root: DataRoot, source: ModelSource, locate: Locate) -> Plan:
    """The plan with the model at hand."""
    return make_plan(
        spec,
        hardware=probe(root.path),
        model=model_facts(spec.model, folder=source.path),
        data=data_facts(spec.data, locate),
    )


def refuse_if_disk_too_small(plan: Plan) -> None:
    """Raises EnvironmentFault with both numbers when the job would fill the disk."""
    if plan.disk_needed is not None and plan.disk_needed > plan.disk_free:
        raise EnvironmentFault(
            f"disk too small: about {plan.disk_needed / GIB:.2f} GiB needed, {plan.disk_free / GIB:.2f} GiB free",
            code="disk-too-small",
            where="the data root's file system",
            reason=Reason.DISK,
            fix="free space or ask for fewer exports, then `dropforge retry`",
        )


def is_trained(run: RunFolder) -> bool:
    """True once training has ended and its weights are in place; then only exports are left to do."""
    return (run.trained / "record.json").exists()
