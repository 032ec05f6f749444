"""What holds for every operation alike: autocast leaves it alone, a CUDA graph captures it, indices pass 2^31.

The linear losses and attention, which autocast does change, have their own tests.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dropforge_kernels import ops, reference
from dropforge_kernels.testing import assert_parity, capture_and_replay, random_tensor

Tensors = dict[str, torch.Tensor]
BIG = 2**31


def tensors(device: str) -> Tensors:
    """Inputs of all of them, q and k with four heads of 16."""
    shapes = {"x": (6, 32), "y": (6, 32), "w": (32,), "b": (32,), "q": (6, 4, 16), "k": (6, 4, 16), "v": (6, 4, 16)}
    made = {
        name: random_tensor(shape, dtype=torch.float32, device=device, seed=seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    made |= {"head": random_tensor((16,), dtype=torch.float32, device=device, seed=9)}
    target = torch.tensor([1, -100, 31, 0, 5, 8], device=device)
    return made | {"target": target, "advantages": torch.ones(6, device=device), **angles(device)}


def angles(device: str, tokens: int = 6, pairs: int = 8) -> Tensors:
    turns = torch.arange(tokens)[:, None] * 0.7 / (1 + torch.arange(pairs))
    return {"cos": turns.cos().to(device), "sin": turns.sin().to(device)}


def cross_entropy(t: Tensors, *, inplace: bool = False) -> torch.Tensor:
    return ops.cross_entropy(t["x"] * 1, t["target"], inplace_gradient=inplace)


def grpo(t: Tensors) -> torch.Tensor:
    return ops.grpo_loss(-t["x"].abs(), t["advantages"], t["x"] < 1.0, old_logprobs=-t["y"].abs()).loss


OPERATIONS: dict[str, Callable[[Tensors], torch.Tensor | tuple[torch.Tensor, ...]]] = {
    "rms_norm": lambda t: ops.rms_norm(t["x"], t["w"], eps=1e-6),
    "add_rms_norm": lambda t: ops.add_rms_norm(t["x"], t["y"], t["w"], eps=1e-6),
    "layer_norm": lambda t: ops.layer_norm(t["x"], t["w"], t["b"], eps=1e-5),
    "rope": lambda t: ops.rope(t["q"], t["k"], cos=t["cos"], sin=t["sin"]),
    "qk_norm": lambda t: ops.qk_norm(t["q"], t["k"], t["head"], t["head"], eps=1e-6),
    "qk_norm_rope": lambda t: ops.qk_norm_rope(
        t["q"], t["k"], t["head"], t["head"], cos=t["cos"], sin=t["sin"], eps=1e-6
    ),
    "swiglu": lambda t: ops.swiglu(t["x"], t["y"]),
    "swiglu_packed": lambda t: ops.swiglu_packed(t["x"]),
    "swiglu_clamped": lambda t: ops.swiglu_clamped(t["x"]),
    "geglu": lambda t: ops.geglu(t["x"], t["y"], approximate="tanh"),
    "relu_squared": lambda t: ops.relu_squared(t["x"]),
    "cross_entropy": cross_entropy,
    "cross_entropy in place": lambda t: cross_entropy(t, inplace=True),
    "grpo_loss": grpo,
}


LEAVES = ("x", "y", "w", "b", "q", "k", "v", "head")


def step(name: str, device: str) -> Callable[[], list[torch.Tensor]]:
    """A call for the outputs and the gradients of every tensor that the operation reads; its inputs are made here."""
    given = tensors(device)
    leaves = [given[key].requires_grad_() for key in LEAVES]

    def run() -> list[torch.Tensor]:
        out = OPERATIONS[name](given)
        outputs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        assert outputs
        found = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], allow_unused=True)
        return [*(o.detach() for o in outputs), *(g for g in found if g is not None)]

    return run


@pytest.mark.parametrize("name", OPERATIONS)
def test_autocast_changes_nothing(device, name):
    plain = step(name, device)()
    with torch.autocast(device, dtype=torch.bfloat16):
        under = step(name, device)()
    for a, b in zip(plain, under, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_captured_in_a_graph(name):
    capture_and_replay(lambda: step(name, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1024, 2048, 2560, 4096, 8192])
def test_norms_of_many_rows(width):
    """More rows than programs: each walks over many, and another cut is chosen from 32M elements on."""
    rows = max(16399, (32 << 20) // width + 17)
    x, weight, bias = (
        random_tensor(s, dtype=torch.bfloat16, device="cuda", seed=i)
        for i, s in enumerate(((rows, width), (width,), (width,)))
    )
    given = {"x": x, "weight": weight, "eps": 1e-6}
    assert_parity(ops.rms_norm, reference.rms_norm, given, grad=("x", "weight"))
    assert_parity(ops.layer_norm, reference.layer_norm, given | {"bias": bias}, grad=("x", "weight", "bias"))


def big(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def last_rows(op: Callable, plain: Callable, *given: torch.Tensor, rows: int = 4) -> None:
    """The last rows, forward and backward, are those of the same rows alone."""
    leaves = [t.requires_grad_() for t in given]
    out = op(*leaves)
    found = torch.autograd.grad(out, leaves, torch.ones_like(out))
    alone = [t.detach()[-rows:].clone().requires_grad_() for t in given]
    expected = plain(*alone)
    torch.testing.assert_close(out[-rows:], expected, atol=2e-2, rtol=2e-2)
    for got, wanted in zip(found, torch.autograd.grad(expected, alone, torch.ones_like(expected)), strict=True):
        torch.testing.assert_close(got[-rows:], wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
class TestMoreThanTwoToThe31Elements:
    """One process at a time holds up to 30 GiB here; rope, swiglu and relu_squared have theirs in their own files."""

    rows = BIG // 4096 + 3

    def test_rms_norm(self):
        weight = big(4096)
        last_rows(
            lambda x: ops.rms_norm(x, weight, eps=1e-6),
            lambda x: reference.rms_norm(x, weight, eps=1e-6),
            big(self.rows, 4096),
        )

    def test_layer_norm(self):
        weight, bias = big(4096), big(4096)
        last_rows(
            lambda x: ops.layer_norm(x, weight, bias, eps=1e-5),
            lambda x: reference.layer_norm(x, weight, bias, eps=1e-5),
            big(self.rows, 4096),
        )

    def test_weight_gradients_sum_every_row(self):
        x, weight = big(self.rows, 4096), torch.ones(4096, device="cuda", requires_grad=True)
        x[:-1] = 0
        (gradient,) = torch.autograd.grad(ops.rms_norm(x, weight, eps=1e-6).float().sum(), weight)
        expected = reference.rms_norm(x[-1:].float(), None, eps=1e-6)[0]
        torch.testing.assert_close(gradient, expected, atol=2e-2, rtol=2e-2)

    def test_qk_norm_rope(self):
        tokens = BIG // (32 * 128) + 3
        weight, table = big(128), angles("cuda", 64, 64)
        places = torch.arange(tokens, device="cuda", dtype=torch.int32) % 64
        k = big(tokens, 1, 128)

        def run(op: Callable, q: torch.Tensor) -> torch.Tensor:
            count = q.shape[0]
            options = {"positions": places[-count:], "eps": 1e-6, **table}
            return op(q, k[-count:], weight, weight, **options)[0]

        last_rows(lambda q: run(ops.qk_norm_rope, q), lambda q: run(reference.qk_norm_rope, q), big(tokens, 32, 128))

    @pytest.mark.parametrize("inplace", [False, True])
    def test_cross_entropy(self, inplace):
        vocabulary = 262208
        rows = BIG // vocabulary + 3
        target = torch.arange(rows, device="cuda")
        logits = big(rows, vocabulary)
        tail = logits[-3:].clone().requires_grad_()
        logits.requires_grad_()
        work = logits * 1 if inplace else logits
        loss = ops.cross_entropy(work, target, reduction="sum", inplace_gradient=inplace)
        (found,) = torch.autograd.grad(loss, logits, torch.full_like(loss, 2.0))
        expected = reference.cross_entropy(tail, target[-3:], reduction="sum")
        (wanted,) = torch.autograd.grad(expected, tail, torch.full_like(expected, 2.0))
        torch.testing.assert_close(found[-3:], wanted, atol=2e-2, rtol=2e-2)
        assert loss.isfinite()

    @pytest.mark.parametrize("bits", [32, 8])
    def test_adamw(self, bits):
        count = BIG + 4096
        param, grad = big(count), big(count)
        tail, slope = param[-4096:].clone(), grad[-4096:].clone()
        state, own = ops.adamw_state(param, bits=bits), ops.adamw_state(tail, bits=bits)
        norm = ops.gradient_norm(grad)
        ops.adamw(param, grad, state, lr=0.1)
        reference.adamw(tail, slope, own, lr=0.1)
        torch.testing.assert_close(param[-4096:], tail, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(norm, torch.tensor(float(count) ** 0.5, device="cuda"), rtol=1e-3, atol=0.0)

    @pytest.mark.parametrize("kind", ["rows", "blocks"])
    def test_fp8(self, kind):
        x = big(BIG // 4096 + 128, 4096)
        quantize, back = (getattr(ops, f"fp8_{word}_{kind}") for word in ("quantize", "dequantize"))
        found = back(*quantize(x), dtype=torch.bfloat16)[-128:]
        codes, scale = getattr(reference, f"fp8_quantize_{kind}")(x[-128:])
        expected = getattr(reference, f"fp8_dequantize_{kind}")(codes, scale, dtype=torch.bfloat16)
        assert torch.equal(found, expected)

    def test_packed_attention(self):
        length, tokens = 128, BIG // (32 * 128) + 128
        edges = torch.arange(0, tokens + 1, length, dtype=torch.int32, device="cuda")
        k, v = big(tokens, 1, 128), big(tokens, 1, 128)

        def run(op: Callable, q: torch.Tensor) -> torch.Tensor:
            count = q.shape[0]
            bounds = ops.document_bounds(edges[: count // length + 1], count)
            return op(q, k[-count:], v[-count:], bounds)

        plain = reference.packed_attention
        for q in (big(tokens, 32, 128), big(32, tokens, 128).transpose(0, 1)):
            last_rows(lambda q: run(ops.packed_attention, q), lambda q: run(plain, q), q, rows=length)
