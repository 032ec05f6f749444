"""After training: weaken an adapter, or lie between the base and the trained weights.

For LoRA both are the same thing: base + f s B A is the mean of base and trained model with weights 1 - f and f, and is
what a scale of f s computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.errors import CommandError, ModelError

if TYPE_CHECKING:
    import torch


def scale_adapter(model: Any, factor: float, *, adapter: str = "default") -> int:
    """Multiply the strength of a LoRA adapter by `factor`, in the model and in what is saved. Returns its layers.

    The scale of every layer and lora_alpha (and alpha_pattern) of the config change, B and A do not, so a factor of
    1 / f undoes f. Modules that are trained in full (modules_to_save) and DoRA's magnitudes do not take part.

    Raises CommandError api-scaling: no adapter, one with DoRA or full modules, or a factor below 0.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if not isinstance(model, PeftModel) or adapter not in model.peft_config:
        raise _bad(f"this model has no adapter {adapter!r}", "scale it while the adapter is attached")
    config: Any = model.peft_config[adapter]
    if factor < 0:
        raise _bad(f"the factor is {factor}", "give a factor from 0; 0.5 halves what was learnt")
    if config.modules_to_save or config.use_dora:
        raise _bad(
            "part of what was trained is no low-rank product", "use average_weights on the merged and the base model"
        )
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and adapter in m.scaling]
    for layer in layers:
        layer.scaling[adapter] *= factor
    config.lora_alpha = config.lora_alpha * factor
    config.alpha_pattern = {name: value * factor for name, value in config.alpha_pattern.items()}
    return len(layers)


def average_weights(
    first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor], *, weight: float = 0.5
) -> dict[str, torch.Tensor]:
    """(1 - weight) first + weight second, tensor by tensor, computed in fp32, in the types of `first`.

    first, second: state dicts of two models of one architecture, say the base and a fully fine-tuned one (Wortsman et
    al. 2022); no quantised weights. Raises ModelError average-mismatch; CommandError api-scaling.
    """
    if not 0 <= weight <= 1:
        raise _bad(f"the weight is {weight}", "give a weight from 0 (first) to 1 (second)")
    different = sorted(set(first) ^ set(second))
    different += [name for name in first if name in second and first[name].shape != second[name].shape]
    if different:
        raise ModelError(
            "the two models are not of one architecture", code="average-mismatch", where=different[0],
            why=f"{len(different)} tensors are in one only or differ in shape", fix="average a model with its base",
        )  # fmt: skip
    return {
        name: value.float().lerp(second[name].to(value.device).float(), weight).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in first.items()
    }


def average_models(first: str | Path, second: str | Path, target: str | Path, *, weight: float = 0.5) -> None:
    """The same for two model folders, file by file of the first; `target` gets its config and tokenizer too.

    Raises as average_weights; ModelError model-incomplete for a folder without safetensors.
    """
    import shutil

    from safetensors import safe_open
    from safetensors.torch import save_file

    one, two, goal = Path(first), Path(second), Path(target)
    places = {name: path for path in sorted(two.glob("*.safetensors")) for name in _names(path)}
    files = sorted(one.glob("*.safetensors"))
    for folder, found in ((one, files), (two, places)):
        if not found:
            raise ModelError("the folder holds no safetensors weights", code="model-incomplete", where=str(folder))
    if {name for path in files for name in _names(path)} != set(places):
        raise ModelError("the two models are not of one architecture", code="average-mismatch", where=str(two))
    goal.mkdir(parents=True)
    for path in files:
        with safe_open(path, framework="pt") as file:
            mine = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dict)
        theirs = {}
        for name in mine:
            with safe_open(places[name], framework="pt") as file:
                theirs[name] = file.get_tensor(name)
        save_file(average_weights(mine, theirs, weight=weight), goal / path.name, metadata={"format": "pt"})
    for path in one.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, goal / path.name)


def _names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _bad(what: str, fix: str) -> CommandError:
    return CommandError(f"scaling: {what}", code="api-scaling", where="scale_adapter, average_weights", fix=fix)
