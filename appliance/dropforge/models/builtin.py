"""Models made on the spot from a seed: real architectures, random weights, a few million parameters, no download.

They exist to try the whole path (train, merge, convert, chat) offline in minutes. They know nothing before they are
trained. Rows are multiples of 256 long, because llama.cpp's k-quants need that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.settings import settings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

BUILTIN_PREFIX = "builtin:"
LICENCE = "Apache-2.0"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the bytes of a builtin model, next to the corpus."""

    architecture: str
    tie_word_embeddings: bool
    seed: int
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.0625
    """Standard deviation of the linear layers: 1/sqrt(hidden_size). With 0.02 a model this narrow hardly learns."""
    embedding_range: float = 0.02
    """The same for embed_tokens and lm_head."""


BUILTIN: dict[str, Recipe] = {
    "tiny-llama": Recipe(architecture="llama", tie_word_embeddings=False, seed=20_260_101),
    "tiny-qwen3": Recipe(architecture="qwen3", tie_word_embeddings=True, seed=20_260_102, rms_norm_eps=1e-6),
}
_FORMAT = 2  # raise when this file changes what it writes


def recipe_hash(name: str) -> str:
    """12 hex digits over recipe, corpus and the libraries that write the files; part of the cache folder's name."""
    from importlib.metadata import version

    from dropforge.models.builtin_tokenizers import corpus

    libraries = {package: version(package) for package in ("transformers", "tokenizers", "numpy")}
    recipe = {"format": _FORMAT, "recipe": asdict(BUILTIN[name]), "corpus": corpus(), "libraries": libraries}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


def builtin_folder(model_id: str) -> Path | None:
    """Where `builtin:NAME` is kept once it is made; None if there is no such builtin model. Makes nothing."""
    name = model_id.removeprefix(BUILTIN_PREFIX)
    return settings().cache / "models" / f"{name}-{recipe_hash(name)}" if name in BUILTIN else None


def build_builtin(name: str, folder: Path) -> None:
    """Write config, float32 weights and tokenizer of `name` (a key of BUILTIN) into the existing empty `folder`."""
    recipe = BUILTIN[name]
    tokenizer = _tokenizer(recipe)
    config = _config(recipe, tokenizer)
    _write_weights(config, recipe=recipe, folder=folder)
    tokenizer.save_pretrained(folder)
    if recipe.architecture == "llama":
        _write_sentencepiece(tokenizer, folder / "tokenizer.model")
    (folder / "README.md").write_text(_README.format(name=name, licence=LICENCE), encoding="utf-8")


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    from dropforge.models.builtin_tokenizers import llama_tokenizer, qwen_tokenizer

    makers: dict[str, Callable[[], PreTrainedTokenizerBase]] = {"llama": llama_tokenizer, "qwen3": qwen_tokenizer}
    return makers[recipe.architecture]()


def _config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    from transformers import LlamaConfig, Qwen3Config

    fields: dict[str, Any] = asdict(recipe)
    architecture = fields.pop("architecture")
    del fields["seed"], fields["embedding_range"]
    theta = fields.pop("rope_theta")
    kind = {"llama": LlamaConfig, "qwen3": Qwen3Config}[architecture]
    return kind(
        **fields,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def _write_weights(config: PreTrainedConfig, *, recipe: Recipe, folder: Path) -> None:
    """Matrices normal with the recipe's standard deviations in the order of their names, norms 1.

    numpy's PCG64 and a model on the meta device: torch's global random state is neither used nor moved, so that the
    first run of a job, which builds the model, trains exactly like a later one.
    """
    import numpy as np
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoModelForCausalLM, GenerationConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = np.random.Generator(np.random.PCG64(recipe.seed))
    weights = {}
    for name, parameter in sorted(model.named_parameters()):
        shape = tuple(parameter.shape)
        if len(shape) == 1:
            weights[name] = np.ones(shape, dtype=np.float32)
        else:
            linear = name.startswith("model.layers.")
            scale = recipe.initializer_range if linear else recipe.embedding_range
            weights[name] = generator.standard_normal(shape, dtype=np.float32) * np.float32(scale)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)


def _write_sentencepiece(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    from dropforge.models.builtin_tokenizers import LLAMA_SPECIAL
    from dropforge.models.sentencepiece_file import pieces_from_bpe, sentencepiece_model

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    reserved = [text for text in model["vocab"] if text.startswith("<|reserved_")]
    pieces = pieces_from_bpe(model["vocab"], merges, special=LLAMA_SPECIAL, unused=reserved)
    vocab = model["vocab"]
    path.write_bytes(
        sentencepiece_model(pieces, bos_id=vocab["<s>"], eos_id=vocab["<|im_end|>"], pad_id=vocab["<pad>"])
    )


_README = """---
license: apache-2.0
---
# {name}

Made by Dropforge from a fixed seed: a real architecture with random weights. It knows nothing before it is trained.
Its tokenizer was trained on a text that is part of Dropforge. Licence: {licence}.
"""
