"""Fused linear cross-entropy against its reference: chunks, compaction, frozen and trained head, compile, capture."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
from dropforge_kernels import ops, reference
from dropforge_kernels.ops._head_chunks import chunk_rows
from dropforge_kernels.testing import DTYPES, INTERPRETER_BF16, assert_parity, no_waits, random_tensor

OPTIONS = {
    "plain": {},
    "softcap": {"logit_softcap": 5.0, "logit_scale": 0.7},
    "smoothing and z-loss": {"label_smoothing": 0.1, "z_loss_weight": 1e-2, "reduction": "sum"},
    "items": {"reduction": "sum", "num_items_in_batch": 37},
    "all rows": {"skip_ignored": False},
    "bound": {"max_valid": 33},
    "tight bound": {"max_valid": 26},
}
ROWS = 40  # three chunks of 16 under a budget of one byte; 14 rows of them are ignored


def inputs(dtype, device, *, rows=ROWS, width=24, vocabulary=77, ignored=True, **options):
    target = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(rows))
    if ignored:
        target[::3] = -100
    hidden = random_tensor((rows, width), dtype=dtype, device=device)
    weight = random_tensor((vocabulary, width), dtype=dtype, device=device, seed=1, scale=0.5)
    return {"hidden": hidden, "weight": weight, "target": target.to(device), "memory_budget": 1} | options


def constant(dtype, device):
    return INTERPRETER_BF16 if device == "cpu" and dtype is torch.bfloat16 else None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("grad", [("hidden",), ("hidden", "weight"), ("weight",)], ids="+".join)
def test_values_and_gradients(device, dtype, options, grad):
    if device == "cpu" and dtype is not torch.float32 and grad != ("hidden", "weight"):
        pytest.skip("the GPU runs the whole grid; the interpreter needs a second for each")
    given = inputs(dtype, device, **options)
    assert_parity(
        ops.linear_cross_entropy,
        reference.linear_cross_entropy,
        given,
        grad=grad,
        constant=constant(dtype, device),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.gpu
def test_sizes_of_real_models(device, dtype):
    if device == "cpu":
        pytest.skip("large")
    for rows, width, vocabulary in ((1500, 1024, 151936), (777, 2560, 262208), (2049, 4096, 128256), (129, 512, 32001)):
        given = inputs(dtype, device, rows=rows, width=width, vocabulary=vocabulary, memory_budget=256 << 20)
        given["weight"] *= 0.04
        assert_parity(ops.linear_cross_entropy, reference.linear_cross_entropy, given, grad=("hidden", "weight"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad", [("hidden",), ("bias",), ("hidden", "weight", "bias")], ids="+".join)
@pytest.mark.parametrize("options", [{}, {"max_valid": 26, "logit_softcap": 5.0}], ids=["plain", "bound, softcap"])
def test_head_with_bias(device, dtype, grad, options):
    given = inputs(dtype, device, **options)
    given["bias"] = random_tensor((77,), dtype=dtype, device=device, seed=2)
    assert_parity(
        ops.linear_cross_entropy, reference.linear_cross_entropy, given, grad=grad, constant=constant(dtype, device)
    )


@pytest.mark.parametrize("options", [{}, {"max_valid": 33}, {"skip_ignored": False}, {"reduction": "sum"}])
def test_count_receives_the_targets_that_count(device, options):
    given = inputs(torch.float32, device, **options)
    expected = ops.linear_cross_entropy(**given)
    count = torch.full((), -1.0, device=device)
    assert torch.equal(ops.linear_cross_entropy(**given, count=count), expected)
    assert count.item() == int((given["target"] != -100).sum()) == 26
    reference.linear_cross_entropy(**given, count=count.zero_())
    assert count.item() == 26


@pytest.mark.gpu
def test_bounded_step_never_waits_for_the_device():
    """Sum, count, gradients: what a captured training step uses, under torch's watch for synchronisation."""
    given = inputs(torch.bfloat16, "cuda", width=64, vocabulary=32768, max_valid=30, reduction="sum")
    leaves = [given[name].requires_grad_() for name in ("hidden", "weight")]
    count = torch.zeros((), device="cuda")
    ops.linear_cross_entropy(**given, count=count).backward()
    with no_waits():
        loss = ops.linear_cross_entropy(**given, count=count)
        torch.autograd.grad(loss, leaves)
    assert count.item() == 26


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_few_rows(device, rows):
    given = inputs(torch.float32, device, rows=rows, ignored=False)
    assert_parity(ops.linear_cross_entropy, reference.linear_cross_entropy, given, grad=("hidden", "weight"))


@pytest.mark.parametrize("options", [{}, {"max_valid": 0}, {"max_valid": 20}, {"skip_ignored": False}])
def test_nothing_counted(device, options):
    given = inputs(torch.float32, device, **options)
    given["target"].fill_(-100)
    assert_parity(ops.linear_cross_entropy, reference.linear_cross_entropy, given, grad=("hidden", "weight"))


def test_no_gradient_needed(device):
    given = inputs(torch.float32, device)
    assert_parity(ops.linear_cross_entropy, reference.linear_cross_entropy, given)


def test_leading_dimensions_and_transposed_inputs(device):
    given = inputs(torch.float32, device)
    given["hidden"] = random_tensor((ROWS, 24), dtype=torch.float32, device=device, layout="transposed").view(
        1, ROWS, 24
    )
    given["weight"] = random_tensor((77, 24), dtype=torch.float32, device=device, layout="transposed", seed=1)
    given["target"] = given["target"].view(1, ROWS)
    assert_parity(ops.linear_cross_entropy, reference.linear_cross_entropy, given, grad=("hidden", "weight"))


@pytest.mark.parametrize(
    ("options", "counted", "computed"),
    [
        ({}, 26, [26]),  # the number is read first
        ({}, 40, [40]),
        ({}, 0, []),
        ({"max_valid": 40}, 26, [40]),  # the caller says how many there are at most
        ({"max_valid": 30}, 26, [30]),
        ({"skip_ignored": False}, 26, [40]),
        ({"memory_budget": 1}, 26, [16, 10]),  # several chunks: while the first runs
    ],
)
@pytest.mark.parametrize("worth", [True, False])
def test_one_large_chunk_leaves_ignored_rows_out(device, worth, options, counted, computed, monkeypatch):
    from dropforge_kernels.ops import _head_chunks

    if worth:
        module = importlib.import_module("dropforge_kernels.ops.linear_cross_entropy")  # the name is the function's too
        monkeypatch.setattr(module, "WORTH_WAITING", 4 * ROWS * 24 * 77)
    elif not options:
        computed = [ROWS]  # too little work to wait for the number
    rows, logits_of = [], _head_chunks.Head.logits_of

    def seen(self, chunk):
        rows.append(chunk.stop - chunk.start)
        return logits_of(self, chunk)

    monkeypatch.setattr(_head_chunks.Head, "logits_of", seen)
    given = inputs(torch.float32, device, **({"memory_budget": None} | options), ignored=counted == 26)
    if counted == 0:
        given["target"].fill_(-100)
    assert_parity(ops.linear_cross_entropy, reference.linear_cross_entropy, given, grad=("hidden", "weight"))
    assert rows and rows[: len(computed)] == computed if computed else not rows
    assert len(rows) % max(1, len(computed)) == 0


def test_ignored_rows_do_not_matter(device):
    given = inputs(torch.float32, device)
    expected = ops.linear_cross_entropy(**given)
    given["hidden"][::3] = float("nan")
    for options in ({}, {"max_valid": 30}, {"skip_ignored": False}):
        assert torch.equal(ops.linear_cross_entropy(**(given | options)), expected) or options == {
            "skip_ignored": False
        }
        assert ops.linear_cross_entropy(**(given | options)).isfinite()


def test_bound_below_the_counted_rows_is_nan(device):
    assert ops.linear_cross_entropy(**inputs(torch.float32, device, max_valid=25)).isnan()
    assert ops.linear_cross_entropy(**inputs(torch.float32, device, max_valid=26)).isfinite()


def test_backward_twice_gives_the_same(device):
    given = inputs(torch.float32, device)
    leaf = given["hidden"].requires_grad_()
    loss = ops.linear_cross_entropy(**given) * 5
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_fp16_gradients_survive_a_small_divisor_share(device):
    """1 / 10^6 times a probability is below fp16's smallest number; with a loss scale the gradient must not vanish."""
    given = inputs(torch.float16, device, num_items_in_batch=1_000_000)
    leaf = given["hidden"].requires_grad_()
    (ours,) = torch.autograd.grad(ops.linear_cross_entropy(**given) * 65536.0, leaf)
    wide = {k: v.float() if k in ("hidden", "weight") else v for k, v in given.items()}
    wide["hidden"] = wide["hidden"].detach().requires_grad_()
    (truth,) = torch.autograd.grad(reference.linear_cross_entropy(**wide) * 65536.0, wide["hidden"])
    assert (ours.float() - truth).norm() < 5e-3 * truth.norm()


def test_autocast(device):
    given = inputs(torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = ops.linear_cross_entropy(**given)
    narrow = {k: v.bfloat16() if k in ("hidden", "weight") else v for k, v in given.items()}
    assert torch.equal(loss, ops.linear_cross_entropy(**narrow))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_without_graph_break(device, backend):
    if device == "cuda":
        torch._dynamo.reset()

    def step(hidden, weight, target, memory_budget, kind=ops):
        return kind.linear_cross_entropy(hidden * 2, weight, target, memory_budget=memory_budget) * 3

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    given = inputs(torch.float32, device)
    assert_parity(compiled, partial(step, kind=reference), given, grad=("hidden", "weight"))


def test_compiles_with_bias_and_count(device):
    def step(hidden, weight, target, bias, count, memory_budget, kind=ops):
        return kind.linear_cross_entropy(
            hidden, weight, target, bias=bias, count=count, memory_budget=memory_budget, reduction="sum"
        )

    given = inputs(torch.float32, device)
    leaves = [given["hidden"].requires_grad_(), torch.zeros(77, device=device, requires_grad=True)]
    results = []
    for run in (torch.compile(step, fullgraph=True, backend="aot_eager"), partial(step, kind=reference)):
        count = torch.zeros((), device=device)
        loss = run(**given, bias=leaves[1], count=count)
        results.append([loss, count, *torch.autograd.grad(loss, leaves)])
    for compiled, plain in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
    assert count.item() == 26


@pytest.mark.parametrize("options", [{}, {"max_valid": 30}])
@pytest.mark.gpu
def test_cuda_graph_capture(options):
    given = inputs(torch.bfloat16, "cuda", width=64, vocabulary=512, **options)
    leaf = given["hidden"].requires_grad_()

    def step():
        loss = ops.linear_cross_entropy(**given)
        return loss, *torch.autograd.grad(loss, leaf)

    expected = [t.detach().clone() for t in step()]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
def test_memory_stays_within_the_budget():
    given = inputs(torch.bfloat16, "cuda", rows=8192, width=1024, vocabulary=128256, memory_budget=256 << 20)
    leaf = given["hidden"].requires_grad_()
    ops.linear_cross_entropy(**given).backward()
    leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = ops.linear_cross_entropy(**given)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < (256 << 20) + 3 * leaf.nbytes
    loss.backward()


def test_chunk_sizes_follow_the_budget():
    assert chunk_rows(16384, 128256, 2, 256 << 20) == 1024
    assert chunk_rows(16384, 128256, 2, 1 << 30) == 4096
    assert chunk_rows(16384, 128256, 2, 1) == 16
    assert chunk_rows(100, 128256, 2, 256 << 20) == 100
    assert chunk_rows(0, 128256, 2, 256 << 20) == 1
    assert chunk_rows(1100, 128256, 2, 256 << 20) == 640
    assert chunk_rows(1100, 262208, 2, 256 << 20) == 384


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"weight": torch.ones(7, 5)}, ValueError, r"weight must have shape \(V, 8\); received \(7, 5\)"),
        ({"weight": torch.ones(7, 8).half()}, TypeError, "weight must have the dtype of hidden"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target must have shape \(4\); received \(3,\)"),
        ({"target": torch.zeros(4)}, TypeError, "target must have dtype int32, int64; received float32"),
        ({"hidden": torch.ones(8)}, ValueError, r"hidden must have shape \(..., H\); received \(8,\)"),
        ({"weight": torch.ones(7, 8, device="meta")}, ValueError, "device"),
        ({"reduction": "none"}, ValueError, "reduction must be one of 'mean', 'sum'; received 'none'"),
        ({"max_valid": -1}, ValueError, "max_valid must not be negative; received -1"),
        ({"memory_budget": 0}, ValueError, "memory_budget must be a positive number of bytes; received 0"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias must have shape \(7\); received \(8,\)"),
        ({"bias": torch.zeros(7).half()}, TypeError, "bias must have the dtype of hidden"),
        ({"count": torch.zeros(1)}, ValueError, r"count must have shape \(\); received \(1,\)"),
        ({"count": torch.zeros((), dtype=torch.int64)}, TypeError, "count must have dtype float32; received int64"),
    ],
)
def test_wrong_arguments_are_refused(change, error, text):
    given = {"hidden": torch.ones(4, 8), "weight": torch.ones(7, 8), "target": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=text):
        ops.linear_cross_entropy(**(given | change))
