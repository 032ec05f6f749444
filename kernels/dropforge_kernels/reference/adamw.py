"""AdamW over a flat buffer in plain PyTorch, 32-bit and blockwise 8-bit states; see ops/adamw.py for the formula."""

from __future__ import annotations

from dataclasses import dataclass

import torch

STATE_BLOCK = 256
SMALLEST_ABSMAX = 1e-37


@dataclass(frozen=True)
class AdamWState:
    """What AdamW keeps between steps. 32 bits: exp_avg and exp_avg_sq fp32 (n). 8 bits: uint8 (n) codes of the signed
    and unsigned ``dynamic_map``, times one absmax (fp32) per 256 values. ``step``: int32 (2): completed steps, and a
    counter that is 0 between steps.
    """

    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor
    absmax: torch.Tensor | None = None
    absmax_sq: torch.Tensor | None = None


def dynamic_map(*, signed: bool) -> torch.Tensor:
    """The 256 values of the 8-bit dynamic type, ascending, fp32: decade i in 0..6 ends at 10^(i - 6) and is cut into
    2^i (unsigned: 2^(i + 1)) equal cells between a tenth of its end and its end, represented by their middles; plus 0
    and 1. Source: Dettmers 2016 (arXiv:1511.04561), Dettmers et al. 2022 (arXiv:2110.02861); equals bitsandbytes'
    create_dynamic_map.
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (i if signed else i + 1) + 1)
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def quantize_state(values: torch.Tensor, *, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8, absmax per block) of a flat fp32 tensor: nearest code, but an unsigned value above 0 never
    becomes 0.
    """
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % STATE_BLOCK)).view(-1, STATE_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    relative = blocks / absmax.clamp_min(SMALLEST_ABSMAX)[:, None]
    code = dynamic_map(signed=signed).to(values.device)
    codes = torch.bucketize(relative, (code[1:] + code[:-1]) / 2, right=True)
    if not signed:
        codes = torch.where((relative > 0) & (codes == 0), 1, codes)
    return codes.to(torch.uint8).view(-1)[: values.numel()], absmax


def dequantize_state(codes: torch.Tensor, absmax: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """The fp32 values of a quantised state."""
    code = dynamic_map(signed=signed).to(codes.device)
    return code[codes.long()] * absmax.repeat_interleave(STATE_BLOCK)[: codes.numel()]


def gradient_norm(grad: torch.Tensor) -> torch.Tensor:
    """As ops.gradient_norm."""
    return torch.linalg.vector_norm(grad.reshape(-1).double()).float()


def adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    state: AdamWState,
    *,
    lr: float | torch.Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_norm: torch.Tensor | None = None,
    max_norm: float | None = None,
    low_precision: torch.Tensor | None = None,
) -> None:
    """As ops.adamw."""
    g, p = grad.float(), param.float()
    if grad_norm is not None:
        if not bool(torch.isfinite(grad_norm)):
            return
        if max_norm is not None:
            g = g * (max_norm / (grad_norm + 1e-6)).clamp(max=1.0)
    eight = state.absmax is not None
    m = dequantize_state(state.exp_avg, state.absmax, signed=True) if eight else state.exp_avg
    v = dequantize_state(state.exp_avg_sq, state.absmax_sq, signed=False) if eight else state.exp_avg_sq
    step = int(state.step[0]) + 1
    m = m + (1 - betas[0]) * (g - m)
    v = v + (1 - betas[1]) * (g * g - v)
    rate = torch.as_tensor(lr, dtype=torch.float32, device=param.device)
    denominator = v.sqrt() / (1 - betas[1] ** step) ** 0.5 + eps
    p = p * (1 - rate * weight_decay) - rate / (1 - betas[0] ** step) * m / denominator
    param.copy_(p)
    if low_precision is not None:
        low_precision.copy_(p)
    state.step[0] += 1
    if not eight:
        state.exp_avg.copy_(m)
        state.exp_avg_sq.copy_(v)
        return
    for codes, absmax, value, signed in (
        (state.exp_avg, state.absmax, m, True),
        (state.exp_avg_sq, state.absmax_sq, v, False),
    ):
        new_codes, new_absmax = quantize_state(value, signed=signed)
        codes.copy_(new_codes)
        absmax.copy_(new_absmax)
