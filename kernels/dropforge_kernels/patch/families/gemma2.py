"""Gemma 2: norm weights are offsets from 1, GeGLU with the tanh approximation, capped scores and logits."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.gemma2 import modeling_gemma2 as hf

from dropforge_kernels.patch.families._attention import attention
from dropforge_kernels.patch.families._loss import fused_loss, needs_own_loss, needs_plain_head
from dropforge_kernels.patch.families._mlps import geglu_mlp, needs_tanh_gelu
from dropforge_kernels.patch.families._norms import gemma_norm
from dropforge_kernels.patch.spec import PatchSpec


def window_and_cap(self: nn.Module) -> dict[str, Any]:
    """What Gemma 2's attention functions are given beside the usual."""
    return {"sliding_window": self.sliding_window, "softcap": self.attn_logit_softcapping}


def logit_options(config: Any) -> dict[str, float]:
    """cap * tanh(logits / cap), or nothing."""
    return {"logit_softcap": config.final_logit_softcapping or 0.0}


SPECS = (
    PatchSpec(family="gemma2", operation="rms_norm", target=hf.Gemma2RMSNorm, build=gemma_norm),
    PatchSpec(family="gemma2", operation="geglu", target=hf.Gemma2MLP, build=geglu_mlp, requires=(needs_tanh_gelu,)),
    PatchSpec(
        family="gemma2",
        operation="rope",
        target=hf.Gemma2Attention,
        build=attention(eager=hf.eager_attention_forward, extra=window_and_cap),
    ),
    PatchSpec(
        family="gemma2",
        operation="linear_cross_entropy",
        target=hf.Gemma2ForCausalLM,
        build=fused_loss(logit_options),
        requires=(needs_plain_head, needs_own_loss),
    ),
)
