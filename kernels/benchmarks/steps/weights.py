"""A checkpoint of random weights (normal, std 0.02, bf16) with a byte-level tokenizer, for speed and memory runs."""

from __future__ import annotations

from pathlib import Path

from steps.models import MODELS


def ensure_checkpoint(folder: Path, model: str, *, layers: int | None, device: str) -> Path:
    """The checkpoint's folder, written on first use. ``layers``: fewer than the model has, for parity checks."""
    path, depth = _place(folder, model, layers)
    if not is_complete(folder, model, layers=layers):
        _write(path, model, depth, device)
        (path / "COMPLETE").write_text("")
    return path


def is_complete(folder: Path, model: str, *, layers: int | None) -> bool:
    """Whether the checkpoint was written to its end."""
    return (_place(folder, model, layers)[0] / "COMPLETE").exists()


def _place(folder: Path, model: str, layers: int | None) -> tuple[Path, int]:
    depth = layers or int(MODELS[model]["num_hidden_layers"])
    return folder / f"{model}-{depth}-layers", depth


def _write(path: Path, model: str, layers: int, device: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**{**MODELS[model], "num_hidden_layers": layers})
    torch.manual_seed(0)
    with torch.device(device):
        built = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    built.save_pretrained(path, max_shard_size="4GB")
    tokenizer().save_pretrained(path)
    del built
    if device == "cuda":
        torch.cuda.empty_cache()


def tokenizer():
    """One token a byte; the model's larger vocabulary stays unused by text and is fed with random ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=letters, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        model_max_length=1048576,
    )  # fmt: skip
