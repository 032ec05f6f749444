"""Mistral: Llama with one sliding window."""

from __future__ import annotations

from transformers.models.mistral import modeling_mistral as hf

from dropforge_kernels.patch.families._attention import attention, config_window
from dropforge_kernels.patch.families._loss import fused_loss, needs_own_loss, needs_plain_head
from dropforge_kernels.patch.families._mlps import needs_silu, swiglu_mlp
from dropforge_kernels.patch.families._norms import llama_norm
from dropforge_kernels.patch.spec import PatchSpec

SPECS = (
    PatchSpec(family="mistral", operation="rms_norm", target=hf.MistralRMSNorm, build=llama_norm),
    PatchSpec(family="mistral", operation="swiglu", target=hf.MistralMLP, build=swiglu_mlp, requires=(needs_silu,)),
    PatchSpec(
        family="mistral",
        operation="rope",
        target=hf.MistralAttention,
        build=attention(eager=hf.eager_attention_forward, extra=config_window),
    ),
    PatchSpec(
        family="mistral",
        operation="linear_cross_entropy",
        target=hf.MistralForCausalLM,
        build=fused_loss(),
        requires=(needs_plain_head, needs_own_loss),
    ),
)
