"""MODEL_CARD.md: what the model is, what it learnt from and how its exports were checked, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dropforge import __version__
from dropforge.spec import Spec

if TYPE_CHECKING:
    from dropforge.export import ExportReport
    from dropforge.models.source import ModelSource
    from dropforge.results import TrainingRecord


def model_card(spec: Spec, *, source: ModelSource, record: TrainingRecord, exports: tuple[ExportReport, ...]) -> str:
    """The card as Markdown with the hub's metadata header."""
    summary, data = record.summary, record.data
    adapter = "every weight" if spec.adapter.type == "full" else f"LoRA, rank {spec.adapter.r}"
    base = f"{source.id}@{source.revision}" if source.revision else source.id
    lines = [
        "---",
        f"base_model: {source.id}",
        "tags: [dropforge]",
        "---",
        f"# {spec.name}",
        "",
        f"Made by Dropforge {__version__} from `{base}` by {spec.method} ({adapter}).",
        "",
        "| | |",
        "|---|---|",
        f"| training rows | {data['rows']} ({data['trained_tokens']} tokens counted in the loss) |",
        f"| data format | {data['format']}: {data['format_reason']} |",
        f"| chat template | {record.template['name']}: {record.template['reason']} |",
        f"| steps, epochs | {summary['steps']}, {summary['epochs']} |",
        f"| training loss (mean over the run) | {summary['train_loss']:.4f} |",
    ]
    if summary["eval_loss"] is not None:
        lines.append(f"| evaluation loss (last) | {summary['eval_loss']:.4f} |")
    lines += [f"| seed | {spec.train.seed} |", "", "## Exports", "", "| file | size | verified |", "|---|---|---|"]
    for report in exports:
        verdict = "yes" if report.ok else f"**failed**: {report.problem.what if report.problem else 'no reason given'}"
        lines.append(f"| `{report.path or report.kind}` | {report.bytes / 1e6:.1f} MB | {verdict} |")
    lines += [
        "",
        "Data files, with their SHA-256, library versions and every setting: `provenance.json`.",
        "The same result again: `dropforge run spec.resolved.yaml`.",
        "",
    ]
    return "\n".join(lines)
