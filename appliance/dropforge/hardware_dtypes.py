"""Which 16-bit type this machine trains in."""

from __future__ import annotations

import torch


def is_bfloat16_supported() -> bool:
    """True when there is a GPU that computes in bf16 natively. False on a CPU, where training runs in fp32."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


is_bf16_supported = is_bfloat16_supported


def default_dtype() -> torch.dtype:
    """bf16 or fp16 on a GPU, fp32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if is_bfloat16_supported() else torch.float16
