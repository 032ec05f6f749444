"""The public operations in plain PyTorch: what the kernels are tested against, and what runs where there is no GPU.

Each file mirrors the one of its name in ``dropforge_kernels.ops``: same functions, same arguments, same rounding of
the result. Written for reading, not for speed; every intermediate that the kernel keeps in fp32 is fp32 here too.
"""

from __future__ import annotations

from dropforge_kernels.reference.adamw import adamw as adamw
from dropforge_kernels.reference.adamw import gradient_norm as gradient_norm
from dropforge_kernels.reference.attention import attention as attention
from dropforge_kernels.reference.attention import visible as visible
from dropforge_kernels.reference.cross_entropy import cross_entropy as cross_entropy
from dropforge_kernels.reference.fp8 import fp8_dequantize_blocks as fp8_dequantize_blocks
from dropforge_kernels.reference.fp8 import fp8_dequantize_rows as fp8_dequantize_rows
from dropforge_kernels.reference.fp8 import fp8_quantize_blocks as fp8_quantize_blocks
from dropforge_kernels.reference.fp8 import fp8_quantize_rows as fp8_quantize_rows
from dropforge_kernels.reference.geglu import geglu as geglu
from dropforge_kernels.reference.grpo_loss import grpo_loss as grpo_loss
from dropforge_kernels.reference.layer_norm import layer_norm as layer_norm
from dropforge_kernels.reference.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from dropforge_kernels.reference.linear_logprobs import linear_logprobs as linear_logprobs
from dropforge_kernels.reference.nf4_dequantize import nf4_dequantize as nf4_dequantize
from dropforge_kernels.reference.nf4_group import nf4_dequantize_group as nf4_dequantize_group
from dropforge_kernels.reference.packed_attention import packed_attention as packed_attention
from dropforge_kernels.reference.qk_norm import qk_norm as qk_norm
from dropforge_kernels.reference.qk_norm import qk_norm_rope as qk_norm_rope
from dropforge_kernels.reference.relu_squared import relu_squared as relu_squared
from dropforge_kernels.reference.rms_norm import add_rms_norm as add_rms_norm
from dropforge_kernels.reference.rms_norm import rms_norm as rms_norm
from dropforge_kernels.reference.rope import rope as rope
from dropforge_kernels.reference.swiglu import swiglu as swiglu
from dropforge_kernels.reference.swiglu import swiglu_backward as swiglu_backward
from dropforge_kernels.reference.swiglu import swiglu_clamped as swiglu_clamped
from dropforge_kernels.reference.swiglu import swiglu_packed as swiglu_packed
