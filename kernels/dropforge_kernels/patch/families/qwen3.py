"""Qwen 3: a norm of every head of q and k before the rotation, both in one launch."""

from __future__ import annotations

from transformers.models.qwen3 import modeling_qwen3 as hf

from dropforge_kernels.patch.families._attention import attention, layer_window, llama_qk_norm_rope
from dropforge_kernels.patch.families._loss import fused_loss, needs_own_loss, needs_plain_head
from dropforge_kernels.patch.families._mlps import needs_silu, swiglu_mlp
from dropforge_kernels.patch.families._norms import llama_norm
from dropforge_kernels.patch.spec import PatchSpec

SPECS = (
    PatchSpec(
        family="qwen3",
        operation="rms_norm",
        target=hf.Qwen3RMSNorm,
        build=llama_norm,
        exclude=("q_norm", "k_norm"),  # qk_norm_rope reads their weights and does their work
    ),
    PatchSpec(family="qwen3", operation="swiglu", target=hf.Qwen3MLP, build=swiglu_mlp, requires=(needs_silu,)),
    PatchSpec(
        family="qwen3",
        operation="qk_norm_rope",
        target=hf.Qwen3Attention,
        build=attention(eager=hf.eager_attention_forward, rotate=llama_qk_norm_rope, extra=layer_window),
    ),
    PatchSpec(
        family="qwen3",
        operation="linear_cross_entropy",
        target=hf.Qwen3ForCausalLM,
        build=fused_loss(),
        requires=(needs_plain_head, needs_own_loss),
    ),
)
