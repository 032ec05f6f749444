"""What get_peft_model attaches: names of modules as scripts write them, turned into PEFT's LoraConfig for one model."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dropforge.errors import CommandError
from dropforge.fast.checks import check_modules

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

LOG = logging.getLogger("dropforge")
ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Projections that some families (Phi-3) keep as one layer, and the names that scripts give to its parts."""
EMBEDDINGS = ("embed_tokens", "lm_head")
"""Named among the targets, they are trained in full beside LoRA."""
INITS = ("gaussian", "pissa", "olora", "loftq", "eva", "corda", "orthogonal", "pissa_niter_")
_PARTS = {
    "attention": ("attn", "attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "moe", "experts"),
    "vision": ("vision", "visual", "image", "audio"),
}


@dataclass(frozen=True, kw_only=True)
class Switches:
    """Which parts of the model get an adapter; all True means every target."""

    vision: bool = True
    language: bool = True
    attention: bool = True
    mlp: bool = True

    @property
    def all(self) -> bool:
        return self.vision and self.language and self.attention and self.mlp


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What is adapted (`modules`) and what is trained in full (`saved`)."""

    modules: str | list[str]
    saved: list[str]
    tied: bool
    """embed_tokens and lm_head are one matrix, which stays one while it is trained."""


def choose_targets(
    model: nn.Module,
    *,
    target_modules: str | Iterable[str] | None,
    modules_to_save: Iterable[str] | None,
    switches: Switches | None = None,
    section: str = "",
) -> Targets:
    """Names checked against the model. None means the seven projections where the model has them, else all-linear.

    section: what stands before the arguments' names in errors.
    Raises ModelError adapter-target-unknown; CommandError api-target-parts for a part of a fused layer.
    """
    leaves = {path.rsplit(".", 1)[-1] for path, _ in model.named_modules()}
    if target_modules is None:
        target_modules = ALL_PROJECTIONS if leaves.issuperset(ALL_PROJECTIONS) else "all-linear"
    saved = list(modules_to_save or [])
    names: str | list[str] = target_modules if isinstance(target_modules, str) else _unfused(target_modules, leaves)
    if not isinstance(names, str):
        saved += [name for name in EMBEDDINGS if name in names and name not in saved]
        names = [name for name in names if name not in EMBEDDINGS]
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    if tied and any(name in EMBEDDINGS for name in saved):
        # One matrix under two names: PEFT ties the head to the trained embedding by itself.
        saved = [name for name in saved if name not in EMBEDDINGS] + [EMBEDDINGS[0]]
    else:
        tied = False
    check_modules(model, argument=f"{section}target_modules", names=names)
    check_modules(model, argument=f"{section}modules_to_save", names=saved)
    if switches is not None and not switches.all:
        names = _switched(model, names, switches)
    return Targets(modules=names, saved=saved, tied=tied)


def _unfused(asked: Iterable[str], leaves: set[str]) -> list[str]:
    names = list(asked)
    for fused, parts in FUSED.items():
        found = [part for part in parts if part in names]
        if fused not in leaves or not found or any(part in leaves for part in found):
            continue
        if len(found) < len(parts):
            raise CommandError(
                f"{' and '.join(found)} cannot be adapted alone", code="api-target-parts", where="target_modules",
                why=f"this model keeps {', '.join(parts)} as one layer, {fused}", fix=f"name {fused}, or all its parts",
            )  # fmt: skip
        names = [name for name in names if name not in parts] + [fused]
    return names


def _switched(model: nn.Module, names: str | list[str], switches: Switches) -> list[str]:
    """The full paths of the targets that lie in the parts that are on."""
    if not (switches.vision or switches.language) or not (switches.attention or switches.mlp):
        raise CommandError(
            "finetune_*: every part is switched off", code="api-switches", where="finetune_language_layers",
            fix="leave one of vision and language, and one of attention and mlp, True",
        )  # fmt: skip
    found = [path for path in linear_paths(model, names) if is_on(path, switches)]
    if not found:
        raise CommandError(
            "finetune_*: no target lies in the parts that are on", code="api-switches", where="target_modules",
            fix="switch a part on, or name other targets",
        )  # fmt: skip
    return found


def linear_paths(model: nn.Module, names: str | list[str]) -> list[str]:
    """Paths of the linear layers that `names` mean; "all-linear" leaves out the head, as PEFT does."""
    from torch.nn import Linear

    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, Linear)]
    if names == "all-linear":
        return [path for path, module in layers if module is not head]
    if isinstance(names, str):
        return [path for path, _ in layers if re.fullmatch(names, path)]
    return [path for path, _ in layers if any(path == name or path.endswith(f".{name}") for name in names)]


def within_layers(model: Any, chosen: Targets, layers: list[int] | None) -> Targets:
    """PEFT restricts names by layer, but neither "all-linear" nor full paths: those are narrowed here."""
    if layers is None:
        return chosen
    if isinstance(chosen.modules, list) and not any("." in name for name in chosen.modules):
        return chosen
    wanted = set(layers)
    paths = [path for path in linear_paths(model, chosen.modules) if layer_of(path) in wanted]
    return Targets(modules=paths, saved=chosen.saved, tied=chosen.tied)


def layer_of(path: str) -> int | None:
    """Index of the decoder layer that a module's path lies in."""
    found = re.search(r"\.(\d+)\.", path)
    return int(found.group(1)) if found else None


def is_on(path: str, switches: Switches) -> bool:
    """Whether a module's path lies in the parts that get an adapter."""
    parts = path.lower().split(".")
    within = {kind: any(word in part for part in parts for word in words) for kind, words in _PARTS.items()}
    if not (switches.vision if within["vision"] else switches.language):
        return False
    if within["attention"]:
        return switches.attention
    return switches.mlp if within["mlp"] else True


def lora_config(
    targets: Targets, *, init_lora_weights: bool | str, loftq_config: Any, task_type: str | None,
    **fields: Any,
) -> LoraConfig:  # fmt: skip
    """PEFT's config. LoftQ starts from zero here: dropforge.fast.loftq fills it in when the model is quantised.

    Raises CommandError: api-init, api-lora (PEFT refuses the combination).
    """
    from peft import LoraConfig

    if isinstance(init_lora_weights, str) and not init_lora_weights.startswith(INITS):
        raise CommandError(
            f"init_lora_weights cannot be {init_lora_weights!r}", code="api-init", where="init_lora_weights",
            fix=f"True, False, or one of {', '.join(name for name in INITS if not name.endswith('_'))}",
        )  # fmt: skip
    if loftq_config and init_lora_weights != "loftq":
        LOG.warning("loftq_config is read with init_lora_weights='loftq' only")
    try:
        return LoraConfig(
            target_modules=targets.modules, modules_to_save=targets.saved or None, ensure_weight_tying=targets.tied,
            init_lora_weights=True if init_lora_weights == "loftq" else init_lora_weights,  # type: ignore[arg-type]
            task_type=task_type, **fields,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise CommandError(
            "PEFT refuses these arguments together", code="api-lora", where="get_peft_model", why=str(error),
            fix="leave out the argument it names",
        ) from error  # fmt: skip


def hold_in_fp32(model: nn.Module) -> list[str]:
    """Trained copies of whole modules (embeddings, head) in fp32: steps of 5e-6 vanish when added to 16-bit weights.

    Returns their paths. What goes in and comes out keeps the model's compute type, with autocast or without it.
    """
    import torch
    from peft.utils import ModulesToSaveWrapper

    held = []
    for path, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        for copy in module.modules_to_save.values():
            weight = getattr(copy, "weight", None)
            if weight is None or weight.dtype not in (torch.bfloat16, torch.float16):
                continue
            compute = weight.dtype
            copy.float()
            if isinstance(copy, torch.nn.Embedding):
                copy.register_forward_hook(_cast_output(compute))
            elif isinstance(copy, torch.nn.Linear):
                copy.register_forward_pre_hook(_cast_input)
                copy.register_forward_hook(_cast_output(compute))
            LOG.info("%s is trained in full, in fp32", path)
            held.append(path)
    return held


def _cast_output(dtype: Any) -> Any:
    def cast(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        return output.to(dtype)

    return cast


def _cast_input(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Without autocast a linear layer refuses an input of another type than its weight."""
    return (arguments[0].to(module.weight.dtype), *arguments[1:])
