"""Qwen 2 and 2.5: biases in q, k, v and a window per layer."""

from __future__ import annotations

from transformers.models.qwen2 import modeling_qwen2 as hf

from dropforge_kernels.patch.families._attention import attention, layer_window
from dropforge_kernels.patch.families._loss import fused_loss, needs_own_loss, needs_plain_head
from dropforge_kernels.patch.families._mlps import needs_silu, swiglu_mlp
from dropforge_kernels.patch.families._norms import llama_norm
from dropforge_kernels.patch.spec import PatchSpec

SPECS = (
    PatchSpec(family="qwen2", operation="rms_norm", target=hf.Qwen2RMSNorm, build=llama_norm),
    PatchSpec(family="qwen2", operation="swiglu", target=hf.Qwen2MLP, build=swiglu_mlp, requires=(needs_silu,)),
    PatchSpec(
        family="qwen2",
        operation="rope",
        target=hf.Qwen2Attention,
        build=attention(eager=hf.eager_attention_forward, extra=layer_window),
    ),
    PatchSpec(
        family="qwen2",
        operation="linear_cross_entropy",
        target=hf.Qwen2ForCausalLM,
        build=fused_loss(),
        requires=(needs_plain_head, needs_own_loss),
    ),
)
