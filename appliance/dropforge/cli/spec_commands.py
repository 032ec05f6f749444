"""validate, plan, schema, models: what can be said about a spec without running it. Never imports torch."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from dropforge.cli.output import data_root, emit, gib, table
from dropforge.errors import CommandError

if TYPE_CHECKING:
    from dropforge.spec_check import CheckedSpec


def read_spec_file(path: Path) -> tuple[bytes, CheckedSpec]:
    """The bytes and the checked spec. Raises CommandError for a file that is not there, SpecError for a bad one."""
    from dropforge.spec_check import check

    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CommandError(
            f"cannot read {str(path)!r}: {error.strerror}", code="spec-unreadable", fix="give the path of a spec file"
        ) from None
    return raw, check(raw, filename=path.name)


def validate(arguments: Namespace) -> int:
    _, checked = read_spec_file(arguments.spec)
    spec = checked.resolved
    exports = ", ".join(spec.export)
    text = f"{arguments.spec.name} is valid: {spec.name!r} trains {spec.model.id} by {spec.method}, exports {exports}"
    emit(arguments, {"valid": True, "resolved": json.loads(spec.model_dump_json())}, text)
    return 0


def plan(arguments: Namespace) -> int:
    from dropforge.facts import data_facts, local_model_folder, model_facts
    from dropforge.hardware import probe
    from dropforge.locate import data_locator
    from dropforge.plan import make_plan

    _, checked = read_spec_file(arguments.spec)
    spec, root = checked.resolved, data_root(arguments)
    facts = model_facts(spec.model, folder=local_model_folder(spec.model, root))
    locate = data_locator(root, beside=arguments.spec.absolute().parent)
    made = make_plan(spec, hardware=probe(root.path), model=facts, data=data_facts(spec.data, locate))
    parameters = f"{made.parameters:,}" if made.parameters else "?"
    trained = f"{made.trainable_parameters:,}" if made.trainable_parameters else "?"
    rows = [
        ("model", f"{spec.model.id}, {parameters} parameters ({facts.source})"),
        ("trains", f"{trained} parameters ({spec.adapter.type}), {spec.method}"),
        ("device", f"{made.device}, weights {made.weight_dtype}, arithmetic {made.compute_dtype}"),
        ("kernels", made.kernels),
        (
            "batch",
            f"{made.per_device_train_batch_size} rows x {made.gradient_accumulation_steps} accumulation steps, "
            f"up to {made.max_seq_length} tokens a row",
        ),
        ("optimizer", f"{made.optim}, learning rate {spec.train.learning_rate:g}, {spec.train.lr_scheduler_type}"),
        ("data", f"{made.rows if made.rows is not None else 'number of rows known after reading'} rows"),
        ("steps", f"{made.steps if made.steps is not None else '?'}"),
        ("memory", f"about {gib(made.memory_needed)} of {gib(made.memory_available)} available"),
        *(("", line.strip()) for line in made.memory_lines),
        ("disk", f"about {gib(made.disk_needed)} of {gib(made.disk_free)} free"),
        ("exports", ", ".join(made.exports)),
    ]
    notes = [("note", note) for note in made.notes]
    emit(arguments, made.as_dict(), table(rows + notes))
    return 0


def schema(arguments: Namespace) -> int:
    from dropforge.schema import spec_schema_text

    print(spec_schema_text(), end="")
    return 0


def models(arguments: Namespace) -> int:
    from dropforge.models.builtin import BUILTIN

    root = data_root(arguments)
    rows = [{"id": f"builtin:{name}", "where": "made on the spot"} for name in sorted(BUILTIN)]
    for config in sorted(root.models.rglob("config.json")):
        rows.append({"id": str(config.parent.relative_to(root.models)), "where": "models/"})
    text = table([(row["id"], row["where"]) for row in rows], header=("MODEL", "WHERE"))
    emit(arguments, rows, text + "\nAny other id is looked up on the Hugging Face hub.")
    return 0
