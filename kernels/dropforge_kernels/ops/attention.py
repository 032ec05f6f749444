"""Attention for packed, windowed, soft-capped, sink and plain cases: chooses among what the machine has, with a
reason.

Legend: B batch, S tokens of a row, T packed tokens, H query heads, G key-value heads (H a multiple of G), D head
width.

Forward:   P = softmax(cap(scale * q k^T) over the visible keys and the sink);   out = P v
           cap(s) = softcap * tanh(s / softcap); visible: the same document, not later, not further back than the
           window
Source: Dao 2023 (arXiv 2307.08691) for the kernels; sinks: see ``_sinks``.
"""

from __future__ import annotations

from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask

from dropforge_kernels import checks, reference
from dropforge_kernels.dispatch import Backend, choose
from dropforge_kernels.ops._attention_fa4 import fa4_attention, fa4_missing
from dropforge_kernels.ops._attention_flash import flash_attention
from dropforge_kernels.ops._attention_flex import block_mask, flex
from dropforge_kernels.ops._common import as_autocast


class AttentionBackend(StrEnum):
    """What can compute attention."""

    CUDNN = "cudnn"
    """cuDNN's fused attention through torch: dense rows only."""
    FLASH = "flash"
    """FlashAttention 2 in torch, variable length: packed or dense, windows, sinks."""
    FLEX = "flex"
    """Flex attention, compiled: everything, including soft-capped scores."""
    FA4 = "fa4"
    """FlashAttention 4 where the package flash-attn-4 is installed: everything packed, compiled by itself."""
    REFERENCE = "reference"
    """The whole score matrix in plain PyTorch: the CPU path."""


class Case(NamedTuple):
    """What a call asks for, as far as the choice depends on it."""

    packed: bool
    window: bool
    softcap: bool
    sinks: bool
    dtype: torch.dtype
    width: int
    longest: int = 0  # upper bound of the document lengths of a packed row
    mask: bool = False  # the caller has built flex attention's block mask
    compiling: bool = False  # torch.compile traces the call

    @property
    def kind(self) -> str:
        """The row of the preference table."""
        if self.softcap:
            return "softcap"
        if self.sinks:
            return "sinks"
        if self.window:
            return "window"
        if self.packed:
            return "packed_long" if self.mask and self.longest >= LONG and self.width <= 128 else "packed"
        return "plain"


class AttentionChoice(NamedTuple):
    """The backend of a case, and why: its place in the table, and why each one before it was passed over."""

    backend: AttentionBackend
    reason: str


LONG = 2048
PREFERENCE: dict[str, tuple[AttentionBackend, ...]] = {
    "plain": (AttentionBackend.CUDNN, AttentionBackend.FLASH, AttentionBackend.FLEX),
    "packed": (AttentionBackend.FA4, AttentionBackend.FLASH, AttentionBackend.FLEX),
    "packed_long": (AttentionBackend.FA4, AttentionBackend.FLEX, AttentionBackend.FLASH),
    "window": (AttentionBackend.FA4, AttentionBackend.FLASH, AttentionBackend.FLEX),
    "sinks": (AttentionBackend.FA4, AttentionBackend.FLASH, AttentionBackend.FLEX),
    "softcap": (AttentionBackend.FA4, AttentionBackend.FLEX),
}
"""Order of preference on CUDA, measured on an H200 (docs/reference/kernels.md), forward and backward together: cuDNN
is 1.6 to 1.9 times as fast as FlashAttention 2 on dense rows. FlashAttention 4, where it is installed, is 1.4 to 2
times as fast as anything else on packed rows and windows. Without it, flex attention beats FlashAttention 2 from
documents of 2,048 tokens on (by 12% to 22%, for heads of at most 128) when its mask is there already, and loses with
windows, sinks and wide heads. The reference comes last everywhere: it holds the whole score matrix.
"""

HALVES = (torch.bfloat16, torch.float16)


def refusal(backend: AttentionBackend, case: Case) -> str | None:
    """Why this backend cannot do the case, or None."""
    if backend is AttentionBackend.REFERENCE:
        return None
    if backend is AttentionBackend.FLEX:
        return None if case.width >= 16 else f"needs a head width of at least 16, not {case.width}"
    if case.dtype not in HALVES:
        return f"needs bf16 or fp16, not {str(case.dtype).removeprefix('torch.')}"
    if case.softcap and backend is not AttentionBackend.FA4:
        return "has no soft-capped scores"
    if case.width % 8:
        return f"needs a head width that is a multiple of 8, not {case.width}"
    if backend is AttentionBackend.CUDNN:
        if case.packed or case.window or case.sinks:
            return "is used for dense rows without window and sinks only"
        return None if case.width <= 128 else f"needs a head width of at most 128, not {case.width}"
    if backend is AttentionBackend.FA4:
        if case.compiling:
            return "cannot be traced by torch.compile"
        if (why := fa4_missing()) is not None:
            return why
    return None if case.width <= 256 else f"needs a head width of at most 256, not {case.width}"


def choose_attention(case: Case, *, cuda: bool, force: AttentionBackend | str | None = None) -> AttentionChoice:
    """The backend of a case. ``force`` names one; ValueError says why if it cannot do the case."""
    if force is not None:
        backend = AttentionBackend(force)
        why_not = refusal(backend, case)
        if why_not is None and not cuda and backend is not AttentionBackend.REFERENCE:
            why_not = "needs a CUDA device"
        if why_not is not None:
            raise ValueError(f"attention: backend {backend} {why_not}")
        return AttentionChoice(backend, "named by the caller")
    if not cuda:
        return AttentionChoice(AttentionBackend.REFERENCE, "tensors are not on a CUDA device")
    passed = []
    for backend in PREFERENCE[case.kind]:
        why_not = refusal(backend, case)
        if why_not is None:
            skipped = "".join(f"; {name} {text}" for name, text in passed)
            return AttentionChoice(backend, f"first for {case.kind} attention that can do it{skipped}")
        passed.append((backend, why_not))
    skipped = "; ".join(f"{name} {text}" for name, text in passed)
    return AttentionChoice(AttentionBackend.REFERENCE, f"nothing faster can do it: {skipped}")


def _check(q, k, v, cu_seqlens, max_seqlen, window, softcap, sinks, validate):
    op = "attention"
    checks.check_dtype(op, "q", q)
    for name, tensor in (("k", k), ("v", v)):
        checks.check_same_dtype(op, name, tensor, "q", q)
    if q.dim() not in (3, 4) or k.dim() != q.dim():
        raise ValueError(
            f"{op}: q and k must both be (B, S, heads, D) or packed (T, heads, D); "
            f"received {tuple(q.shape)} and {tuple(k.shape)}"
        )
    checks.check_shape(op, "k", k, (*q.shape[:-2], "G", q.shape[-1]))
    checks.check_same_shape(op, "v", v, "k", k)
    heads, groups = q.shape[-2], k.shape[-2]
    if groups == 0 or heads % groups:
        raise ValueError(f"{op}: the heads of q must be a multiple of those of k; received {heads} and {groups}")
    if (q.dim() == 3) != (cu_seqlens is not None):
        raise ValueError(f"{op}: cu_seqlens goes with packed (T, heads, D) tensors; received shape {tuple(q.shape)}")
    if cu_seqlens is not None:
        checks.check_same_device(op, q=q, cu_seqlens=cu_seqlens)
        checks.check_cu_seqlens(op, "cu_seqlens", cu_seqlens, q.shape[0], values=validate)
        if max_seqlen is None:
            raise ValueError(f"{op}: max_seqlen (an upper bound of the document lengths) is needed with cu_seqlens")
    if window is not None:
        checks.check_positive(op, "window", window)
    if softcap is not None:
        checks.check_positive(op, "softcap", softcap)
    if sinks is not None:
        checks.check_dtype(op, "sinks", sinks)
        checks.check_shape(op, "sinks", sinks, (heads,))


def _equal_documents(batch: int, tokens: int, device: torch.device) -> torch.Tensor:
    """cu_seqlens of dense rows, so that they can use the variable-length kernel; kept for the next layer."""
    # A tensor made during capture belongs to that graph's memory and must not be kept.
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return _new_equal_documents(batch, tokens, device)
    return _kept_equal_documents(batch, tokens, device)


def _new_equal_documents(batch: int, tokens: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=device)


_kept_equal_documents = lru_cache(maxsize=32)(_new_equal_documents)


def _run_cudnn(q, k, v, causal, scale):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)),
            is_causal=causal,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
    return out.transpose(1, 2)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    mask: BlockMask | None = None,
    validate: bool = True,
    backend: AttentionBackend | str | None = None,
) -> torch.Tensor:
    """Softmax attention, grouped heads included, by the best backend for the case.

    Args:
        q: (B, S, H, D), or packed (T, H, D) with ``cu_seqlens``. k, v: the same with G heads. bf16 or fp16 for the
            fast backends; fp32 runs in flex attention. Under autocast all three are cast, as torch's own attention
            does.
        causal: a query sees no later key. scale: of the scores; None = 1 / sqrt(D).
        cu_seqlens: int32 (documents + 1,): where documents start and end; zero-length documents are fine.
            max_seqlen: an upper bound of their lengths (a bucket's bound keeps CUDA graphs valid).
        window: number of keys a query sees, its own included (transformers' ``sliding_window``); None = all.
        softcap: bound of the scores (Gemma 2). sinks: (H,) one learned score per head (gpt-oss), trained exactly.
        mask: from ``block_mask``, for flex attention; built on every call when not given. A caller that packs
        documents of
            2,048 tokens and more should build it once per batch: flex attention is then preferred, being faster.
        validate: look at the values of cu_seqlens, which waits for the GPU; a caller that built them itself says
        False. backend: one by name instead of the choice.

    Returns the shape of q. Softmax in fp32. Saved for backward: q, k, v, out, log-sum-exp.
    Raises TypeError or ValueError for wrong dtypes, shapes, devices or a backend that cannot do the case.
    """
    q, k, v = as_autocast(q, k, v)
    _check(q, k, v, cu_seqlens, max_seqlen, window, softcap, sinks, validate)
    rule = choose("attention", q, k, v, sinks)
    case = Case(
        packed=q.dim() == 3,
        window=window is not None,
        softcap=softcap is not None,
        sinks=sinks is not None,
        dtype=q.dtype,
        width=q.shape[-1],
        longest=max_seqlen or 0,
        mask=mask is not None,
        compiling=torch.compiler.is_compiling(),
    )
    if rule.backend is Backend.REFERENCE and backend is None:
        backend = AttentionBackend.REFERENCE
    chosen = choose_attention(case, cuda=q.is_cuda, force=backend).backend
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if chosen is AttentionBackend.REFERENCE or q.numel() == 0:
        return reference.attention(
            q, k, v, causal=causal, scale=scale, cu_seqlens=cu_seqlens, window=window, softcap=softcap, sinks=sinks
        )
    if chosen is AttentionBackend.CUDNN:
        return _run_cudnn(q, k, v, causal, scale)
    if chosen is AttentionBackend.FLEX:
        if mask is None:
            tokens = q.shape[-3]
            mask = block_mask(tokens, device=q.device, cu_seqlens=cu_seqlens, causal=causal, window=window)
        rows = (t[None] if q.dim() == 3 else t for t in (q, k, v))
        out = flex(*rows, sinks, mask=mask, scale=scale, softcap=softcap)
        return out[0] if q.dim() == 3 else out
    shape = q.shape
    if cu_seqlens is None:
        cu_seqlens, max_seqlen = _equal_documents(shape[0], shape[1], q.device), shape[1]
        q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
    if chosen is AttentionBackend.FA4:
        out = fa4_attention(
            q, k, v, sinks, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, causal=causal, scale=scale, window=window,
            softcap=softcap,
        )  # fmt: skip
    else:
        out = flash_attention(
            q, k, v, sinks, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, causal=causal, scale=scale, window=window
        )
    return out.view(shape)
