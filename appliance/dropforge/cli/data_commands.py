"""data report: what is in a file and what a model would learn from it, before anything is trained."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dropforge.cli.output import data_root, emit
from dropforge.errors import DataError, Reason

if TYPE_CHECKING:
    from dropforge.locate import Locate
    from dropforge.spec import Spec

SPECS = {".yaml", ".yml", ".toml"}
DEFAULT_MODEL = "builtin:tiny-llama"
WHOLE = 4_194_304
"""Longest row a spec may ask for: nothing is cut unless --max-length says so."""


def data(arguments: Namespace) -> int:
    """The only action is `report`."""
    from dropforge.data import prepare_data
    from dropforge.data.report_png import write_histogram
    from dropforge.data.report_text import report_text
    from dropforge.models.source import resolve_model
    from dropforge.models.tokenizer import load_tokenizer

    spec, locate = _spec(arguments)
    root = data_root(arguments)
    source = resolve_model(spec.model, root=root)
    tokenizer, choice = load_tokenizer(source.path, template=spec.data.template)
    try:
        prepared = prepare_data(spec, tokenizer, locate=locate)
    except DataError as error:
        if error.code != "data-format-later":
            raise
        try:
            return _examples(arguments, spec, locate)
        except DataError:
            raise error from None  # not examples either: images, say
    report = prepared.report
    if arguments.png:
        write_histogram(arguments.png, report.histogram)
    colour = not arguments.json and (arguments.colour or sys.stdout.isatty())
    template = "its own chat template" if choice.name == "model" else f"the chat template {choice.name}"
    said = f"the tokenizer of {spec.model.id} and {template}"
    if spec.model.id == DEFAULT_MODEL and not arguments.model:
        said += "; name the model you will train with --model"
    text = report_text(report, tokenizer=said, colour=colour)
    emit(arguments, json.loads(json.dumps(asdict(report))), text)
    return 0


def _examples(arguments: Namespace, spec: Spec, locate: Locate) -> int:
    """Preferences and prompts cannot be learnt from as answers, but they can be looked at."""
    from dropforge.data.preferences import prepare_examples

    lines: list[str] = []
    found = prepare_examples(spec.data, spec.data.train, locate=locate, log=lines.append)
    lines += [f"rows with something to learn: {len(found.rows):,}"]
    lines += [f"dropped {count:,}: {why}" for why, count in found.dropped.items()]
    lines += [f"  for example {where}" for where, _ in found.first[:3]]
    lines += ["the first row:", json.dumps(found.rows[0], ensure_ascii=False, indent=2)]
    value = {"kind": found.kind, "rows": len(found.rows), "dropped": dict(found.dropped), "first": found.rows[0]}
    emit(arguments, value, "\n".join(lines))
    return 0


def _spec(arguments: Namespace) -> tuple[Spec, Locate]:
    """A spec file says everything itself; data files get a spec made around them."""
    from dropforge.cli.spec_commands import read_spec_file
    from dropforge.locate import data_locator
    from dropforge.spec import Spec

    files: list[Path] = arguments.files
    if len(files) == 1 and files[0].suffix.lower() in SPECS:
        _, checked = read_spec_file(files[0])
        beside = files[0].absolute().parent
        return checked.resolved, data_locator(data_root(arguments), beside=beside)
    # What is not a file here may be a data set of the hub, whose name must stay whole.
    missing = next((file for file in files if not file.exists() and file.is_absolute()), None)
    if missing is not None:
        raise _missing(missing)
    names = {file.name if file.exists() else str(file): file for file in files}
    if len(names) < len(files):
        names = {f"{index}/{file.name}": file for index, file in enumerate(files)}
    section = {"train": [{"path": name} for name in names], "template": arguments.template, "format": arguments.format}
    spec = Spec.model_validate(
        {
            "version": 1, "name": "report", "export": ["adapter"], "data": section,
            "model": {"id": arguments.model or DEFAULT_MODEL, "max_seq_length": arguments.max_length or WHOLE},
        }
    )  # fmt: skip

    def locate(name: str) -> Path:
        path = names[name]
        if not path.exists():
            raise _missing(path)
        return path

    return spec, locate


def _missing(path: Path) -> DataError:
    return DataError(
        f"there is no file {str(path)!r}", code="data-missing", where=str(path), fix="check the path",
        reason=Reason.MISSING_INPUT,
    )  # fmt: skip
