"""AdamW over flat buffers: gradient norm, clipping and update without waiting for the GPU.

Formula, 8-bit states and sources: ``dropforge_kernels.ops.adamw``. A gradient norm that is not finite skips the step on
the device. Rates come from the schedule through a device value, so nothing about a step depends on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch
from dropforge_kernels.ops import adamw, adamw_state, gradient_norm
from dropforge_kernels.reference.adamw import AdamWState
from torch import nn

from dropforge.fast_step.flat import FlatParameters

Capture = Callable[[Callable[[], None]], tuple[torch.cuda.CUDAGraph | None, str]]
"""Work that has just run -> its graph, or None and why not (fast_step.graph)."""
SMALLEST_8_BIT = 4096
"""Smaller parameters keep 32-bit states (as in bitsandbytes): norms and biases are few and matter."""


class FlatAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's arithmetic in one launch per segment (parameter group, dtype, bits of state).

    It takes the place of parameters' ``data`` and ``grad``: keep gradients by ``zero_grad()``, which ignores
    ``set_to_none``. ``max_grad_norm`` clips inside ``step``; ``last_norm`` is the norm before clipping (0-d, on the
    device). Schedulers set ``group["lr"]`` as usual.

    Args:
        params: parameters or groups; a group may have its own lr, betas, eps, weight_decay.
        bits: 32, or 8 for blockwise 8-bit states (parameters under SMALLEST_8_BIT elements keep 32).
        max_grad_norm: None clips nothing.
        keep_32_bit: parameters that keep 32-bit states whatever their size (embeddings).
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        bits: int = 32,
        max_grad_norm: float | None = None,
        keep_32_bit: Iterable[nn.Parameter] = (),
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.max_grad_norm = max_grad_norm
        exempt = {id(parameter) for parameter in keep_32_bit}
        lists: list[list[nn.Parameter]] = []
        self._group_of: list[int] = []
        self._bits: list[int] = []
        for number, group in enumerate(self.param_groups):
            split: dict[tuple[torch.dtype, int], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                small = parameter.numel() < SMALLEST_8_BIT or id(parameter) in exempt
                split.setdefault((parameter.dtype, 32 if small else bits), []).append(parameter)
            for (_, width), parameters in split.items():
                lists.append(parameters)
                self._group_of.append(number)
                self._bits.append(width)
        self.flat = FlatParameters(lists)
        self._states = [
            adamw_state(segment.values, bits=width)
            for segment, width in zip(self.flat.segments, self._bits, strict=True)
        ]
        device = lists[0][0].device if lists else torch.device("cpu")
        self._rates = torch.zeros(len(self.param_groups), dtype=torch.float32, device=device)
        self._rates_set: list[float] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._capture: Capture | None = None
        self.why_not_captured = ""
        self.last_norm = torch.zeros((), dtype=torch.float32, device=device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every segment. closure is not supported (ValueError)."""
        if closure is not None:
            raise ValueError("FlatAdamW: a closure is not supported")
        self.set_rates()
        if self._graph is not None:
            self._graph.replay()
            return
        self.update()
        if self._capture is not None:
            self._graph, self.why_not_captured = self._capture(self.update)
            self._capture = None

    def capture_with(self, capture: Capture) -> None:
        """Replay the device's part of a step as one CUDA graph from the second step on; ``capture`` makes it.

        Groups' betas, eps and weight_decay are fixed from then on; rates go on following the schedule.
        """
        self._capture = capture

    def set_rates(self) -> None:
        """Copy the schedule's rates to the device, when they have changed."""
        rates = [float(group["lr"]) for group in self.param_groups]
        if rates == self._rates_set:
            return
        for number, rate in enumerate(rates):
            self._rates[number].fill_(rate)  # travels as an argument of the launch: no copy from pageable memory
        self._rates_set = rates

    @torch.no_grad()
    def update(self) -> None:
        """The device's part of ``step``; can be captured."""
        self.last_norm.copy_(self._norm())
        for segment, state, number in zip(self.flat.segments, self._states, self._group_of, strict=True):
            group = self.param_groups[number]
            adamw(
                segment.values,
                segment.grads,
                state,
                lr=self._rates[number],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                grad_norm=self.last_norm,
                max_norm=self.max_grad_norm,
            )

    def _norm(self) -> torch.Tensor:
        norms = [gradient_norm(buffer) for buffer in self.flat.grads.values()]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the flat gradients; the views stay whatever ``set_to_none`` says."""
        self.flat.zero_grad()

    def state_bytes(self) -> int:
        """Memory of the optimizer's states."""
        return sum(t.numel() * t.element_size() for state in self._states for t in _tensors(state).values())

    def state_dict(self) -> dict[str, Any]:
        """Flat states by segment, and the groups as torch packs them."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        return {
            "format": "dropforge-flat-adamw-1",
            "segments": [_tensors(state) for state in self._states],
            "bits": list(self._bits),
            "param_groups": groups,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly where the saved optimizer was.

        Raises ValueError when it was saved by another optimizer, or for other parameters.
        """
        saved = state_dict.get("segments")
        if saved is None:
            raise ValueError("FlatAdamW: these states were saved by another optimizer")
        if state_dict["bits"] != self._bits or len(state_dict["param_groups"]) != len(self.param_groups):
            raise ValueError("FlatAdamW: the saved states belong to other parameters or other bits")
        for mine, theirs in zip(self._states, saved, strict=True):
            for name, tensor in _tensors(mine).items():
                if tensor.shape != theirs[name].shape:
                    raise ValueError(f"FlatAdamW: {name} has {tuple(tensor.shape)}, saved {tuple(theirs[name].shape)}")
                tensor.copy_(theirs[name])
        for group, other in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(other)


def _tensors(state: AdamWState) -> dict[str, torch.Tensor]:
    named = {field.name: getattr(state, field.name) for field in fields(state)}
    return {name: tensor for name, tensor in named.items() if tensor is not None}
