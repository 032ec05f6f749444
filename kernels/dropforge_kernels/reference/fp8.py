"""FP8 (e4m3) quantisation by rows and by 128 x 128 blocks in plain PyTorch; see ops/fp8.py."""

from __future__ import annotations

import torch

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-12
BLOCK = 128


def _codes(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    return (x * (torch.full_like(amax, E4M3_MAX) / amax)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _scale(amax: torch.Tensor) -> torch.Tensor:
    # A Python number here (and in _codes) would make torch multiply by a rounded reciprocal; two tensors are divided.
    return amax / torch.full_like(amax, E4M3_MAX)


def _tiles(x: torch.Tensor) -> torch.Tensor:
    """(R, C) padded with zeros to whole blocks, as (R / 128, C / 128, 128, 128)."""
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return padded.view(-(-rows // BLOCK), BLOCK, -(-columns // BLOCK), BLOCK).transpose(1, 2)


def fp8_quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As ops.fp8_quantize_rows."""
    wide = x.float()
    amax = wide.abs().amax(dim=-1) if x.shape[-1] else wide.new_zeros(x.shape[:-1])
    amax = torch.where(amax < SMALLEST_AMAX, torch.full_like(amax, SMALLEST_AMAX), amax)  # keeps NaN
    return _codes(wide, amax[..., None]), _scale(amax)


def fp8_quantize_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As ops.fp8_quantize_blocks."""
    tiles = _tiles(x.float())
    amax = tiles.abs().amax(dim=(2, 3)) if tiles.numel() else tiles.new_zeros(tiles.shape[:2])
    amax = torch.where(amax < SMALLEST_AMAX, torch.full_like(amax, SMALLEST_AMAX), amax)
    return _codes(x.float(), _spread(amax, x.shape)), _scale(amax)


def fp8_dequantize_rows(
    codes: torch.Tensor, scale: torch.Tensor, *, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """As ops.fp8_dequantize_rows."""
    values = (codes.float() * scale[..., None]).to(dtype)
    return values if out is None else out.copy_(values)


def fp8_dequantize_blocks(
    codes: torch.Tensor, scale: torch.Tensor, *, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """As ops.fp8_dequantize_blocks."""
    values = (codes.float() * _spread(scale, codes.shape)).to(dtype)
    return values if out is None else out.copy_(values)


def _spread(per_block: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """One value per block to one per element."""
    return per_block.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]
