"""Whole pieces of a transformer, forward and backward written by hand, built from ``dropforge_kernels.ops``.

policy          what a layer keeps for its backward
decoder_layer   one pre-norm decoder layer with its LoRA adapters as one autograd function
causal_lm       the training forward of a causal language model made of such layers
"""

from __future__ import annotations
