"""Llama 2 and 3."""

from __future__ import annotations

from transformers.models.llama import modeling_llama as hf

from dropforge_kernels.patch.families._attention import attention
from dropforge_kernels.patch.families._loss import fused_loss, needs_own_loss, needs_plain_head
from dropforge_kernels.patch.families._mlps import needs_silu, swiglu_mlp
from dropforge_kernels.patch.families._norms import llama_norm
from dropforge_kernels.patch.spec import PatchSpec

SPECS = (
    PatchSpec(family="llama", operation="rms_norm", target=hf.LlamaRMSNorm, build=llama_norm),
    PatchSpec(family="llama", operation="swiglu", target=hf.LlamaMLP, build=swiglu_mlp, requires=(needs_silu,)),
    PatchSpec(
        family="llama",
        operation="rope",
        target=hf.LlamaAttention,
        build=attention(eager=hf.eager_attention_forward),
    ),
    PatchSpec(
        family="llama",
        operation="linear_cross_entropy",
        target=hf.LlamaForCausalLM,
        build=fused_loss(),
        requires=(needs_plain_head, needs_own_loss),
    ),
)
