"""Random Llamas of published shapes with a random adapter, written one tensor at a time: what big exports are tried on."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

SHAPES = {
    # Llama 3.1 8B, Llama 3.2 1B, and one small enough to try a script itself.
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048},
}  # fmt: skip
PROJECTIONS = {
    "self_attn.q_proj": ("hidden", "hidden"), "self_attn.k_proj": ("kv", "hidden"), "self_attn.v_proj": ("kv", "hidden"),
    "self_attn.o_proj": ("hidden", "hidden"), "mlp.gate_proj": ("inner", "hidden"), "mlp.up_proj": ("inner", "hidden"),
    "mlp.down_proj": ("hidden", "inner"),
}  # fmt: skip
INTO_THE_STREAM = ("self_attn.o_proj", "mlp.down_proj")
SHARD_BYTES = 4e9


def write_base(folder: Path, shape: dict) -> int:
    """bfloat16 weights in shards of at most 4 GB, with the tokenizer of builtin:tiny-llama; returns the parameters."""
    import torch
    from dropforge.export.safetensors_stream import write_file
    from dropforge.models.builtin import build_builtin
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    build_builtin("tiny-llama", folder)
    (folder / "model.safetensors").unlink()
    config = LlamaConfig(**shape, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    shapes = _tensor_shapes(config)
    shards = _shards(shapes)
    # Random tables repeated: normal numbers for 8 billion weights would take longer than the export.
    tables = {}
    for name in shapes:
        kind = name.rpartition("layers.")[2].partition(".")[2] or name
        if kind not in tables:
            generator = torch.Generator().manual_seed(zlib.crc32(kind.encode()))
            tables[kind] = (torch.randn(1_000_003, generator=generator) * _spread(kind, config)).to(torch.bfloat16)

    def tensor(name: str):
        if "norm" in name:
            return torch.ones(shapes[name])
        table = tables[name.rpartition("layers.")[2].partition(".")[2] or name]
        start = zlib.crc32(name.encode()) % len(table)
        count = torch.Size(shapes[name]).numel()
        return table.roll(start).repeat(count // len(table) + 1)[:count].reshape(shapes[name])

    weight_map = {}
    for number, group in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, group, dtype=torch.bfloat16, tensor=tensor)
        weight_map.update(dict.fromkeys(group, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(torch.Size(extent).numel() for extent in shapes.values())


def _spread(kind: str, config) -> float:
    """Standard deviation of a weight: such that, as in trained models, no layer changes its input very much.

    With equal spreads everywhere the layers would turn any rounding into another prediction, and no bound could hold.
    """
    embedding = 0.05 if config.tie_word_embeddings else 1.0
    if "embed_tokens" in kind:
        return embedding
    if "o_proj" in kind or "down_proj" in kind:
        return 0.01 * embedding / math.sqrt(2 * config.num_hidden_layers)
    return 0.02


def _tensor_shapes(config) -> dict[str, tuple[int, ...]]:
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    return shapes


def _shards(shapes: dict[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    groups: list[dict] = [{}]
    size = 0
    for name, extent in sorted(shapes.items()):
        count = 2
        for side in extent:
            count *= side
        if groups[-1] and size + count > SHARD_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = extent
        size += count
    return groups


def write_adapter(folder: Path, shape: dict) -> None:
    """A random rank-16 adapter on every projection, strong enough that an unmerged module would show."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    torch.manual_seed(0)
    sides = {
        "hidden": shape["hidden_size"], "inner": shape["intermediate_size"],
        "kv": shape["hidden_size"] // shape["num_attention_heads"] * shape["num_key_value_heads"],
    }  # fmt: skip
    names = [name.rpartition(".")[2] for name in PROJECTIONS]
    LoraConfig(r=16, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM").save_pretrained(folder)
    tensors = {}
    for layer in range(shape["num_hidden_layers"]):
        for name, (out, inside) in PROJECTIONS.items():
            start = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{start}.lora_A.weight"] = torch.randn(16, sides[inside]) * 0.02
            strength = 0.01 / math.sqrt(2 * shape["num_hidden_layers"]) if name in INTO_THE_STREAM else 0.02
            tensors[f"{start}.lora_B.weight"] = torch.randn(sides[out], 16) * strength
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
