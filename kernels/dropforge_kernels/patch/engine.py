"""Builds ``modules.causal_lm.Decoder`` out of a transformers model with a PEFT adapter, or says why it cannot.

The weights stay the model's own; the decoder reads them. What a model must be like for that is checked here module by
module, so that everything else (dropout, DoRA, several adapters, trained base weights) keeps the path it had.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dropforge_kernels.modules.adapters import Casts
from dropforge_kernels.modules.causal_lm import Decoder
from dropforge_kernels.modules.layer import Layer
from dropforge_kernels.modules.policy import Keep
from dropforge_kernels.modules.weights import DenseWeights, Matrices, Nf4Weights, Scratch
from dropforge_kernels.patch.engine_head import HeadCopy
from dropforge_kernels.patch.engine_projections import adapted, adapter_obstacle, base_obstacle, base_of, is_nf4
from dropforge_kernels.patch.engine_watch import Watch
from dropforge_kernels.patch.families._layers import LAYOUTS, LayerModules, Layout

if TYPE_CHECKING:
    from dropforge_kernels.modules.offload import HostStore

LOG = logging.getLogger("dropforge")


class ObstacleError(Exception):
    """Why the engine cannot run this model; the text is for the report."""


@dataclass
class Engine:
    """A decoder and what it was read from."""

    layout: Layout
    inner: Any
    """transformers' model without the head: embed_tokens, layers, norm, rotary_emb."""
    decoder: Decoder
    weights: list[DenseWeights | Nf4Weights]
    watch: Watch
    head: HeadCopy | None = None
    """Of a frozen head in another dtype."""
    planned: bool = False
    """Whether ``set_policies`` has decided what each layer keeps."""
    tiled_mlp: bool = False
    """No layer keeps its MLP, which is computed some tokens at a time; planners must see to it."""
    declined: dict[str, int] = field(default_factory=dict)
    """Why training forwards took the model's own path, and how many did."""
    warned: set[str] = field(default_factory=set)

    def decline(self, reason: str) -> None:
        """Count a forward that is not the engine's; a new reason is logged, because the step is slower from then on."""
        if reason not in self.declined:
            LOG.warning("the hand-written layers stand aside: %s", reason)
        self.declined[reason] = self.declined.get(reason, 0) + 1

    def warn(self, about: str, text: str) -> None:
        """Log ``text`` once for the life of the engine."""
        if about not in self.warned:
            self.warned.add(about)
            LOG.warning("%s", text)

    def set_policies(
        self, policies: Sequence[Keep], *, mlp_tile: int | None = None, store: HostStore | None = None
    ) -> None:
        """What each layer keeps from the next forward on; without a call transformers' gradient checkpointing decides.

        Raises ValueError for a list of another length, and for OFFLOAD without a store.
        """
        self.decoder.set_policies(policies, mlp_tile=mlp_tile, store=store)
        self.planned = True

    def obstacle(self) -> str | None:
        """What changed since the engine was built, so that it must not run now."""
        return self.watch.changed()

    def head_weight(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The head's weight in ``dtype``: itself, the copy made when the engine was built, or a cast of its own."""
        held = self.head is not None and self.head.is_of(weight, dtype)
        return self.head.copy if held and self.head is not None else weight.to(dtype)

    def release(self) -> None:
        """Give every joined matrix its own memory back, and the head's copy up."""
        self.head = None
        for weights in self.weights:
            weights.release()


def build_engine(model: nn.Module, family: str) -> Engine:
    """The engine of a causal language model, bare or in PEFT's wrapper. Raises ObstacleError."""
    layout = LAYOUTS.get(family)
    if layout is None:
        raise ObstacleError(f"no hand-written layer for the model type {family!r}")
    causal = causal_model(model)
    inner = causal.model
    dtype = _compute_dtype(inner)
    casts, scratch = Casts(dtype, layers=len(inner.layers)), Scratch(dtype)
    modules = [layout.modules(layer, index) for index, layer in enumerate(inner.layers)]
    for layer, parts in zip(inner.layers, modules, strict=True):
        _check(layer, parts)
    trained = [p for name, p in inner.layers.named_parameters() if p.requires_grad]
    if not trained:
        raise ObstacleError("none of its layers has a trained adapter")
    sources: list[DenseWeights | Nf4Weights] = []
    layers = []
    for parts in modules:
        matrices = _matrices(parts)
        quantised = is_nf4(matrices.down)
        sources.append(Nf4Weights(matrices, scratch) if quantised else DenseWeights(matrices))
        layers.append(_layer(parts, casts, sources[-1]))
    made = sum(len(layer.parameters) for layer in layers)
    if made != len(trained):
        raise ObstacleError("something besides the adapters of its projections is trained inside the layers")
    decoder = Decoder(
        layers=layers,
        casts=casts,
        tables=lambda positions: layout.tables(inner, positions),
        dtype=dtype,
        policies=[Keep.ALL] * len(layers),
        scratch=scratch,
    )
    if len({matrix.device for parts in modules for matrix in _matrices(parts).all}) > 1:
        raise ObstacleError("its layers are spread over several devices")
    matrices = [p for parts in modules for p in _matrices(parts).all]
    return Engine(
        layout=layout,
        inner=inner,
        decoder=decoder,
        weights=sources,
        watch=Watch.of(inner.layers, [_projections(parts) for parts in modules], matrices),
        head=HeadCopy.of(causal.get_output_embeddings(), dtype),
    )


def causal_model(model: nn.Module) -> Any:
    """The transformers model inside PEFT's wrapper, or the model itself."""
    inner: Any = model
    while type(inner).__module__.startswith("peft."):
        inner = inner.base_model.model if type(inner).__name__.startswith("Peft") else inner.model
    return inner


def _projections(parts: LayerModules) -> tuple[nn.Module, ...]:
    return (*parts.qkv, parts.o, *parts.gate_up, parts.down)


def _compute_dtype(inner: Any) -> torch.dtype:
    base = base_of(inner.layers[0].mlp.down_proj)
    state = getattr(base.weight, "quant_state", None)
    dtype: torch.dtype = base.weight.dtype if state is None else (getattr(base, "compute_dtype", None) or state.dtype)
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ObstacleError(f"its weights are held as {str(dtype).removeprefix('torch.')}")
    return dtype


def _check(layer: nn.Module, parts: LayerModules) -> None:
    dropout = getattr(layer.self_attn, "attention_dropout", 0.0)
    residual = [getattr(layer, name, None) for name in ("resid_attn_dropout", "resid_mlp_dropout")]
    if dropout or any(module is not None and module.p for module in residual):
        raise ObstacleError("the model drops activations out in training")
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise ObstacleError("a hook watches its layers")
    norms = [parts.input_norm, parts.mlp_norm, parts.attention_end, parts.mlp_end]
    norms += [parts.attention.q_norm, parts.attention.k_norm]
    own = {p.data_ptr(): p for p in layer.parameters() if p.dim() == 1}
    for norm in norms:
        if norm is not None and own[norm.weight.data_ptr()].requires_grad:
            raise ObstacleError("its norms are trained")
    for module in _projections(parts):
        reason = adapter_obstacle(module) or base_obstacle(base_of(module))
        if reason is not None:
            raise ObstacleError(reason)
    kinds = {is_nf4(base_of(module).weight) for module in _projections(parts)}
    if len(kinds) != 1:
        raise ObstacleError("some of a layer's projections are quantised and some are not")


def _matrices(parts: LayerModules) -> Matrices:
    def weight(module: nn.Module) -> nn.Parameter:
        return base_of(module).weight  # type: ignore[return-value]

    return Matrices(
        qkv=tuple(weight(m) for m in parts.qkv),
        o=weight(parts.o),
        gate_up=tuple(weight(m) for m in parts.gate_up),
        down=weight(parts.down),
    )


def _layer(parts: LayerModules, casts: Casts, weights: DenseWeights | Nf4Weights) -> Layer:
    groups = [tuple(adapted(m) for m in group) for group in (parts.qkv, (parts.o,), parts.gate_up, (parts.down,))]
    parameters = [p for group in groups for one in group for p in (one.a, one.b) if p is not None]
    qkv, o, gate_up, down = (casts.group(group) for group in groups)
    return Layer(
        attention=parts.attention,
        activation=parts.activation,
        input_norm=parts.input_norm,
        mlp_norm=parts.mlp_norm,
        attention_end=parts.attention_end,
        mlp_end=parts.mlp_end,
        multiplier=parts.multiplier,
        qkv=qkv,
        o=o,
        gate_up=gate_up,
        down=down,
        weights=weights,
        parameters=tuple(parameters),
    )
