"""Arguments under older names and in older places, turned into those of the installed TRL and transformers."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import logging
from typing import Any

import torch

from dropforge.errors import CommandError
from dropforge.fast.state import ModelState

LOG = logging.getLogger("dropforge")
RENAMED = {"max_seq_length": "max_length", "evaluation_strategy": "eval_strategy", "warmup_ratio": "warmup_steps",
           "no_cuda": "use_cpu", "per_gpu_train_batch_size": "per_device_train_batch_size"}  # fmt: skip
WITHOUT_EFFECT = {
    "overwrite_output_dir": "resume_from_checkpoint decides whether a run goes on",
    "save_safetensors": "weights are always saved as safetensors",
    "max_prompt_length": "rows are cut as a whole, at max_length",
}
"""Older arguments, and what decides now."""
OURS = "embedding_learning_rate"


class OlderNames:
    """Mixin before a config class: it also takes max_seq_length, warmup_ratio, evaluation_strategy and such.

    On a machine without a GPU it trains on the CPU in fp32 unless told otherwise. Raises CommandError api-argument for
    a name that neither the library nor its older releases know, and for one argument under two names with two values.
    """

    def __init__(self, *args: Any, **arguments: Any) -> None:
        translated = modern_names(type(self), arguments)
        self.embedding_learning_rate: float | None = translated.pop(OURS, None)
        self.length_given = "max_length" in translated
        self.recomputes_given: bool | None = translated.get("gradient_checkpointing")
        self.precision_given = bool(translated.get("bf16") or translated.get("fp16"))
        if not torch.cuda.is_available():
            translated.setdefault("use_cpu", True)
            if translated.get("fp16"):
                LOG.warning("fp16 needs a GPU: training runs in fp32 on this machine")
            if translated["use_cpu"]:
                translated["fp16"] = False
                translated.setdefault("bf16", False)
            translated.setdefault("dataloader_pin_memory", False)
        super().__init__(*args, **translated)


def modern_names(config: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments` by the names of the fields of `config`, a dataclass; those without effect are left out and logged."""
    fields = {field.name for field in dataclasses.fields(config) if field.init} | {OURS}
    name_of_class = config.__name__
    result: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in WITHOUT_EFFECT and name not in fields:
            LOG.warning("%s has no effect: %s", name, WITHOUT_EFFECT[name])
            continue
        new = name if name in fields else RENAMED.get(name)
        if new is None or new not in fields:
            near = difflib.get_close_matches(name, [*fields, *RENAMED], n=1)
            raise CommandError(
                f"{name_of_class} has no argument {name!r}", code="api-argument", where=name,
                fix=f"did you mean {near[0]!r}?" if near else f"see TRL's page of {name_of_class}",
            )  # fmt: skip
        if new in result and result[new] != value:
            if name == "warmup_ratio" or "warmup_ratio" in arguments:
                # transformers let steps win over the ratio.
                result[new] = arguments["warmup_steps"] or arguments["warmup_ratio"]
                continue
            raise CommandError(
                f"{name} and {new} are the same argument with two values", code="api-argument", where=name,
                fix=f"give only {new}",
            )  # fmt: skip
        result[new] = value
    return result


def as_config(args: Any, config: type) -> Any:
    """`args` as an object of the config class: a copy, its fields taken over, or the defaults for None."""
    if args is None:
        return config(output_dir="outputs")
    target = {field.name for field in dataclasses.fields(config) if field.init}
    if isinstance(args, config) or target <= {field.name for field in dataclasses.fields(args)}:
        return copy.copy(args)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.init and f.name in target}
    if given.get("train_sampling_strategy") == "random":
        del given["train_sampling_strategy"]  # the default; some losses need another
    made = config(**given)
    for name in (OURS, "precision_given", "recomputes_given"):
        setattr(made, name, getattr(args, name, None) or None)
    made.length_given = False
    return made


def split_moved(trainer: type, config: type, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments of the trainer, those that older scripts give to it and that belong into its config).

    Raises CommandError api-argument for a name that neither knows.
    """
    own = set(inspect.signature(trainer.__init__).parameters)  # type: ignore[misc]
    fields = {field.name for field in dataclasses.fields(config) if field.init} | {*RENAMED, *WITHOUT_EFFECT}
    stay = {name: value for name, value in given.items() if name in own}
    moved = {name: value for name, value in given.items() if name not in own and name in fields}
    for name in given:
        if name not in own and name not in fields:
            near = difflib.get_close_matches(name, [*own, *fields], n=1)
            raise CommandError(
                f"{trainer.__name__} has no argument {name!r}", code="api-argument", where=name,
                fix=f"did you mean {near[0]!r}?" if near else f"see TRL's page of {trainer.__name__}",
            )  # fmt: skip
    return stay, {name: value for name, value in moved.items() if value is not None}


def with_moved(config: Any, moved: dict[str, Any]) -> Any:
    """The config with arguments given to the trainer. Raises CommandError api-argument where they contradict it."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, value in modern_names(type(config), moved).items():
        current = getattr(config, name)
        if current not in (defaults.get(name), value):
            raise CommandError(
                f"{name}={value!r} of the trainer and {name}={current!r} of its args contradict each other",
                code="api-argument", where=name, fix=f"give it once, in {type(config).__name__}",
            )  # fmt: skip
        setattr(config, name, value)
        if name == "max_length":
            config.length_given = True
    return config


def fit_to_model(config: Any, state: ModelState | None) -> Any:
    """Row length, precision and recomputation as the model was loaded; the libraries' defaults would say otherwise."""
    if state is None:
        return config
    if "max_length" in vars(config):
        given = getattr(config, "length_given", True)
        if not given or config.max_length is None or config.max_length > state.max_seq_length:
            if given and config.max_length is not None:
                LOG.warning("rows are cut at %d tokens, the max_seq_length given at loading", state.max_seq_length)
            config.max_length = state.max_seq_length
    _fit_precision(config, state)
    _set_aside(config, state)
    config.gradient_checkpointing = state.checkpointing
    config.gradient_checkpointing_kwargs = {"use_reentrant": False}
    return config


def _set_aside(config: Any, state: ModelState) -> None:
    """What a loaded model decides by itself, said where the config asks for something else."""
    asked = getattr(config, "recomputes_given", None)
    if asked is not None and asked != state.checkpointing:
        LOG.warning(
            "gradient_checkpointing=%s has no effect: use_gradient_checkpointing of get_peft_model decides, and is %s",
            asked, state.checkpointing,
        )  # fmt: skip
    for name in ("fp16_full_eval", "bf16_full_eval"):
        if getattr(config, name, False):
            LOG.warning("%s has no effect: it would round the trained weights; %s", name,
                        "evaluation computes in the model's own type")  # fmt: skip
            setattr(config, name, False)


def _fit_precision(config: Any, state: ModelState) -> None:
    """Autocast in the type the model computes in. Raises CommandError api-precision for fp16 asked of a bf16 model."""
    if config.use_cpu:
        return
    own = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(state.compute_dtype)
    if config.fp16 and state.fp16_overflows:
        LOG.warning("fp16=True is set aside: activations of this family leave fp16's range")
    elif config.fp16 and own == "bf16":
        raise CommandError(
            "fp16=True, but the model computes in bf16", code="api-precision", where="fp16",
            fix="set bf16=True instead, or load the model with dtype=torch.float16",
        )  # fmt: skip
    elif own is None and getattr(config, "precision_given", False):
        return  # fp32 weights, and the script wants autocast over them
    config.fp16, config.bf16 = own == "fp16", own == "bf16"
