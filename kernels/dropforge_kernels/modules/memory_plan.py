"""Chooses what every layer keeps, from the model's sizes, the batch and the memory there is. No torch, no GPU.

Computing everything anew costs about a third more time; keeping everything costs about 90 KiB per token and layer of an
8B model. In between the plan keeps as much as fits: everything in the last layers, attention in those before, then for
long sequences the attention's output, which spares the second run of attention, then only the layers' inputs; and what
even that is too much for goes to host memory. Of all such plans that fit it takes the one that adds the least work, and
of equals the one that moves least. Long batches compute the MLP in tiles.

    plan = plan_memory(shape, training, tokens=16384, budget=76 * GIB, host=64 * GIB)
    plan.policies, plan.mlp_tile, plan.predicted_peak, plan.lines()

The predicted peak never exceeds the budget when ``plan.fits``. ``step_back`` gives the next plan that needs less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from dropforge_kernels.modules.head_pieces import SPLIT_FROM
from dropforge_kernels.modules.memory_peak import ADAPTER_BYTES, B, Counts, Peak, peak
from dropforge_kernels.modules.model_shape import ModelShape, Training, Work
from dropforge_kernels.modules.policy import Keep

GIB = 1 << 30
CUDA_CONTEXT = 640 << 20
"""What a process's CUDA context and loaded kernels take beside the allocator."""
ALLOCATOR_SLACK = 0.03
"""Share of the budget left to the allocator's rounding and gaps."""
TILES = (None, 32768, 8192, 2048, 1024)
OUTPUT_FROM = 4096
"""Mean sequence length from which attention's second run is worth keeping its output for."""
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
    tiled: bool = False


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

    @property
    def store_depth(self) -> int:
        """Tensors of one layer that go to the host, for ``HostStore``."""
        return 2 if Keep.OFFLOAD_OUTPUT in self.policies else 1

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
            lines.append(
                f"  {_gib(made.host)} of host memory hold what layers gave away; the copies hide behind the computing"
            )
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
    tiled: bool = False,
) -> MemoryPlan:
    """The fastest plan that fits, or with ``fits`` False the one that needs least.

    tokens: of one micro-batch, padding included. document: mean length of a sequence in it (all of it by default).
    budget: bytes this process may allocate on the device in all, what it has allocated already included, the CUDA
    context left out. host: bytes of host memory that may be pinned. resident: bytes allocated once the engine is in
    the model, before the first step (weights, adapters and whatever else lies there), when measured; else predicted.
    tiled: the MLP is computed in tiles in every layer, also where there is memory to keep it.
    Raises ValueError for numbers that are not positive.
    """
    for name, value in (("tokens", tokens), ("budget", budget)):
        if value <= 0:
            raise ValueError(f"plan_memory: {name} must be positive; received {value}")
    request = Request(
        shape=shape, training=training, tokens=tokens, document=min(document or tokens, tokens), budget=budget,
        host=max(host, 0), resident=resident, tiled=tiled,
    )  # fmt: skip
    usable = _usable(budget)
    best: tuple[float, Counts, int | None] | None = None
    for tile in tiles_for(tokens, forced=tiled):
        counts = _cheapest(request, tile, usable)
        if counts is not None:
            cost = extra_work(shape, counts, tile, document=request.document)
            if best is None or (cost, counts.host_tensors) < (best[0], best[1].host_tensors):
                best = (cost, counts, tile)
            if cost == 0:
                break
    if best is None:
        return _made(request, _least(request), tiles_for(tokens, forced=tiled)[-1], fits=False)
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
        document=asked.document, resident=asked.resident, tiled=asked.tiled,
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
        usable, tile = _usable(asked.budget), tiles_for(asked.tokens, forced=asked.tiled)[-1]
        offload = _least(asked)
        return _peak(asked, offload, tile).total <= usable

    # From here on attention needs less beside it, so a longer row may fit where a shorter one does not.
    split = SPLIT_FROM // 256
    if fits(split):
        return 256 * _most(fits, split, 1 << 16)
    return 256 * _most(fits, 1, split - 1) if fits(1) else 0


def tiles_for(tokens: int, *, forced: bool = False) -> tuple[int | None, ...]:
    """Tile sizes worth a look, largest first; None: no tiles, unless they are forced."""
    sizes = [tile for tile in TILES if tile is not None and 2 * tile <= tokens]
    if forced:
        return tuple(sizes or TILES[-1:])
    return (None, *sizes)


def extra_work(shape: ModelShape, counts: Counts, tile: int | None, *, document: int) -> float:
    """Work done twice, and what tiles cost, as a share of forward and backward."""
    work = Work.of(shape, document=document)
    without_scores = work.gate_up + work.projections
    lost = counts.attention * work.gate_up + (counts.output + counts.offload_output) * without_scores
    lost += (counts.recompute + counts.offload) * (without_scores + work.scores)
    if tile is not None:
        halvings = max(1, (65536 // tile).bit_length() - 1)
        lost += (shape.layers - counts.keep) * TILE_COST * halvings * 1.5 * work.gate_up
    head = 4.0 * shape.hidden * shape.vocabulary
    return lost / (shape.layers * work.whole + head)


def _cheapest(request: Request, tile: int | None, usable: int) -> Counts | None:
    """The counts that fit and add the least work, for one tile size; None when none fit."""
    shape, layers = request.shape, request.shape.layers
    most_moved = request.host // max(1, _tensor_bytes(request))

    def cost(counts: Counts) -> float:
        return extra_work(shape, counts, tile, document=request.document)

    def fits(counts: Counts) -> bool:
        return _peak(request, counts, tile).total <= usable

    most_kept = 0 if request.tiled else layers
    pairs = [(keep, attention) for keep in range(most_kept + 1) for attention in range(layers + 1 - keep)]
    bounds = sorted((cost(_split(layers, pair, layers - sum(pair), 0)), pair) for pair in pairs)
    best: Counts | None = None
    for bound, pair in bounds:
        if best is not None and bound >= cost(best):
            break
        if not fits(_split(layers, pair, 0, most_moved)):
            continue
        rest = layers - sum(pair) if request.document >= OUTPUT_FROM else 0
        outputs = _most(lambda n, p=pair: fits(_split(layers, p, n, most_moved)), 0, rest)  # type: ignore[misc]
        moved = -_most(lambda n, p=pair, o=outputs: fits(_split(layers, p, o, -n)), -most_moved, 0)  # type: ignore[misc]
        found = _split(layers, pair, outputs, moved)
        if best is None or (cost(found), moved) < (cost(best), best.host_tensors):
            best = found
    return best


def _split(layers: int, pair: tuple[int, int], outputs: int, moved: int) -> Counts:
    """pair: layers that keep everything, and that keep attention. Of the others ``outputs`` keep attention's output; up
    to ``moved`` tensors go to the host, inputs of layers that keep nothing else first.
    """
    keep, attention = pair
    plain = layers - keep - attention - outputs
    offload = min(plain, moved)
    offload_output = min(outputs, (moved - offload) // 2)
    return Counts(offload, offload_output, plain - offload, outputs - offload_output, attention, keep)


def _tensor_bytes(request: Request) -> int:
    return request.tokens * max(request.shape.hidden, request.shape.queries) * B


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
    return _split(request.shape.layers, (0, 0), 0, request.host // max(1, _tensor_bytes(request)))


def _peak(request: Request, counts: Counts, tile: int | None) -> Peak:
    row = request.tokens if request.document == request.tokens else 0
    found = peak(request.shape, request.training, counts, tokens=request.tokens, tile=tile, row=row)
    if request.resident is None:
        return found
    return replace(
        found, weights=max(0, request.resident - ADAPTER_BYTES * request.training.trained_values(request.shape))
    )


def _usable(budget: int) -> int:
    return int(budget * (1 - ALLOCATOR_SLACK))


def policies_of(counts: Counts) -> tuple[Keep, ...]:
    """One policy per layer, first to last."""
    numbers = {
        Keep.OFFLOAD: counts.offload, Keep.OFFLOAD_OUTPUT: counts.offload_output, Keep.NONE: counts.recompute,
        Keep.OUTPUT: counts.output, Keep.ATTENTION: counts.attention, Keep.ALL: counts.keep,
    }  # fmt: skip
    return tuple(keep for keep, count in numbers.items() for _ in range(count))


def _made(request: Request, counts: Counts, tile: int | None, *, fits: bool) -> MemoryPlan:
    return MemoryPlan(
        policies=policies_of(counts),
        mlp_tile=None if counts.keep == counts.layers else tile,
        predicted=_peak(request, counts, tile),
        extra_work=extra_work(request.shape, counts, tile, document=request.document),
        fits=fits,
        request=request,
    )


_MEANING = {
    Keep.OFFLOAD: "computed again from the input in host memory",
    Keep.OFFLOAD_OUTPUT: "input and attention's output in host memory, the rest computed again",
    Keep.NONE: "computed again from the input",
    Keep.OUTPUT: "attention's output kept, the rest computed again",
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
            which = f"layer {index}" if index == start + 1 else f"layers {start + 1} to {index}"
            yield f"{which}: {_MEANING[policies[start]]}"
            start = index


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
