"""The same adapter values in every engine, B included: with B = 0 the gradients of A vanish and parity is blind."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator

import torch
from torch import nn

B_STD = 0.01
_KEY = re.compile(r"layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.")


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """("3.q_proj.A", parameter) of every LoRA matrix, whatever wraps the model."""
    for name, parameter in model.named_parameters():
        found = _KEY.search(name)
        if found:
            yield ".".join(found.groups()), parameter


@torch.no_grad()
def reset(model: nn.Module) -> int:
    """Gives each matrix its own reproducible normal values; returns how many matrices there are."""
    count = 0
    for key, parameter in adapter_parameters(model):
        seeded = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        std = B_STD if key.endswith("B") else 1 / math.sqrt(3 * parameter.shape[1])
        parameter.copy_(torch.randn(parameter.shape, generator=seeded) * std)
        parameter.grad = None
        count += 1
    return count


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """fp32 copies on the CPU, by key; raises AssertionError when a matrix has none."""
    found = {}
    for key, parameter in adapter_parameters(model):
        assert parameter.grad is not None, f"{key} has no gradient"
        found[key] = parameter.grad.detach().float().cpu()
    return found


def gradient_norm(model: nn.Module) -> float:
    """L2 norm over all adapter gradients."""
    grads = [p.grad.detach().float() for _, p in adapter_parameters(model) if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))) if grads else 0.0
