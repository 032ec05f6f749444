"""Granite: Llama with its own scales; the logits are divided by one of them before the loss."""

from __future__ import annotations

from typing import Any

from transformers.models.granite import modeling_granite as hf

from dropforge_kernels.patch.families._attention import attention
from dropforge_kernels.patch.families._loss import fused_loss, needs_own_loss, needs_plain_head
from dropforge_kernels.patch.families._mlps import needs_silu, swiglu_mlp
from dropforge_kernels.patch.families._norms import llama_norm
from dropforge_kernels.patch.spec import PatchSpec


def logit_options(config: Any) -> dict[str, float]:
    """Granite divides; the operation multiplies."""
    return {"logit_scale": 1.0 / config.logits_scaling}


SPECS = (
    PatchSpec(family="granite", operation="rms_norm", target=hf.GraniteRMSNorm, build=llama_norm),
    PatchSpec(family="granite", operation="swiglu", target=hf.GraniteMLP, build=swiglu_mlp, requires=(needs_silu,)),
    PatchSpec(
        family="granite",
        operation="rope",
        target=hf.GraniteAttention,
        build=attention(eager=hf.eager_attention_forward),
    ),
    PatchSpec(
        family="granite",
        operation="linear_cross_entropy",
        target=hf.GraniteForCausalLM,
        build=fused_loss(logit_options),
        requires=(needs_plain_head, needs_own_loss),
    ),
)
