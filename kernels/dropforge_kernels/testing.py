"""How operations are tested: three values instead of a hand-picked tolerance, poisoned memory, shape grids.

Every number is computed three times: the truth (reference in fp32, or fp64 for fp32 inputs), the reference in the
inputs' own dtype, and the kernel. The kernel passes when its error against the truth is at most twice the same-dtype
error plus a small constant of the dtype, for every output and every gradient. So the bar follows the arithmetic
instead of a guess. (Method: the tests of Apple's cut-cross-entropy; poisoned memory as in those of
flash-linear-attention.)

    assert_parity(ops.rms_norm, reference.rms_norm, dict(x=x, weight=w, eps=1e-6), grad=("x", "weight"))
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = ("contiguous", "padded", "transposed")

CONSTANT = {torch.bfloat16: 1e-3, torch.float16: 1.25e-4, torch.float32: 1e-6, torch.float64: 1e-12}
"""What is added to twice the same-dtype error: a quarter of a rounding step of the dtype (fp32: ten steps, for other
summation orders).
"""

INTERPRETER_BF16 = 8e-3
"""The constant for bf16 on the CPU: Triton's interpreter cuts off the low bits where the GPU rounds to nearest, a
whole step (2^-7) off at worst at each of the one or two roundings of an operation. The GPU run holds bf16 to the
tight constant; fp16 and fp32 are exact here too.
"""


@dataclass(frozen=True)
class Comparison:
    """One compared tensor. Errors are relative: of the whole tensor in the 2-norm, and of the worst element against
    the largest one.
    """

    name: str
    kernel_l2: float
    same_dtype_l2: float
    kernel_max: float
    same_dtype_max: float
    constant: float

    @property
    def ok(self) -> bool:
        """Whether both errors are within twice the same-dtype error plus the constant; NaN never is."""
        l2 = self.kernel_l2 <= 2 * self.same_dtype_l2 + self.constant
        # One element may round the other way than its neighbour: the worst element gets four constants, i.e. one
        # rounding step.
        worst = self.kernel_max <= 2 * self.same_dtype_max + 4 * self.constant
        return l2 and worst

    def __str__(self) -> str:
        return (
            f"{self.name}: l2 {self.kernel_l2:.3e} (same dtype {self.same_dtype_l2:.3e}), "
            f"max {self.kernel_max:.3e} (same dtype {self.same_dtype_max:.3e}), constant {self.constant:.1e}"
        )


def errors(actual: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Relative error of ``actual`` against ``truth``: (2-norm ratio, largest difference over largest value); NaN
    stays NaN.

    Where the truth is all zeros the ratio is taken to 1, so that any wrong value shows. Empty tensors have no error.
    """
    if actual.shape != truth.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} differs from the reference's {tuple(truth.shape)}")
    if truth.numel() == 0:
        return 0.0, 0.0
    a, t = actual.detach().double(), truth.detach().double()
    # Infinite where the truth is infinite (masked log-probabilities) is right, not an error.
    difference = torch.where(a == t, torch.zeros_like(t), a - t)
    finite = torch.where(t.isfinite(), t, torch.zeros_like(t))
    norm, largest = float(finite.norm()), float(finite.abs().max())
    return float(difference.norm()) / (norm or 1.0), float(difference.abs().max()) / (largest or 1.0)


def same_layout(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides; the gaps between rows are NaN (or a large integer), so reading them shows."""
    shown = tensor.detach()
    for dim, (size, stride) in enumerate(zip(shown.shape, shown.stride(), strict=True)):
        if stride == 0 and size > 1:  # expanded: copy one slice and expand again
            return same_layout(shown.narrow(dim, 0, 1)).expand(shown.shape)
    copy = torch.empty_strided(shown.shape, shown.stride(), dtype=shown.dtype, device=shown.device)
    extent = 1 + sum((n - 1) * s for n, s in zip(shown.shape, shown.stride(), strict=True)) if shown.numel() else 0
    torch.as_strided(copy, (extent,), (1,)).fill_(_poison(shown.dtype))
    return copy.copy_(shown)


def assert_parity(
    op: Callable[..., object],
    reference: Callable[..., object],
    inputs: Mapping[str, object],
    *,
    grad: Sequence[str] = (),
    seed: int = 7,
    constant: float | Mapping[str, float] | None = None,
) -> list[Comparison]:
    """Compares ``op(**inputs)`` with ``reference(**inputs)``, outputs and the gradients of the inputs named in
    ``grad``.

    Both take keyword arguments and return a tensor or a tuple of tensors (``None`` entries are skipped). Tensor
    inputs are copied with their strides for each of the three runs, so in-place operations are fine as long as they
    return what they changed. Upstream gradients are random. ``constant`` replaces the dtype's own, for all tensors or
    by name as in {"grad x": 1e-2} (say why where it is used). The dtype is the widest-rounding one among the floating
    inputs. Returns the comparisons; raises AssertionError that lists every tensor when one fails.
    """
    dtype = _narrowest(inputs)
    wide = torch.float64 if dtype is torch.float32 else torch.float32
    truth = _run(reference, inputs, grad, seed, wide)
    same = _run(reference, inputs, grad, seed, None)
    with poisoned_memory():
        ours = _run(op, inputs, grad, seed, None)
    if [n for n, _ in ours] != [n for n, _ in same]:
        raise AssertionError(f"kernel returned {[n for n, _ in ours]}, reference {[n for n, _ in same]}")
    on_cpu = any(isinstance(v, torch.Tensor) and v.device.type == "cpu" for v in inputs.values())
    usual = INTERPRETER_BF16 if on_cpu and dtype is torch.bfloat16 else CONSTANT[dtype]
    given = constant if isinstance(constant, Mapping) else {}
    limit = constant if isinstance(constant, float) else usual
    results = []
    for (name, k), (_, s), (_, t) in zip(ours, same, truth, strict=True):
        if k.dtype != s.dtype:
            raise AssertionError(f"{name}: kernel returned {k.dtype}, reference {s.dtype}")
        (k2, km), (s2, sm) = errors(k, t), errors(s, t)
        results.append(Comparison(name, k2, s2, km, sm, given.get(name, limit)))
    if not all(r.ok for r in results):
        lines = "\n".join(("  ok   " if r.ok else "  FAIL ") + str(r) for r in results)
        raise AssertionError(f"kernel error above 2x the same-dtype error plus the constant:\n{lines}")
    return results


def _run(
    call: Callable[..., object], inputs: Mapping[str, object], grad: Sequence[str], seed: int, wide: torch.dtype | None
) -> list[tuple[str, torch.Tensor]]:
    """Runs ``call`` on copies (in ``wide`` if given) and returns the named outputs and gradients."""
    copies: dict[str, object] = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            copy = same_layout(value)
            if wide is not None and value.is_floating_point():
                copy = copy.to(wide)
            value = copy.requires_grad_(name in grad)
        copies[name] = value
    raw = call(**copies)
    outputs = [o for o in (raw if isinstance(raw, tuple) else (raw,)) if o is not None]
    named = [(f"output {i}", o.detach()) for i, o in enumerate(outputs)]
    if not grad:
        return named
    live = [o for o in outputs if o.requires_grad]
    # Rounded to the inputs' dtype first, so that all three runs get the same numbers.
    upstream = [
        random_tensor(tuple(o.shape), dtype=_narrowest(inputs), device=o.device, seed=seed + i).to(o.dtype)
        for i, o in enumerate(live)
    ]
    found = torch.autograd.grad(live, [copies[n] for n in grad], upstream, allow_unused=True)
    for name, value in zip(grad, found, strict=True):
        if value is None:
            raise AssertionError(f"no gradient reached {name}")
        if value.dtype != copies[name].dtype or value.shape != copies[name].shape:
            raise AssertionError(f"gradient of {name} is {value.dtype} {tuple(value.shape)}")
        named.append((f"grad {name}", value))
    return named


def _narrowest(inputs: Mapping[str, object]) -> torch.dtype:
    """The floating dtype among the inputs that rounds the most."""
    return max(
        (v.dtype for v in inputs.values() if isinstance(v, torch.Tensor) and v.is_floating_point()),
        key=lambda dtype: CONSTANT[dtype],
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside the block every fresh allocation of any thread (``empty``, ``empty_like``, ``new_empty``, ...) is filled
    with NaN, or with the largest integer, so an element that a kernel forgets to write or reads too early shows. Uses
    torch's own switch, which comes with deterministic algorithms (warnings about missing ones are silenced)."""
    mode, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            torch.utils.deterministic.fill_uninitialized_memory = fill


def capture_and_replay(build: Callable[[], Callable[[], tuple[torch.Tensor, ...]]]) -> None:
    """Runs a step eagerly, captures it in a CUDA graph, spoils the captured outputs, replays, and compares bit by
    bit.

    ``build`` makes the step with its inputs; it is called on the capture's own stream, where gradients then belong.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step = build()
        expected = [t.detach().clone() for t in step()]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = [t.detach() for t in step()]
        for tensor in captured:
            tensor.fill_(_poison(tensor.dtype))
        graph.replay()
    stream.synchronize()
    for index, (got, wanted) in enumerate(zip(captured, expected, strict=True)):
        if not torch.equal(got, wanted):
            raise AssertionError(f"output {index} of the replayed graph differs from the eager run")


@contextmanager
def no_waits() -> Iterator[None]:
    """Inside the block, whatever makes the host wait for the GPU is an error, as far as torch notices it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that the mode is a prototype, after it has set it
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _poison(dtype: torch.dtype) -> float | int:
    if dtype.is_floating_point:
        return math.nan
    return 1 if dtype is torch.bool else torch.iinfo(dtype).max


def random_tensor(
    shape: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
    layout: str = "contiguous",
    scale: float = 1.0,
) -> torch.Tensor:
    """Standard normal values times ``scale``, the same numbers for every dtype, device and layout up to rounding.

    ``layout``: "contiguous"; "padded" (rows further apart than their width: a slice of a wider buffer); "transposed"
    (the first two dimensions swapped in memory; for one dimension: every second element). The gaps of a padded tensor
    are NaN.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"random_tensor: layout must be one of {LAYOUTS}; received {layout!r}")
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(tuple(shape), generator=generator) * scale).to(dtype).to(device)
    if layout == "contiguous":
        return values
    if len(shape) == 1 or layout == "padded":
        step = 2 if layout == "transposed" else 1
        wider = torch.full((*shape[:-1], step * shape[-1] + 8), math.nan, dtype=dtype, device=device)
        view = wider[..., : step * shape[-1] : step]
    else:
        view = torch.empty((shape[1], shape[0], *shape[2:]), dtype=dtype, device=device).transpose(0, 1)
    return view.copy_(values)


def row_shapes(device: str) -> tuple[tuple[int, int], ...]:
    """(rows, width) pairs worth testing: no rows, one, odd sizes, around powers of two, and (on the GPU) widths of
    real models and more rows than one wave of programs.
    """
    small = ((0, 33), (1, 1), (5, 33), (3, 128))
    return small if device == "cpu" else (*small, (4099, 128), (333, 1000), (130, 2560), (37, 4096), (9, 8192))


@contextmanager
def interpreted_loops() -> Iterator[None]:
    """Lets kernels loop over a run-time count in Triton's interpreter: triton 3.6 turns such a count into an index with
    ``int(array of one element)``, which numpy 2.4 refuses. Goes when triton uses ``.item()``.
    """
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def with_item(tensor: object, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = with_item
    try:
        yield
    finally:
        interpreter._patch_lang_tensor = original
