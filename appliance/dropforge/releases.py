"""What this release runs, and which release brings the rest. The spec accepts the words already, so files keep."""

from __future__ import annotations

from dropforge.errors import Problem
from dropforge.spec import Spec

METHODS = {
    "sft": "0.1", "cpt": "0.1",
    "dpo": "0.3", "orpo": "0.3", "kto": "0.3", "simpo": "0.3", "reward": "0.3",
    "grpo": "0.4", "dr_grpo": "0.4", "dapo": "0.4", "bnpo": "0.4", "gspo": "0.4", "rloo": "0.4", "ppo": "0.4",
    "embedding": "0.5", "reranker": "0.5", "classifier": "0.5", "vision": "0.5", "tts": "0.5", "stt": "0.5",
}  # fmt: skip
QUANTIZATIONS = {"none": "0.1", "nf4": "0.1", "int8": "0.2", "fp8": "0.2", "mxfp4": "0.3"}
EXPORTS = {
    "adapter": "0.1", "merged": "0.1", "gguf": "0.1", "ollama": "0.1", "fp8": "0.1", "merged_4bit": "0.1",
    "lora_gguf": "0.1", "mmproj": "0.1", "torchao": "0.3", "executorch": "0.3",
}  # fmt: skip
# Fields of `train` that no method of this release reads: refused, never silently ignored.
TRAIN_FIELDS = {
    "beta": "0.3", "loss_type": "0.3", "num_generations": "0.4",
    "max_prompt_length": "0.4", "max_completion_length": "0.4", "temperature": "0.4", "epsilon": "0.4",
}  # fmt: skip
FORMATS = {"preference": "0.3", "unpaired_preference": "0.3", "prompt": "0.4"}
CURRENT = "0.1"


def not_yet(spec: Spec) -> list[Problem]:
    """Everything in the spec that is valid but arrives with a later release; empty when the job can run."""
    asked: list[tuple[str, str, str]] = [
        ("method", spec.method, METHODS[spec.method]),
        ("model.quantization", spec.model.quantization, QUANTIZATIONS[spec.model.quantization]),
    ]
    asked += [("export", entry, _export_release(entry)) for entry in spec.export]
    if isinstance(spec.data.format, str):
        asked.append(("data.format", spec.data.format, FORMATS.get(spec.data.format, CURRENT)))
    init = spec.adapter.init_lora_weights
    if init in ("pissa", "olora") and spec.model.quantization != "none":
        # They change the base weights; only of weights that are not quantised can that be undone exactly.
        asked.append(("adapter.init_lora_weights", spec.adapter.init_lora_weights, "0.2"))
    if spec.train.on_oom == "shrink":
        asked.append(("train.on_oom", "shrink", "0.2"))
    if isinstance(spec.resources.gpus, str) or spec.resources.gpus > 1:
        asked.append(("resources.gpus", str(spec.resources.gpus), "0.3"))
    asked += [("report_to", name, "0.2") for name in spec.report_to]
    values = spec.train.model_dump(include=set(TRAIN_FIELDS), exclude_none=True)
    asked += [(f"train.{name}", str(value), TRAIN_FIELDS[name]) for name, value in values.items()]
    return [
        Problem(
            code="not-in-this-release",
            what=f"{where}: {value} arrives with release {release}; this is {CURRENT}",
            where=where,
            fix=_instead(where),
        )
        for where, value, release in asked
        if release != CURRENT
    ]


def _export_release(entry: str) -> str:
    return EXPORTS[entry.partition(":")[0]]


def _instead(where: str) -> str:
    table = {"method": METHODS, "model.quantization": QUANTIZATIONS, "export": EXPORTS}.get(where)
    if table is None:
        return "leave it out"
    return "use one of: " + ", ".join(name for name, release in table.items() if release == CURRENT)
