"""The public operations. Each lives in the file of its name, with its kernels; ``dropforge_kernels.reference``
mirrors them.

Importing this package imports torch and triton, registers the custom ops, and does nothing else.
"""

from __future__ import annotations

from dropforge_kernels.ops.rms_norm import add_rms_norm as add_rms_norm
from dropforge_kernels.ops.rms_norm import rms_norm as rms_norm
from dropforge_kernels.ops.cross_entropy import cross_entropy as cross_entropy
from dropforge_kernels.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from dropforge_kernels.ops.linear_logprobs import linear_logprobs as linear_logprobs
from dropforge_kernels.ops.qk_norm import qk_norm as qk_norm
from dropforge_kernels.ops.qk_norm import qk_norm_rope as qk_norm_rope
from dropforge_kernels.ops.rope import rope as rope
from dropforge_kernels.ops.geglu import geglu as geglu
from dropforge_kernels.ops.layer_norm import layer_norm as layer_norm
from dropforge_kernels.ops.swiglu import swiglu as swiglu
from dropforge_kernels.ops.swiglu import swiglu_backward as swiglu_backward
from dropforge_kernels.ops.swiglu import swiglu_clamped as swiglu_clamped
from dropforge_kernels.ops.swiglu import swiglu_packed as swiglu_packed
