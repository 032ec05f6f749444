"""GeGLU: gelu(gate) * up, exact or with the tanh approximation.

Forward:   h = gelu(gate) * up
           "none": gelu(g) = g * Phi(g), Phi the normal distribution function;
           "tanh": gelu(g) = g * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g^3))) / 2
Backward:  dgate = dh * up * gelu'(gate), dup = dh * gelu(gate)
Source: Hendrycks and Gimpel 2016 (arXiv 1606.08415), Shazeer 2020 (arXiv 2002.05202).
"""

from __future__ import annotations

import torch

from dropforge_kernels import checks, reference
from dropforge_kernels.dispatch import Backend, choose
from dropforge_kernels.ops._glu import GELU_EXACT, GELU_TANH
from dropforge_kernels.ops._glu_autograd import PAIR, GatedPair, check_pair


def geglu(gate: torch.Tensor, up: torch.Tensor, *, approximate: str = "none", inplace: bool = False) -> torch.Tensor:
    """``torch.nn.functional.gelu(gate, approximate=approximate) * up``, fp32 inside, rounded once.

    approximate: "none" (exact) or "tanh" (Gemma). All else as in ``swiglu``: (..., I) tensors of one dtype, h
    contiguous, gate and up saved, ``inplace`` lets backward overwrite them once.
    """
    check_pair("geglu", gate, up)
    checks.check_choice("geglu", "approximate", approximate, ("none", "tanh"))
    if choose("geglu", gate, up).backend is Backend.REFERENCE:
        return reference.geglu(gate, up, approximate=approximate)
    activation = GELU_TANH if approximate == "tanh" else GELU_EXACT
    if torch.compiler.is_compiling():
        return PAIR(gate, up, activation, 0.0, 0.0)
    return GatedPair.apply(gate, up, activation, 0.0, 0.0, inplace)
