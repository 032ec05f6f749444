"""The public operations. Each lives in the file of its name, with its kernels; ``dropforge_kernels.reference``
mirrors them.

Importing this package imports torch and triton, registers the custom ops, and does nothing else.
"""

from __future__ import annotations

from dropforge_kernels.ops.adamw import adamw as adamw
from dropforge_kernels.ops.adamw import adamw_state as adamw_state
from dropforge_kernels.ops.adamw import gradient_norm as gradient_norm
from dropforge_kernels.ops.attention import attention as attention
from dropforge_kernels.ops.attention import block_mask as block_mask
from dropforge_kernels.ops.attention import choose_attention as choose_attention
from dropforge_kernels.ops.cross_entropy import cross_entropy as cross_entropy
from dropforge_kernels.ops.fp8 import fp8_dequantize_blocks as fp8_dequantize_blocks
from dropforge_kernels.ops.fp8 import fp8_dequantize_rows as fp8_dequantize_rows
from dropforge_kernels.ops.fp8 import fp8_quantize_blocks as fp8_quantize_blocks
from dropforge_kernels.ops.fp8 import fp8_quantize_rows as fp8_quantize_rows
from dropforge_kernels.ops.geglu import geglu as geglu
from dropforge_kernels.ops.grpo_loss import grpo_loss as grpo_loss
from dropforge_kernels.ops.layer_norm import layer_norm as layer_norm
from dropforge_kernels.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from dropforge_kernels.ops.linear_logprobs import linear_logprobs as linear_logprobs
from dropforge_kernels.ops.nf4_dequantize import nf4_dequantize as nf4_dequantize
from dropforge_kernels.ops.nf4_group import nf4_dequantize_group as nf4_dequantize_group
from dropforge_kernels.ops.nf4_group import nf4_group as nf4_group
from dropforge_kernels.ops.packed_attention import document_bounds as document_bounds
from dropforge_kernels.ops.packed_attention import packed_attention as packed_attention
from dropforge_kernels.ops.qk_norm import qk_norm as qk_norm
from dropforge_kernels.ops.qk_norm import qk_norm_rope as qk_norm_rope
from dropforge_kernels.ops.relu_squared import relu_squared as relu_squared
from dropforge_kernels.ops.rms_norm import add_rms_norm as add_rms_norm
from dropforge_kernels.ops.rms_norm import rms_norm as rms_norm
from dropforge_kernels.ops.rope import rope as rope
from dropforge_kernels.ops.swiglu import swiglu as swiglu
from dropforge_kernels.ops.swiglu import swiglu_backward as swiglu_backward
from dropforge_kernels.ops.swiglu import swiglu_clamped as swiglu_clamped
from dropforge_kernels.ops.swiglu import swiglu_packed as swiglu_packed
from dropforge_kernels.reference.nf4_group import Nf4Weight as Nf4Weight
