"""Phi 3 and 4: joint q, k, v and joint gate and up projections; the rotation may cover a part of a head."""

from __future__ import annotations

from transformers.models.phi3 import modeling_phi3 as hf

from dropforge_kernels.patch.families._attention import attention, config_window, joint_qkv
from dropforge_kernels.patch.families._loss import fused_loss, needs_own_loss, needs_plain_head
from dropforge_kernels.patch.families._mlps import needs_silu, packed_swiglu_mlp
from dropforge_kernels.patch.families._norms import llama_norm
from dropforge_kernels.patch.spec import PatchSpec

SPECS = (
    PatchSpec(family="phi3", operation="rms_norm", target=hf.Phi3RMSNorm, build=llama_norm),
    PatchSpec(
        family="phi3", operation="swiglu_packed", target=hf.Phi3MLP, build=packed_swiglu_mlp, requires=(needs_silu,)
    ),
    PatchSpec(
        family="phi3",
        operation="rope",
        target=hf.Phi3Attention,
        build=attention(eager=hf.eager_attention_forward, extra=config_window, project=joint_qkv),
    ),
    PatchSpec(
        family="phi3",
        operation="linear_cross_entropy",
        target=hf.Phi3ForCausalLM,
        build=fused_loss(),
        requires=(needs_plain_head, needs_own_loss),
    ),
)
