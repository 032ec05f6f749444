"""``patched(model)``: swap the forwards of one model's modules, and give every one of them back.

All claims are collected before the first swap, so a conflict or an unmet requirement under policy "required" leaves the
model untouched. A swap is an instance attribute ``forward``: classes, state dicts and other models see nothing of it.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from dropforge_kernels.patch.engine import Engine, ObstacleError, build_engine
from dropforge_kernels.patch.host_embedding import HostEmbedding, embedding_to_host
from dropforge_kernels.patch.registry import FAMILIES, select, specs_of
from dropforge_kernels.patch.report import PatchReport, Skip, Swap
from dropforge_kernels.patch.spec import Forward, PatchError, PatchSpec

LOG = logging.getLogger("dropforge")
LOSS = "linear_cross_entropy"
"""The operation whose forward the engine enters through."""
POLICIES = ("auto", "required", "off")


class Claim(NamedTuple):
    """A patch wants this module's forward."""

    path: str
    module: nn.Module
    spec: PatchSpec


class Session:
    """A set of swaps on one model. ``close`` ends it; closing twice is harmless."""

    def __init__(self, report: PatchReport) -> None:
        self.report = report
        self.open = True
        self.engine: Engine | None = None
        self.embedding: HostEmbedding | None = None
        self._undo: list[tuple[str, nn.Module, Forward]] = []

    def swap(self, claim: Claim, forward: Forward) -> None:
        """Give one instance a new forward that turns into the class's own one when the session closes."""
        plain = type(claim.module).forward

        # Whoever wraps a forward later (accelerate's autocast, a trainer) keeps hold of this function. After close it
        # must compute what the class computes; and whoever looks at its signature must find the class's.
        @functools.wraps(plain)
        def switched(module: nn.Module, *args: object, **kwargs: object) -> object:
            return (forward if self.open else plain)(module, *args, **kwargs)

        bound = types.MethodType(switched, claim.module)
        claim.module.forward = bound
        self._undo.append((claim.path, claim.module, bound))
        self.report.swaps.append(
            Swap(
                path=claim.path,
                patch=claim.spec.name,
                old=f"{type(claim.module).__name__}.forward",
                new=f"dropforge_kernels.ops.{claim.spec.operation}",
            )
        )

    def pause(self) -> None:
        """Every swapped forward computes what its class computes, until ``resume``. Nothing is taken out."""
        self.open = False

    def resume(self) -> bool:
        """End a pause. False when the session was closed, so that a new one is needed."""
        self.open = bool(self._undo) or self.embedding is not None
        return self.open

    def close(self) -> None:
        """Restore in reverse. A forward that somebody wrapped meanwhile stays, and is named in the report."""
        self.open = False
        if self.engine is not None:
            self.engine.release()
            self.engine = None
        if self.embedding is not None:
            self.embedding.restore()
            self.embedding = None
        while self._undo:
            path, module, bound = self._undo.pop()
            if module.__dict__.get("forward") is bound:
                del module.forward
            else:
                self.report.wrapped.append(path)


def open_session(
    model: nn.Module,
    *,
    names: Iterable[str] | None = None,
    policy: str = "auto",
    specs: tuple[PatchSpec, ...] | None = None,
    offload_embedding: bool = False,
    tiled_mlp: bool = False,
) -> Session:
    """``patched`` for callers that cannot use a with block; they must call ``close``.

    specs: instead of the family's own (tests, experiments). Raises PatchError before anything is swapped.
    """
    if policy not in POLICIES:
        raise PatchError(f"policy must be one of {', '.join(POLICIES)}; received {policy!r}")
    if not isinstance(model, nn.Module):
        raise PatchError(
            f"model must be a loaded model (torch.nn.Module); received {type(model).__name__}: load it first, for "
            f"instance with transformers' AutoModelForCausalLM.from_pretrained"
        )
    family = model_family(model)
    report = PatchReport(family=family, policy=policy)
    session = Session(report)
    if policy != "off":
        _swap(session, model, names=names, specs=specs)
    if tiled_mlp and session.engine is None:
        LOG.warning("tiled_mlp has no effect: %s", report.engine or "the hand-written layers are not in this model")
    elif session.engine is not None:
        session.engine.tiled_mlp = tiled_mlp
    if offload_embedding:
        try:
            session.embedding = embedding_to_host(model)
        except BaseException:
            session.close()
            raise
        report.embedding = session.embedding.line()
    return session


def _swap(
    session: Session, model: nn.Module, *, names: Iterable[str] | None, specs: tuple[PatchSpec, ...] | None
) -> None:
    """Claim and swap; closes the session on an error."""
    report, family, policy = session.report, session.report.family, session.report.policy
    known = specs_of(family) if specs is None else specs
    if not known:
        reason = f"no kernels for the model type {family!r}; known: {', '.join(FAMILIES)}"
        report.skips.append(Skip(path="", patch="", reason=reason))
    claims = _collect(model, select(known, names) if known else (), report)
    if policy == "required" and report.skips:
        raise PatchError("policy is required, but:\n" + "\n".join(report.lines()))
    forwards: dict[str, Forward] = {}
    try:
        for claim in claims:
            if claim.spec.name not in forwards:
                forwards[claim.spec.name] = claim.spec.build(claim.spec.target.forward)
            if claim.spec.operation == LOSS and names is None:
                session.engine = _engine(model, family, report)
                if session.engine is not None:
                    forwards[claim.spec.name] = functools.partial(forwards[claim.spec.name], engine=session.engine)
            session.swap(claim, forwards[claim.spec.name])
    except BaseException:
        session.close()
        raise


def _engine(model: nn.Module, family: str, report: PatchReport) -> Engine | None:
    try:
        engine = build_engine(model, family)
    except ObstacleError as obstacle:
        report.engine = f"decoder layers run operation by operation: {obstacle}"
        return None
    report.engine = f"{len(engine.decoder.layers)} decoder layers train with their hand-written backward"
    report.declined = engine.declined
    return engine


@contextmanager
def patched(
    model: nn.Module,
    *,
    names: Iterable[str] | None = None,
    policy: str = "auto",
    offload_embedding: bool = False,
    tiled_mlp: bool = False,
) -> Iterator[PatchReport]:
    """Runs the block with this library's operations inside ``model``; restores it afterwards, also after an exception.

    model: a transformers causal language model, bare or inside PEFT's wrapper. Open it before the trainer is made.
    names: patches to use ("rms_norm", "llama.rope", ...); None = every exact one of the model's family.
    policy: "auto" skips what cannot be swapped and reports why; "required" raises instead; "off" swaps nothing.
    offload_embedding: the frozen table lies in (pinned) host memory meanwhile, and each batch's rows are fetched.
    tiled_mlp: hand-written layers compute the MLP some tokens at a time, and its products again in the backward; else
    the memory planner decides that.
    Yields the report. While a fused loss is in, a training forward with labels returns ``logits=None``; evaluation and
    calls without labels compute them as always.

    Raises PatchError: not a model; unknown policy or name; two patches that claim one module; a skip under "required";
    an embedding that is trained or tied and should be offloaded.
    """
    session = open_session(model, names=names, policy=policy, offload_embedding=offload_embedding, tiled_mlp=tiled_mlp)
    try:
        yield session.report
    finally:
        session.close()


def model_family(model: nn.Module) -> str:
    """transformers' model type, of the text part where there are several; "unknown" for other modules."""
    config = getattr(model, "config", None)
    return str(getattr(config, "model_type", None) or "unknown")


def _collect(model: nn.Module, specs: tuple[PatchSpec, ...], report: PatchReport) -> list[Claim]:
    claims: dict[int, Claim] = {}
    for spec in specs:
        found = False
        for path, module in spec.targets(model):
            found = True
            reason = _taken(module) or spec.obstacle(module)
            if reason is not None:
                report.skips.append(Skip(path=path, patch=spec.name, reason=reason))
                continue
            other = claims.get(id(module))
            if other is not None:
                raise PatchError(f"{other.spec.name} and {spec.name} both claim {path}.forward; name only one of them")
            claims[id(module)] = Claim(path, module, spec)
        if not found:
            reason = f"the model has no {spec.target.__name__}"
            report.skips.append(Skip(path="", patch=spec.name, reason=reason))
    return list(claims.values())


def _taken(module: nn.Module) -> str | None:
    current = module.__dict__.get("forward")
    if current is None:
        return None
    owner = getattr(current, "__module__", None) or type(current).__name__
    return f"its forward was already replaced by {owner}; open the session before that"
