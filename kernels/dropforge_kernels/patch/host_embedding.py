"""Moves the frozen input embedding of one model to host memory, and back.

The module stays the same object under the same name, and its weight stays in the state dict; but it is no parameter
meanwhile, so that ``model.to(device)`` of a trainer does not fetch it and ``model.device`` is that of the layers.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import nn

from dropforge_kernels.modules.host_memory import host_available
from dropforge_kernels.ops._host_rows import host_rows
from dropforge_kernels.patch.spec import PatchError

NAME = "offload_embedding"


class OffloadError(PatchError):
    """The embedding cannot be moved; the text says why."""


class HostEmbedding:
    """The embedding of one model, on the host until ``restore``, which may be called twice."""

    def __init__(self, module: nn.Embedding) -> None:
        self.module = module
        self.weight: nn.Parameter = module.weight
        self.device = self.weight.device
        self.pinned = self.device.type == "cuda"
        self.weight.data = self._on_host()
        # No parameter any more, but still what ``module.weight`` gives.
        del module._parameters["weight"]
        module.__dict__["weight"] = self.weight
        self._hooks = [module.register_state_dict_post_hook(_save), module.register_load_state_dict_pre_hook(_load)]
        self._forward = types.MethodType(self._lookup(), module)
        module.__dict__["forward"] = self._forward

    def _on_host(self) -> torch.Tensor:
        if not self.pinned:
            return self.weight.data.cpu().contiguous()
        table = torch.empty(self.weight.shape, dtype=self.weight.dtype, pin_memory=True)
        return table.copy_(self.weight.data)

    def _lookup(self) -> Any:
        plain, pinned = type(self.module).forward, self.pinned

        # Whoever wraps the forward later keeps hold of this function: after ``restore`` it computes as the class.
        @functools.wraps(plain)
        def lookup(module: nn.Embedding, input: torch.Tensor) -> torch.Tensor:
            if "weight" in vars(module):
                return host_rows(module.weight, input, pinned=pinned)
            return plain(module, input)

        return lookup

    def restore(self) -> None:
        """The weight is a parameter on its old device again."""
        if self.module.__dict__.pop("weight", None) is None:
            return
        self.weight.data = self.weight.data.to(self.device)
        self.module._parameters["weight"] = self.weight
        for hook in self._hooks:
            hook.remove()
        if self.module.__dict__.get("forward") is self._forward:
            del self.module.__dict__["forward"]

    def line(self) -> str:
        """For reports."""
        size = self.weight.numel() * self.weight.element_size() / 2**30
        kind = "pinned host memory" if self.pinned else "host memory, where it was"
        return f"the embedding's {size:.2f} GiB lie in {kind}"


def embedding_to_host(model: nn.Module) -> HostEmbedding:
    """The model's input embedding, moved. Raises OffloadError: no plain, frozen, untied table of its
    own, or no room for it.
    """
    table: Any = getattr(model, "get_input_embeddings", lambda: None)()
    reason = _obstacle(model, table)
    if reason is not None:
        raise OffloadError(f"{NAME}: {reason}; leave {NAME} out")
    return HostEmbedding(table)


def _obstacle(model: nn.Module, table: Any) -> str | None:
    if type(table) is not nn.Embedding:
        kind = "no input embedding" if table is None else f"a {type(table).__name__} for its embedding"
        return f"the model has {kind}, not a plain table"
    if "weight" not in table._parameters:
        return "the embedding lies in host memory already"
    if table.weight.requires_grad:
        return "the embedding is trained, and its gradient would have to go back to the host in every step"
    if sum(other is table.weight for _, other in model.named_parameters(remove_duplicate=False)) > 1:
        return "the head is the embedding's own matrix, which the GPU needs for the loss"
    if "forward" in vars(table):
        return "the embedding's forward was already replaced"
    size = table.weight.numel() * table.weight.element_size()
    if table.weight.is_cuda and size > host_available():
        return f"its {size / 2**30:.1f} GiB do not fit into the {host_available() / 2**30:.1f} GiB of free host memory"
    return None


def _save(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state[f"{prefix}weight"] = module.weight.detach()


def _load(
    module: Any, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str],
    unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    new = state.pop(f"{prefix}weight", None)
    if new is None:
        missing.append(f"{prefix}weight")
    elif new.shape != module.weight.shape:
        errors.append(f"size mismatch for {prefix}weight: {tuple(new.shape)} for {tuple(module.weight.shape)}")
    else:
        module.weight.data.copy_(new)
