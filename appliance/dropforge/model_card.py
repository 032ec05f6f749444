"""MODEL_CARD.md: what the model is, what it learnt from and how its exports were checked, for people."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge import __version__
from dropforge.gguf_names import preferred_projector
from dropforge.spec import Spec

if TYPE_CHECKING:
    from dropforge.export import ExportReport
    from dropforge.models.source import ModelSource
    from dropforge.results import TrainingRecord


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(
    spec: Spec, *, source: ModelSource, record: TrainingRecord, exports: tuple[ExportReport, ...],
    relation: str = "", license_name: str = "",
) -> str:  # fmt: skip
    """The card as Markdown with the hub's metadata header.

    `relation` is the hub's word for what the files are to the base model: adapter, finetune or quantized.
    """
    summary, data = record.summary, record.data
    adapter = "every weight" if spec.adapter.type == "full" else f"LoRA, rank {spec.adapter.r}"
    base = f"{source.id}@{source.revision}" if source.revision else source.id
    lines = [
        *_header(source, relation=relation, license_name=license_name),
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
    lines += _engine(summary.get("engine"))
    lines += [f"| seed | {spec.train.seed} |", "", *_exports(exports)]
    if not relation:  # on the hub every kind lies at the top of a repository of its own
        lines += _commands(exports, base=source.id if HUB_ID.fullmatch(source.id) else "BASE")
    lines += [
        "",
        "Data files, with their SHA-256, library versions and every setting: `provenance.json`.",
        "The same result again: `dropforge run spec.resolved.yaml`.",
        "",
    ]
    return "\n".join(lines)


def _header(source: ModelSource, *, relation: str, license_name: str) -> list[str]:
    """Metadata the hub reads. A base that is no hub model is not named: the hub would look for it."""
    lines = ["---"]
    if HUB_ID.fullmatch(source.id):
        lines.append(f"base_model: {source.id}")
        lines += [f"base_model_relation: {relation}"] if relation else []
    if re.fullmatch(r"[\w.+-]+", license_name):
        lines.append(f"license: {license_name}")
    return [*lines, "tags: [dropforge]", "---"]


def _engine(engine: dict[str, Any] | None) -> list[str]:
    """How the training ran, where the fast step did it, or why it did not."""
    if not engine:
        return []
    if not engine["buckets"]:
        return [f"| training step | {engine['notes'][0]} |"] if engine["notes"] else []
    captured = sum(bucket["way"] == "captured" for bucket in engine["buckets"])
    others = Counter(
        f"{bucket['way']}: {bucket['reason']}" for bucket in engine["buckets"] if bucket["way"] != "captured"
    )
    reasons = "".join(f"; {count} {text}" for text, count in others.items())
    return [
        f"| packing | {engine['packing']} |",
        f"| training step | {captured} of {len(engine['buckets'])} bucket shapes captured as CUDA graphs{reasons} |",
        f"| speed | {engine['steady_tokens_per_second']:,.0f} tokens/s |",
    ]


def _exports(exports: tuple[ExportReport, ...]) -> list[str]:
    """One row per export, with the measured agreement with the model it was made from."""
    lines = [
        "## Exports", "",
        "| file | size | verified | mean KL | same first token | measured over |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for report in exports:
        verdict = "yes" if report.ok else f"**failed**: {report.problem.what if report.problem else 'no reason given'}"
        over_eval = report.checks.get("eval")
        close = over_eval or report.checks.get("logits")
        if close:
            rows = "the evaluation split" if over_eval else "the probe prompts"
            rows = "answers to pictures" if report.kind.startswith("mmproj") else rows
            numbers = f"| {close['mean_kl']:.5f} | {close['top1']:.1%} | {close['positions']} tokens of {rows} |"
        else:
            numbers = "| | | |"
        lines.append(f"| `{report.path or report.kind}` | {report.bytes / 1e6:.1f} MB | {verdict} {numbers}")
    lines += [
        "",
        "Mean KL: how much the file's next-token predictions differ from those of the model it was made from (the",
        "merged folder; for the merged folder and the adapter, the model as it was trained), in nats; 0 is equal.",
        "Same first token: how often both think the same token the likeliest next one.",
    ]
    return [*lines, *_enlarged(exports), *_base_weights(exports)]


def _commands(exports: tuple[ExportReport, ...], *, base: str) -> list[str]:
    """One line per file that is there: how to run it, from inside this folder."""
    projector = preferred_projector(
        [Path(report.path) for report in exports if report.ok and report.kind.startswith("mmproj")]
    )
    commands = {
        "adapter": f"vllm serve {base} --enable-lora --lora-modules mine={{path}}   # or PEFT in Python",
        "merged": "vllm serve {path}   # or transformers in Python",
        "merged_4bit": "vllm serve {path}   # or transformers with bitsandbytes",
        "fp8": "vllm serve {path}   # an Ada, Hopper or newer GPU",
        "gguf": "llama-server -m {path}" + (f" --mmproj {projector}" if projector else ""),
        "lora_gguf": "llama-server -m BASE.gguf --lora {path}",
    }
    lines = []
    for report in exports:
        command = commands.get(report.kind.partition(":")[0])
        if report.ok and report.kind == "ollama":
            lines.append(str(report.checks["create"]))
        elif report.ok and command:
            split = report.kind.startswith("gguf:") and not report.path.endswith(".gguf")
            lines.append(command.format(path=report.path + ("/*-00001-of-*.gguf" if split else "")))
    return ["", "## Use", "", "```sh", *lines, "```"] if lines else []


def _base_weights(exports: tuple[ExportReport, ...]) -> list[str]:
    """Which weights the adapter was merged onto, where the base model's own files are quantised."""
    note = next((report.checks["base_weights"] for report in exports if "base_weights" in report.checks), None)
    if note is None:
        return []
    if note["weights"] == "original":
        return ["", f"The base model is {note['format']}; the exports are made onto its original 16-bit weights."]
    return [
        "", f"The base model is {note['format']}, and its original 16-bit weights were not at hand: the exports are",
        "made onto dequantised weights, so they carry the rounding of that format.",
    ]  # fmt: skip


def _enlarged(exports: tuple[ExportReport, ...]) -> list[str]:
    """Which tensors of which GGUF have another type than its name says."""
    lines: list[str] = []
    for report in exports:
        found = report.checks.get("tensors_stored_larger") or {}
        by_change: dict[str, list[str]] = {}
        for name, change in found.items():
            by_change.setdefault(change, []).append(f"`{name}`")
        for change, names in by_change.items():
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            wanted, _, used = change.partition(" -> ")
            lines += ["", f"`{report.path}` stores {shown} as {used}: their rows do not divide into {wanted}'s blocks."]
    return lines
