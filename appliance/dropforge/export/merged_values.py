"""PEFT's merged tensors of a streamed model, one at a time: the truth for the values of the merged folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.export.merge import HEAD
from dropforge.export.streamed_model import PEFT_PREFIX, WRAPPED
from dropforge.export.tensor_reader import TensorReader

if TYPE_CHECKING:
    import torch


class StreamedValues(Mapping[str, "torch.Tensor"]):
    """Name in a merged folder -> PEFT's merged tensor, computed when it is asked for and not kept."""

    def __init__(self, model: Any, base: Path) -> None:
        self._reader = TensorReader(base, as_loaded=True)
        self._modules: dict[str, Any] = {}
        for path, module in model.named_modules():
            # A wrapper comes before the layer inside it, and is what knows how to merge.
            self._modules.setdefault(_plain(path + ".").rstrip("."), module)
        tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self._names = {_plain(name) for name, _ in model.named_parameters()}
        self._names = {name for name in self._names if ".lora_" not in name and ".modules_to_save" not in name}
        self._names |= {name for name in self._reader.names if name not in self._names and name in model.state_dict()}
        self.tied = {HEAD: tied[HEAD]} if HEAD in tied and HEAD not in self._reader else {}
        """The head that is one tensor with the embedding in the base, and that embedding."""
        self._names |= set(self.tied)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        if name not in self._names:
            raise KeyError(name)
        path, _, part = name.rpartition(".")
        module = self._modules[path]
        saved = _saved(module)
        if saved is not None:
            value: torch.Tensor = saved.state_dict()[part]
            return value
        layer = _adapted(module)
        if layer is None or part != "weight":
            return self._reader.whole(self.tied.get(name, name))
        base = layer.get_base_layer()
        kept = base.weight
        inside = kept if kept.device.type != "meta" else self._reader.whole(self.tied.get(name, name))
        base.weight = torch.nn.Parameter(inside.detach().float().clone(), requires_grad=False)
        try:
            with torch.no_grad():
                layer.merge()
            return base.weight.detach()
        finally:
            layer.merged_adapters.clear()
            base.weight = kept


def peft_values(model: Any, *, base: Path) -> StreamedValues:
    """The merged tensors of `model`, a streamed model whose untouched weights are in the folder `base`."""
    return StreamedValues(model, base)


def _plain(name: str) -> str:
    """Name without what PEFT's wrappers put into it."""
    name = name.removeprefix(PEFT_PREFIX)
    for wrapper in WRAPPED:
        name = name.replace(wrapper, ".")
    return name


def _saved(module: Any) -> Any:
    """The trained copy inside PEFT's wrapper of a module that was trained in full, else None."""
    from peft.utils.other import ModulesToSaveWrapper

    return module.modules_to_save["default"] if isinstance(module, ModulesToSaveWrapper) else None


def _adapted(module: Any) -> Any:
    """The module when it is a LoRA layer, else None."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return module if isinstance(module, BaseTunerLayer) else None
