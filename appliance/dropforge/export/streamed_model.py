"""A causal language model whose weights stay on disk: each is read when its module runs and dropped right after.

Memory is bounded by activations and one piece of a matrix, not by the model. The forward pass is transformers' (and
PEFT's) own: only where a module's weights come from is changed. Arithmetic is float32.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.export.tensor_reader import TensorReader
from dropforge.models.pictures import auto_class

if TYPE_CHECKING:
    import torch

PIECE_BYTES = 32 * 2**20
"""float32 bytes of a matrix that are multiplied at a time."""
PEFT_PREFIX = "base_model.model."
WRAPPED = (".base_layer.", ".original_module.")

Weight = Callable[[str, int, int], "torch.Tensor"]
"""(name in the file, first row, last row + 1) -> those rows, any float dtype."""


class CannotStream(Exception):  # noqa: N818  (the caller chooses another way; no user sees it)
    """The model keeps its weights under other names, or in other shapes, than its files do."""


@contextmanager
def streamed_model(folder: Path, *, adapter: Path | None = None, weight: Weight | None = None) -> Iterator[Any]:
    """The model in `folder`, with PEFT's adapter attached; `weight` replaces how matrices of linear layers are read.

    Raises CannotStream before anything runs when a weight of the model has no tensor of its shape in the files.
    """
    from dropforge.export.reference import quiet_libraries

    reader = TensorReader(folder, as_loaded=True)
    with quiet_libraries():
        model = _empty_model(folder)
        if adapter is not None:
            model = _with_adapter(model, adapter)
    _attach(model, reader, weight or reader.rows)
    try:
        yield model.eval()
    finally:
        del model
        gc.collect()


def _empty_model(folder: Path) -> Any:
    """transformers' model without weights, its computed buffers in place."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        return auto_class(folder).from_config(config, dtype=torch.float32, trust_remote_code=False)


def _with_adapter(model: Any, adapter: Path) -> Any:
    """PEFT's wrapper with the adapter's own weights in memory; the base stays empty."""
    from accelerate import init_empty_weights
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    config = PeftConfig.from_pretrained(str(adapter))
    config.inference_mode = True
    state = load_peft_weights(str(adapter), device="cpu")
    vocabulary = [value for name, value in state.items() if name.endswith(("embed_tokens.weight", "base_layer.weight"))]
    if any(value.shape[0] != model.get_input_embeddings().weight.shape[0] for value in vocabulary):
        raise CannotStream("the adapter changes the size of the vocabulary")
    with init_empty_weights(include_buffers=False):
        wrapped = get_peft_model(model, config)
    for name, parameter in list(wrapped.named_parameters()):
        if ".lora_" in name or ".modules_to_save." in name or name in state:
            _set(wrapped, name, parameter.new_zeros(parameter.shape, device="cpu"))
    set_peft_model_state_dict(wrapped, {name: value.float() for name, value in state.items()})
    return wrapped


def _set(model: Any, name: str, value: torch.Tensor) -> None:
    import torch

    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    parameter = torch.nn.Parameter(value, requires_grad=False)
    if isinstance(owner, torch.nn.ParameterDict):
        owner[attribute] = parameter
    else:
        setattr(owner, attribute, parameter)


def file_name(name: str, reader: TensorReader, *, tied: dict[str, str]) -> str:
    """Name in the files of a parameter called `name` in the (wrapped) model. Raises CannotStream without one."""
    plain = name.removeprefix(PEFT_PREFIX)
    for wrapper in WRAPPED:
        plain = plain.replace(wrapper, ".")
    found = plain if plain in reader else tied.get(plain, "")
    if found not in reader:
        raise CannotStream(f"{plain} is not in the files under this name")
    return found


def _attach(model: Any, reader: TensorReader, weight: Weight) -> None:
    """Give every module that has empty parameters a way to them; frees them after each use."""
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for path, module in model.named_modules():
        empty = {name: part for name, part in module.named_parameters(recurse=False) if part.device.type == "meta"}
        if not empty:
            continue
        places = {name: file_name(f"{path}.{name}", reader, tied=tied) for name in empty}
        for name, part in empty.items():
            if tuple(part.shape) != reader.shape(places[name]):
                raise CannotStream(f"{places[name]} has another shape in the files")
        _give_weights(module, places, reader, weight)
    _give_dora(model)


def _give_weights(module: Any, places: dict[str, str], reader: TensorReader, weight: Weight) -> None:
    import torch

    plain = type(module) is torch.nn.Linear
    if plain and "weight" in places:
        module.forward = _StreamedLinear(module, places, reader, weight)
        return
    empty = {name: getattr(module, name) for name in places}

    def fill(module: Any, inputs: tuple[Any, ...]) -> None:
        for name, place in places.items():
            if isinstance(module, torch.nn.Embedding):
                value = _looked_up(reader, place, inputs[0])
            else:
                value = reader.whole(place).float()
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))

    def drop(module: Any, inputs: Any, output: Any) -> None:
        for name, nothing in empty.items():
            setattr(module, name, nothing)

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(drop)


def _looked_up(reader: TensorReader, place: str, ids: torch.Tensor) -> torch.Tensor:
    """The embedding as float32 with only the asked rows filled: pages that are never written take no memory."""
    import torch

    table = torch.empty(reader.shape(place), dtype=torch.float32)
    for row in ids.unique().tolist():
        table[row] = reader.rows(place, row, row + 1)[0].float()
    return table


class _StreamedLinear:
    """forward of a linear layer, a piece of its rows at a time."""

    def __init__(self, module: Any, places: dict[str, str], reader: TensorReader, weight: Weight) -> None:
        self.place = places["weight"]
        self.weight = weight
        self._bias = places.get("bias")
        self._module = module
        self._reader = reader

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        rows, columns = self._reader.shape(self.place)
        step = max(1, PIECE_BYTES // (4 * columns))
        out = x.new_empty((*x.shape[:-1], rows))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            out[..., start:stop] = torch.nn.functional.linear(x, self.weight(self.place, start, stop).to(x.dtype))
        if self._bias is not None:
            out += self._reader.whole(self._bias).to(x.dtype)
        elif self._module.bias is not None:
            out += self._module.bias
        return out


def base_weight(layer: Any) -> torch.Tensor:
    """float32 weight of a LoRA layer's base, read from the files when it is not in memory."""
    base = layer.get_base_layer()
    weight: torch.Tensor = base.weight
    if weight.device.type != "meta":
        return weight
    forward: _StreamedLinear = base.forward
    return forward.weight(forward.place, 0, weight.shape[0]).float()


def _give_dora(model: Any) -> None:
    """DoRA's forward reads the base weight itself, so it is there while the layer runs."""
    import torch

    for module in model.modules():
        if not getattr(module, "lora_magnitude_vector", None):
            continue
        base = module.get_base_layer()
        if type(base) is not torch.nn.Linear:
            raise CannotStream("DoRA on a layer that is no plain linear layer")
        empty = base.weight

        def fill(module: Any, inputs: Any) -> None:
            base = module.get_base_layer()
            base.weight = torch.nn.Parameter(base_weight(module), requires_grad=False)

        def drop(module: Any, inputs: Any, output: Any, empty: Any = empty) -> None:
            module.get_base_layer().weight = empty

        module.register_forward_pre_hook(fill)
        module.register_forward_hook(drop)
