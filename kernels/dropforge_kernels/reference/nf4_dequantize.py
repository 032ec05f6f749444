"""NF4 dequantisation in plain PyTorch; see ops/nf4_dequantize.py for the arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def nf4_dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int = 64,
    nested_absmax: torch.Tensor | None = None,
    nested_code: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    nested_blocksize: int = 256,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ops.nf4_dequantize."""
    result = torch.empty(tuple(shape), dtype=dtype, device=packed.device) if out is None else out
    numel = result.numel()
    if numel == 0:
        return result
    scale = absmax
    if nested_absmax is not None:
        per_block = nested_absmax.repeat_interleave(nested_blocksize)[: absmax.numel()]
        scale = nested_code[absmax.long()] * per_block + nested_offset  # rounded twice, as bitsandbytes does
    byte = packed.reshape(-1)
    nibbles = torch.stack((byte >> 4, byte & 15), dim=1).reshape(-1)[:numel].long()
    values = code[nibbles] * scale.repeat_interleave(blocksize)[:numel]
    return result.copy_(values.view(result.shape))
