"""Dropforge's GPU operations: Triton kernels, their plain-PyTorch references, and the choice between them.

    ops/         one file per operation: kernels, autograd function, custom ops, public function
    reference/   the same public functions in plain PyTorch; also what runs where there is no GPU
    dispatch     which of the two runs, with the reason
    checks       argument checks of the public functions
    testing      the three-value comparison, poisoned memory, shape grids

Importing this package does nothing and imports nothing heavy; ``dropforge_kernels.ops`` imports torch and triton.
"""

from __future__ import annotations
