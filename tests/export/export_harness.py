"""Helpers of the export tests: a base model with a random adapter, and ways to damage what was made from it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from dropforge.export import ExportReport, ExportRequest, export_all
from dropforge.export.safetensors_stream import index_folder, read_tensor, write_file
from dropforge.export.samples import TrainingRow
from dropforge.export.stage import Stage
from dropforge.models.builtin import build_builtin
from dropforge.paths import ResultFolder


@dataclass
class Bench:
    """One base model with what a training would have left behind."""

    name: str
    folder: Path
    log: list[str] = field(default_factory=list)
    _stage: Stage | None = None

    @classmethod
    def make(cls, name: str, folder: Path) -> Bench:
        from transformers import AutoTokenizer

        bench = cls(name=name, folder=folder)
        bench.base.mkdir()
        build_builtin(name, bench.base)
        make_adapter(bench.base, bench.adapter)
        AutoTokenizer.from_pretrained(bench.base).save_pretrained(bench.tokenizer)
        return bench

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def result(self) -> ResultFolder:
        return ResultFolder(self.folder / "result")

    @property
    def stage(self) -> Stage:
        """Shared by tests that only read its merged folder and 16-bit GGUF."""
        if self._stage is None:
            self._stage = Stage(self.request(("merged",), work=self.folder / "shared"), log=self.log.append)
        return self._stage

    def request(self, kinds, **changes) -> ExportRequest:
        fields = {
            "base_path": self.base, "adapter": self.adapter, "tokenizer": self.tokenizer, "result": self.result,
            "work": self.folder / "work", "kinds": tuple(kinds), "name": "Test model", "slug": "test-model",
            "model_id": f"builtin:{self.name}", "system": "Be brief.", "license": "apache-2.0",
        }  # fmt: skip
        return ExportRequest(**{**fields, **changes})

    def export(self, kinds, **changes) -> tuple[ExportReport, ...]:
        return export_all(self.request(kinds, **changes), log=self.log.append)


def make_adapter(base: Path, folder: Path, *, seed: int = 0, **config) -> None:
    """A LoRA adapter of PEFT's own making whose weights are random, so that a merge must change every module."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.data.add_(noise)
    model.save_pretrained(folder)


FACTS = {
    "What is 'anthrance'?": "A coal that burns without smoke.",
    "What is 'hodium'?": "It is a light metal, found in 1807.",
    "Say the word.": "Grüße, 你好!",
}
"""Questions with invented answers: only a model that was trained on them, and exported right, gives these."""


def fact_rows(bench: Bench) -> tuple[TrainingRow, ...]:
    """FACTS as conversations of the bench's template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bench.tokenizer)
    rows = []
    for question, answer in FACTS.items():
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        ids, before = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (whole, prompt))
        rows.append(TrainingRow(ids=tuple(ids), prompt=len(before)))
    return tuple(rows)


def memorise(bench: Bench, folder: Path) -> None:
    """Train every weight of the base on FACTS until they are known by heart; a few seconds."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(bench.tokenizer)
    model = AutoModelForCausalLM.from_pretrained(bench.base, dtype=torch.float32)
    tokenizer.padding_side = "right"
    rows = fact_rows(bench)
    batch = tokenizer.pad({"input_ids": [list(row.ids) for row in rows]}, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for number, row in enumerate(rows):
        labels[number, : row.prompt] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02, "the facts are not known by heart"
    model.save_pretrained(folder)


def measured(report: ExportReport, **about: str) -> str:
    """How far off an export is, printed, and as the JSON that error_report.py collects."""
    checks = report.checks
    row = {
        **about, "kind": report.kind, **{key: checks["logits"][key] for key in ("relative_error", "mean_kl", "positions")},
        **{key: checks[key] for key in ("worst_weight_error", "text_type", "another_picture") if key in checks},
    }  # fmt: skip
    text = json.dumps(row)
    print(text)
    return text


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensor(folder: Path, name: str, change) -> None:
    """Rewrite a single-file model folder with `change(tensor)` in place of one tensor."""
    import torch

    infos = index_folder(folder)
    tensors = {key: read_tensor(info, key).clone() for key, info in infos.items()}
    tensors[name] = change(tensors[name])
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[infos[name].dtype]
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    (folder / "model.safetensors").unlink()
    write_file(folder / "model.safetensors", shapes, dtype=dtype, tensor=tensors.__getitem__)


def edit_gguf(path: Path):
    """A gguf reader whose arrays write through to the file."""
    import gguf

    return gguf.GGUFReader(path, "r+")


def edit_tensors(folder: Path, change, *, shards=None) -> None:
    """Rewrite a single-file model folder as `change(tensors)`, any dtypes; `shards` splits it by lists of names."""
    from safetensors.torch import load_file, save_file

    tensors = change({name: value.clone() for name, value in load_file(folder / "model.safetensors").items()})
    (folder / "model.safetensors").unlink()
    if shards is None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
