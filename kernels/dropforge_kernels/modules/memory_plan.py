"""Chooses what every layer keeps, from the model's sizes, the batch and the memory there is. No torch, no GPU.

Computing everything anew costs about a third more time; keeping everything costs about 90 KiB per token and layer of an
8B model. In between the plan keeps as much as fits: everything in as many of the last layers as possible, then
attention in as many of those before, then only the layers' inputs, and in host memory those for which even that is too
much. Among all such plans that fit it takes the one that adds the least time. Long batches compute the MLP in tiles.

    plan = plan_memory(shape, training, tokens=16384, budget=76 * GIB, host=64 * GIB)
    plan.policies, plan.mlp_tile, plan.predicted_peak, plan.lines()

The predicted peak never exceeds the budget when ``plan.fits``. ``step_back`` gives the next plan that needs less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from dropforge_kernels.modules.memory_peak import Counts, Peak, peak
from dropforge_kernels.modules.model_shape import ModelShape, Training, Work
from dropforge_kernels.modules.policy import Keep

GIB = 1 << 30
CUDA_CONTEXT = 640 << 20
"""What a process's CUDA context and loaded kernels take beside the allocator."""
ALLOCATOR_SLACK = 0.03
"""Share of the budget left to the allocator's rounding and gaps."""
TILES = (None, 32768, 16384, 8192, 4096, 2048, 1024)
OFFLOAD_COST = 0.02
"""Of a layer's work: what moving its input costs at most when the copies hide behind it."""
TILE_COST = 0.01
"""Of the MLP's work, per halving below 32,768 rows: smaller products."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a plan was made for; sizes in bytes."""

    shape: ModelShape
    training: Training
    tokens: int
    document: int
    budget: int
    host: int
    resident: int | None


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What every layer keeps, and the memory that takes."""

    policies: tuple[Keep, ...]
    """One per layer, first to last."""
    mlp_tile: int | None
    """Rows of the MLP computed at a time in layers that do not keep everything; None: all."""
    predicted: Peak
    extra_work: float
    """Operations computed twice, as a share of the step's work."""
    fits: bool
    request: Request
    reason: str = ""
    """Why this is not the first choice."""

    @property
    def predicted_peak(self) -> int:
        """Bytes allocated at the worst moment, the CUDA context left out."""
        return self.predicted.total

    @property
    def host_bytes(self) -> int:
        """Pinned host memory the store needs."""
        return self.predicted.host

    def lines(self) -> list[str]:
        """The plan in a few sentences."""
        made, asked = self.predicted, self.request
        lines = [self.reason] if self.reason else []
        lines.append(
            f"memory: planned peak {_gib(made.total)} of {_gib(asked.budget)} that may be used, for {asked.tokens:,} "
            f"tokens per micro-batch"
        )
        lines.append(
            f"  weights {_gib(made.weights)} ({asked.training.weights}), adapters with gradients and optimizer "
            f"{_gib(made.adapters)}, working buffers {_gib(made.buffers)}, activations {_gib(made.activations)}"
        )
        lines += [f"  {text}" for text in _runs(self.policies)]
        if self.mlp_tile is not None:
            lines.append(f"  the MLP is computed {self.mlp_tile:,} tokens at a time")
        if made.host:
            lines.append(f"  {_gib(made.host)} of host memory hold layer inputs; the copies hide behind the computing")
        if self.extra_work > 0:
            lines.append(f"  computing again adds about {100 * self.extra_work:.0f}% of the step's work")
        if not self.fits:
            lines.append(f"  this does not fit: {_gib(made.total - _usable(asked.budget))} too much; {self.advice()}")
        return lines

    def advice(self) -> str:
        """What would fit instead."""
        longest = longest_tokens(replace(self.request, document=self.request.tokens))
        if longest <= 0:
            return "even one short sequence does not; use nf4 weights, a lower rank or a smaller model"
        return f"about {longest:,} tokens per micro-batch would fit"


def plan_memory(
    shape: ModelShape,
    training: Training,
    *,
    tokens: int,
    budget: int,
    host: int = 0,
    document: int | None = None,
    resident: int | None = None,
) -> MemoryPlan:
    """The fastest plan that fits, or with ``fits`` False the one that needs least.

    tokens: of one micro-batch, padding included. document: mean length of a sequence in it (all of it by default).
    budget: bytes this process may allocate on the device in all, what it has allocated already included, the CUDA
    context left out. host: bytes of host memory that may be pinned. resident: bytes of weights, adapter masters and
    whatever else lies there already, when measured; predicted otherwise.
    Raises ValueError for numbers that are not positive.
    """
    for name, value in (("tokens", tokens), ("budget", budget)):
        if value <= 0:
            raise ValueError(f"plan_memory: {name} must be positive; received {value}")
    request = Request(
        shape=shape, training=training, tokens=tokens, document=min(document or tokens, tokens), budget=budget,
        host=max(host, 0), resident=resident,
    )  # fmt: skip
    usable = _usable(budget)
    best: tuple[float, Counts, int | None] | None = None
    for tile in tiles_for(tokens):
        for counts in _candidates(request, tile, usable):
            cost = extra_work(shape, counts, tile, document=request.document)
            if best is None or cost < best[0]:
                best = (cost, counts, tile)
        if best is not None and best[0] == 0:
            break
    if best is None:
        return _made(request, _least(request), tiles_for(tokens)[-1], fits=False)
    return _made(request, best[1], best[2], fits=True)


def step_back(plan: MemoryPlan, *, budget: int | None = None) -> MemoryPlan:
    """The next plan that needs less memory, when another process took some.

    budget: what may be allocated now; by default an eighth less than the plan's peak. Raises ValueError when nothing
    smaller fits: the batch itself must shrink.
    """
    asked = plan.request
    target = int(plan.predicted_peak * 0.875) if budget is None else min(budget, plan.predicted_peak - 1)
    smaller = plan_memory(
        asked.shape, asked.training, tokens=asked.tokens, budget=max(target, 1), host=asked.host,
        document=asked.document, resident=asked.resident,
    )  # fmt: skip
    if not smaller.fits and smaller.predicted_peak >= plan.predicted_peak:
        raise ValueError(
            f"step_back: nothing needs less than {_gib(plan.predicted_peak)} at {asked.tokens:,} tokens per "
            f"micro-batch; use a smaller per_device_train_batch_size or max_seq_length"
        )
    reason = (
        f"less memory than planned: stepping back from {_gib(plan.predicted_peak)} to {_gib(smaller.predicted_peak)}"
    )
    return replace(smaller, reason=reason)


def longest_tokens(request: Request) -> int:
    """The most tokens per micro-batch that fit, a multiple of 256; 0 when not even 256 do."""

    def fits(units: int) -> bool:
        asked = replace(request, tokens=256 * units, document=min(request.document, 256 * units))
        usable, tile = _usable(asked.budget), tiles_for(asked.tokens)[-1]
        offload = _least(asked)
        return _peak(asked, offload, tile).total <= usable

    return 256 * _most(fits, 1, 1 << 16) if fits(1) else 0


def tiles_for(tokens: int) -> tuple[int | None, ...]:
    """Tile sizes worth a look, largest first; None: no tiles."""
    return tuple(tile for tile in TILES if tile is None or 2 * tile <= tokens)


def extra_work(shape: ModelShape, counts: Counts, tile: int | None, *, document: int) -> float:
    """Work done twice, and what copies and tiles cost, as a share of forward and backward."""
    work = Work.of(shape, document=document)
    again = work.gate_up + work.attention
    lost = counts.attention * work.gate_up + counts.recompute * again
    lost += counts.offload * (again + OFFLOAD_COST * work.whole / 2)
    if tile is not None:
        halvings = max(1, (65536 // tile).bit_length() - 1)
        lost += (shape.layers - counts.keep) * TILE_COST * halvings * 1.5 * work.gate_up
    head = 4.0 * shape.hidden * shape.vocabulary
    return lost / (shape.layers * work.whole + head)


def _candidates(request: Request, tile: int | None, usable: int) -> Iterator[Counts]:
    """For every number of layers that keep everything: the most that keep attention beside them, inputs on the device
    or, as few as possible, in host memory."""
    layers = request.shape.layers
    per_layer = request.tokens * request.shape.hidden * 2
    most_offloaded = layers if not per_layer else min(layers, request.host // per_layer)

    def fits(counts: Counts) -> bool:
        return _peak(request, counts, tile).total <= usable

    def split(keep: int, attention: int, offload: int) -> Counts:
        rest = layers - keep - attention
        return Counts(min(offload, rest), rest - min(offload, rest), attention, keep)

    for keep in range(layers, -1, -1):
        for offload in {0, most_offloaded}:
            if not fits(split(keep, 0, offload)):
                continue
            attention = _most(lambda n, k=keep, o=offload: fits(split(k, n, o)), 0, layers - keep)  # type: ignore[misc]
            fewest = -_most(lambda n, k=keep, a=attention: fits(split(k, a, -n)), -offload, 0)  # type: ignore[misc]
            yield split(keep, attention, fewest)


def _most(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in low..high for which ``fits`` holds, which it does for ``low`` and all up to the answer."""
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _least(request: Request) -> Counts:
    layers = request.shape.layers
    offload = min(layers, request.host // max(1, request.tokens * request.shape.hidden * 2))
    return Counts(offload, layers - offload, 0, 0)


def _peak(request: Request, counts: Counts, tile: int | None) -> Peak:
    found = peak(request.shape, request.training, counts, tokens=request.tokens, tile=tile)
    if request.resident is None:
        return found
    masters = 4 * request.training.trained_values(request.shape)
    return replace(found, weights=max(0, request.resident - masters))


def _usable(budget: int) -> int:
    return int(budget * (1 - ALLOCATOR_SLACK))


def _made(request: Request, counts: Counts, tile: int | None, *, fits: bool) -> MemoryPlan:
    order = (Keep.OFFLOAD, Keep.NONE, Keep.ATTENTION, Keep.ALL)
    numbers = (counts.offload, counts.recompute, counts.attention, counts.keep)
    policies = tuple(keep for keep, count in zip(order, numbers, strict=True) for _ in range(count))
    return MemoryPlan(
        policies=policies,
        mlp_tile=None if counts.keep == counts.layers else tile,
        predicted=_peak(request, counts, tile),
        extra_work=extra_work(request.shape, counts, tile, document=request.document),
        fits=fits,
        request=request,
    )


_MEANING = {
    Keep.OFFLOAD: "computed again from inputs in host memory",
    Keep.NONE: "computed again from their inputs",
    Keep.ATTENTION: "attention kept, the MLP computed again",
    Keep.ALL: "everything kept",
}


def _runs(policies: tuple[Keep, ...]) -> Iterator[str]:
    """One sentence per run of equal policies."""
    if len(set(policies)) == 1:
        yield f"all {len(policies)} layers: {_MEANING[policies[0]]}"
        return
    start = 0
    for index in range(1, len(policies) + 1):
        if index == len(policies) or policies[index] is not policies[start]:
            yield f"layers {start + 1} to {index}: {_MEANING[policies[start]]}"
            start = index


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
