"""Gemma 3, text models: Gemma 2's norms and GeGLU, a norm of every head before the rotation, no capped scores."""

from __future__ import annotations

from typing import Any

from transformers.models.gemma3 import modeling_gemma3 as hf

from dropforge_kernels.patch.families._attention import attention, gemma_qk_norm_rope, layer_window
from dropforge_kernels.patch.families._loss import fused_loss, needs_own_loss, needs_plain_head
from dropforge_kernels.patch.families._mlps import geglu_mlp, needs_tanh_gelu
from dropforge_kernels.patch.families._norms import gemma_norm
from dropforge_kernels.patch.spec import PatchSpec


def logit_options(config: Any) -> dict[str, float]:
    """cap * tanh(logits / cap), or nothing."""
    return {"logit_softcap": config.final_logit_softcapping or 0.0}


SPECS = (
    PatchSpec(
        family="gemma3_text",
        operation="rms_norm",
        target=hf.Gemma3RMSNorm,
        build=gemma_norm,
        exclude=("q_norm", "k_norm"),  # qk_norm_rope reads their weights and does their work
    ),
    PatchSpec(
        family="gemma3_text", operation="geglu", target=hf.Gemma3MLP, build=geglu_mlp, requires=(needs_tanh_gelu,)
    ),
    PatchSpec(
        family="gemma3_text",
        operation="qk_norm_rope",
        target=hf.Gemma3Attention,
        build=attention(eager=hf.eager_attention_forward, rotate=gemma_qk_norm_rope, extra=layer_window),
    ),
    PatchSpec(
        family="gemma3_text",
        operation="linear_cross_entropy",
        target=hf.Gemma3ForCausalLM,
        build=fused_loss(logit_options),
        requires=(needs_plain_head, needs_own_loss),
    ),
)
