"""Which model an adapter belongs to: written into adapter_config.json, and compared before weights are loaded.

Equal widths prove nothing: Llama-3-8B and Mistral-7B have the same matrices under the same names. So the adapter says
what it was trained on, in `auto_mapping`, a field of PEFT's that keeps further keys. Adapters made elsewhere often do
not; then their tensors and their tokenizer are compared with the base.

    "auto_mapping": {
        "base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama",
        "base_config": {"model_type": "llama", "num_hidden_layers": 32, ...}}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dropforge.errors import ModelError
from dropforge.fast.checks import check_modules

SHAPE = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
"""Sizes that two models of one architecture may differ in, and that an adapter depends on."""
RECORD = "base_config"
PADDING = 256
"""Rows of a vocabulary that padding and a few new tokens explain."""
SAME_TOKENS = 0.5
"""Share of token ids that must mean the same. New tokens change a few of them, another tokenizer nearly all."""
NAME_BASE = "write the model it was trained on into adapter_config.json, as base_model_name_or_path"
_TABLES = ("embed_tokens", "lm_head")


def describe_base(model: Any, *, vocabulary: int | None = None) -> dict[str, Any]:
    """What LoraConfig's `auto_mapping` says of a base model. vocabulary: its stored rows, where they have grown."""
    record = _sizes(model.config)
    if vocabulary is not None:
        record["vocab_size"] = vocabulary
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__, RECORD: record}


def describe_config(config: Any) -> dict[str, Any]:
    """The same of a model of which only the config is there."""
    return {"parent_library": type(config).__module__, RECORD: _sizes(config)}


def _sizes(config: Any) -> dict[str, Any]:
    text = config.get_text_config()
    sizes = {name: getattr(text, name, None) for name in (*SHAPE, "vocab_size")}
    return {"model_type": config.model_type} | {name: size for name, size in sizes.items() if isinstance(size, int)}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The base that an adapter is to be put on."""

    empty: Any
    """The model without memory for its weights (on torch's meta device)."""
    name: str
    rows: int
    """Rows that its embedding will have."""
    tokenizer: Path | None
    """The folder of its tokenizer."""
    fix: str = NAME_BASE
    """What to do when the adapter is another model's."""


def check_adapter(config: Mapping[str, Any], *, folder: Path, base: Candidate, argument: str) -> None:
    """The adapter must have been trained on a model like `base`; another revision or quantisation of it is one.

    config: adapter_config.json's content. folder: where it lies, with the weights where they are there.
    Raises ModelError: adapter-wrong-base, adapter-target-unknown, adapter-wrong-size.
    """
    where = f"{argument}: {folder.name}"
    _check_record(config, base, where=f"{where}/adapter_config.json")
    fix = f"this adapter is one of another architecture than {base.name}: {base.fix}"
    for field in ("target_modules", "modules_to_save"):
        names = config.get(field)
        if isinstance(names, list):
            name = f"{argument}: {field} of {folder.name}/adapter_config.json"
            check_modules(base.empty, argument=name, names=names, fix=fix)
    shapes = dict(_shapes(folder / "adapter_model.safetensors"))
    tables = {name: shape for name, shape in shapes.items() if _is_table(name)}
    _check_sizes(shapes, base, where=where)
    _check_tables(tables, base, where=where)
    _check_complete(config, shapes, base, where=where)
    if not tables:  # else its tokens may be its own
        _check_vocabulary(config, base, where=where)
        _check_tokens(folder, base, where=where)


def _wrong(base: Candidate, *, where: str, why: str) -> ModelError:
    return ModelError(
        f"this adapter was not trained on {base.name}", code="adapter-wrong-base", where=where, why=why, fix=base.fix
    )


def _wrong_size(base: Candidate, *, where: str, why: str, fix: str | None = None) -> ModelError:
    return ModelError(
        f"this adapter does not have the sizes of {base.name}", code="adapter-wrong-size", where=where, why=why,
        fix=fix or base.fix,
    )  # fmt: skip


def _record(config: Mapping[str, Any]) -> dict[str, Any]:
    found = (config.get("auto_mapping") or {}).get(RECORD)
    return found if isinstance(found, dict) else {}


def _check_record(config: Mapping[str, Any], base: Candidate, *, where: str) -> None:
    """Architecture and sizes, where the adapter says them."""
    then = config.get("auto_mapping") or {}
    now = describe_base(base.empty)
    trained, found = (_family(entry.get("parent_library")) for entry in (then, now))
    if trained and found and trained != found:
        raise _wrong(base, where=f"{where}, auto_mapping", why=f"it was trained on a {trained} model, this is {found}")
    for name in SHAPE:
        had, has = _record(config).get(name), now[RECORD].get(name)
        if had is not None and has is not None and had != has:
            raise _wrong(base, where=f"{where}, auto_mapping", why=f"{name} was {had} there, and is {has} here")


def _family(module: Any) -> str | None:
    """transformers.models.llama.modeling_llama -> llama; None for code from elsewhere."""
    parts = str(module or "").split(".")
    return parts[2] if parts[:2] == ["transformers", "models"] and len(parts) > 2 else None


def _shapes(path: Path) -> Iterator[tuple[str, list[int]]]:
    """Tensor name, without PEFT's prefix -> shape."""
    from safetensors import safe_open

    if not path.is_file():
        return
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (a safetensors file is no dict)
            yield name.removeprefix("base_model.model."), file.get_slice(name).get_shape()


def _is_table(name: str) -> bool:
    """A whole embedding or head, trained or grown."""
    return name.endswith(".weight") and any(table in name.split(".") for table in _TABLES) and ".lora_" not in name


def _check_sizes(shapes: Mapping[str, list[int]], base: Candidate, *, where: str) -> None:
    """Each A matrix (r, in) and B matrix (out, r) against its linear layer (out, in)."""
    modules = dict(base.empty.named_modules())
    for name, shape in shapes.items():
        place, _, rest = name.partition(".lora_")
        weight = getattr(modules.get(place), "weight", None)
        if rest not in ("A.weight", "B.weight") or (weight is not None and weight.ndim != 2):
            continue
        have, side = (shape[1], 1) if rest == "A.weight" else (shape[0], 0)
        if weight is None:
            why = "the model has no such layer"
        elif weight.shape[side] != have:
            why = f"it is {have} wide there, the model {weight.shape[side]}"
        else:
            continue
        raise _wrong_size(base, where=f"{where}, {name}", why=why)


def _check_tables(tables: Mapping[str, list[int]], base: Candidate, *, where: str) -> None:
    """Trained or grown embeddings and heads (rows, width) take the places of the base's."""
    table = getattr(base.empty.get_input_embeddings(), "weight", None)
    for name, (rows, *rest) in tables.items():
        if table is not None and rest != list(table.shape[1:]):
            why = f"it is {rest} wide there, the model {list(table.shape[1:])}"
            raise _wrong_size(base, where=f"{where}, {name}", why=why)
        if rows != base.rows:
            raise _wrong_size(
                base, where=f"{where}, {name}", why=f"it has {rows} rows, and the model would have {base.rows}",
                fix=f"put the tokenizer it was trained with into its folder, or give resize_model_vocab={rows}"
                if rows > base.rows else None,
            )  # fmt: skip


def _check_complete(config: Mapping[str, Any], shapes: Mapping[str, list[int]], base: Candidate, *, where: str) -> None:
    """An adapter for all layers must have matrices for every layer of the base: fewer are those of a smaller model."""
    targets = config.get("target_modules")
    chosen = ("layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters")
    adapted = {name.partition(".lora_")[0] for name in shapes if ".lora_" in name}
    if not adapted or not isinstance(targets, list) or any(config.get(field) for field in chosen):
        return
    if any("." in target for target in targets):
        return
    for path, module in base.empty.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or path.rsplit(".", 1)[-1] not in targets or path in adapted:
            continue
        raise _wrong(base, where=f"{where}, adapter_model.safetensors", why=f"it has no matrices for {path}")


def _check_vocabulary(config: Mapping[str, Any], base: Candidate, *, where: str) -> None:
    had = _record(config).get("vocab_size")
    has = getattr(base.empty.config.get_text_config(), "vocab_size", None)
    if isinstance(had, int) and isinstance(has, int) and abs(had - has) > PADDING:
        why = f"vocab_size was {had} there, and is {has} here: the same text would become other tokens"
        raise _wrong(base, where=f"{where}/adapter_config.json, auto_mapping", why=why)


def _check_tokens(folder: Path, base: Candidate, *, where: str) -> None:
    """The tokenizer that was saved with the adapter, against the base's."""
    then, now = _tokens(folder), _tokens(base.tokenizer)
    if not then or not now:
        return
    ids = then.keys() & now.keys()
    same = sum(then[index] == now[index] for index in ids)
    if same < SAME_TOKENS * min(len(then), len(now)):
        why = f"of {len(ids)} token ids {same} mean the same as in the tokenizer it was saved with"
        raise _wrong(base, where=f"{where}/tokenizer.json", why=why)


def _tokens(folder: Path | None) -> dict[int, str]:
    """Id -> token, without those added later; empty where the folder has no tokenizer.json."""
    path = None if folder is None else folder / "tokenizer.json"
    if path is None or not path.is_file():
        return {}
    vocabulary = json.loads(path.read_text(encoding="utf-8")).get("model", {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # a unigram model: [token, score], in the order of the ids
        return {index: str(entry[0]) for index, entry in enumerate(vocabulary)}
    return {int(index): str(token) for token, index in vocabulary.items()}
