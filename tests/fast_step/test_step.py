"""BucketStep without a GPU: what happens when memory runs out half-way, and where nothing can be captured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dropforge.fast_step import step as module
from dropforge.fast_step.compiled import LayerCompiler
from dropforge.fast_step.report import FastReport, Way
from dropforge.fast_step.step import BucketStep
from dropforge.packing.choose import choose_packing
from dropforge.packing.feed import Feeder
from dropforge.packing.rows import from_flat
from dropforge.packing.shapes import BucketShape

LIMIT = 512


class Model:
    """Adds up the ids of all targets in a one-value gradient; runs out of memory above LIMIT tokens."""

    def __init__(self) -> None:
        self.weight = torch.zeros(1, requires_grad=True)
        self.weight.grad = torch.zeros(1)
        self.fits = LIMIT
        self.attempts = 0

    def loss(self, inputs):
        self.attempts += 1
        targets = inputs["shift_labels"]
        part = (targets * (targets > 0)).sum() / inputs["num_items_in_batch"]
        whole = (self.weight + 1.0) * part
        if inputs["input_ids"].shape[1] > self.fits:
            self.weight.grad.add_(1e6)  # half of a backward
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return whole.sum()


@pytest.fixture
def feeder():
    random = np.random.default_rng(0)
    lengths = random.integers(20, 90, 60)
    ids = random.integers(3, 97, int(lengths.sum()))
    rows = from_flat(ids, ids, lengths)
    feeder = Feeder(
        rows, choose_packing(rows, documents_per_step=20, per_micro=1, budget=2048, seed=1).plan, pad=0, pin=False
    )
    yield feeder
    feeder.close()


def step_of(model, feeder, **options):
    report = FastReport()
    step = BucketStep(model.loss, grads=[model.weight.grad], device=torch.device("cpu"), report=report,
                      split=feeder.split, **options)  # fmt: skip
    return step, report


def run(step, batch):
    for grad in step.grads:
        grad.zero_()
    step.begin()
    for micro in batch.micro:
        step.run(micro)
    return float(step.loss)


def test_a_bucket_that_does_not_fit_is_cut_and_loses_nothing(feeder):
    model, enough = Model(), Model()
    enough.fits = 1 << 20
    step, report = step_of(model, feeder)
    other, _ = step_of(enough, feeder)
    for number in range(2):
        batch = feeder.step(0, number)
        assert run(step, batch) == pytest.approx(run(other, batch))
        assert model.weight.grad.item() == pytest.approx(enough.weight.grad.item())
    ways = {bucket.shape.tokens: bucket.way for bucket in report.buckets.values()}
    assert all((way is Way.SPLIT) == (tokens > LIMIT) for tokens, way in ways.items())
    assert any("out of memory" in bucket.reason for bucket in report.buckets.values())


def test_a_model_that_can_need_less_is_asked_first(feeder):
    model = Model()

    def retreat():
        model.fits *= 2
        return f"now {model.fits}"

    step, report = step_of(model, feeder, retreat=retreat)
    run(step, feeder.step(0, 0))
    assert report.notes[0] == "now 1024"
    assert all(bucket.way is Way.EAGER for bucket in report.buckets.values())


def test_one_document_that_does_not_fit_ends_it(feeder):
    model = Model()
    model.fits = 0
    step, _ = step_of(model, feeder)
    with pytest.raises(torch.OutOfMemoryError, match="a document of"):
        run(step, feeder.step(0, 0))
    assert model.weight.grad.item() == 0.0


def test_gradients_too_large_to_copy_are_not_guessed_at(feeder, monkeypatch):
    """Before a step's first micro-batch they are known to be zero. Later a half-written gradient that nobody kept a copy
    of must end the training, not be learnt from."""
    monkeypatch.setattr(module, "MOST_KEPT", 3)
    model = Model()
    micro = feeder.step(0, 0).micro[0]
    step, report = step_of(model, feeder)

    def loss(inputs):
        model.fits = 0 if model.attempts in (0, 2) else 1 << 20  # the whole, and the second half
        return model.loss(inputs)

    step.loss_of = loss
    step.begin()
    with pytest.raises(torch.OutOfMemoryError, match="Tried"):
        step.run(micro)
    assert model.attempts == 3
    assert report.buckets[micro.shape].way is Way.SPLIT


def test_memory_that_runs_out_later_is_survived(feeder):
    """A shape that fitted once need not fit again, once graphs and other shapes have taken their share."""
    model, enough = Model(), Model()
    model.fits = enough.fits = 1 << 20
    step, report = step_of(model, feeder)
    other, _ = step_of(enough, feeder)
    batch = feeder.step(0, 0)
    run(step, batch)
    model.fits = LIMIT
    assert run(step, batch) == pytest.approx(run(other, batch))
    assert model.weight.grad.item() == pytest.approx(enough.weight.grad.item())
    assert any(bucket.way is Way.SPLIT for bucket in report.buckets.values())


class Graph:
    """Counts replays; stands in for a CUDA graph."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


def test_graphs_go_before_the_model_is_asked_and_not_for_ever(feeder, monkeypatch):
    """Twice they are made again; then the model must need less; then there are no more graphs."""
    model, said = Model(), []
    step, report = step_of(model, feeder, retreat=lambda: said.append("asked") or "")
    monkeypatch.setattr(step, "_drop_graphs", lambda: said.append("dropped") or "memory: 1 captured shapes given up")
    assert all(step._make_room(new=True) for _ in range(9))  # a new shape needs the room once
    said.clear()
    notes = [step._make_room(new=False) for _ in range(3)]
    assert said == ["dropped", "dropped", "asked", "dropped"]
    assert all("given up" in note for note in notes)
    assert not step.capture
    assert step.why_not == "graphs left no room for other shapes"


def test_dropped_graphs_leave_their_shapes_eager_and_free(feeder, monkeypatch):
    model = Model()
    step, report = step_of(model, feeder)
    micro = feeder.step(0, 0).micro[0]
    model.fits = 1 << 20
    step.run(micro)
    slot = step._slots[micro.shape]
    slot.graph = Graph()
    report.bucket(micro.shape).way = Way.CAPTURED
    step.captures = 1
    step.run(micro)
    assert slot.graph.replays == 1
    monkeypatch.setattr(module, "GraphPool", lambda device: "pool")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    step.pool = "old pool"
    assert "1 captured shapes given up" in step._drop_graphs()
    assert (slot.graph, step.captures, step.pool) == (None, 0, "pool")
    assert report.bucket(micro.shape).way is Way.EAGER
    assert step._drop_graphs() == ""


class Pool:
    """Records when it has room; stands in for a pool of graphs."""

    room = 0

    def __init__(self, device=None) -> None:
        Pool.room += 1

    def record(self, work):
        if Pool.room < 2:
            return None, "capture failed: OutOfMemoryError: no room"
        return Graph(), ""


def test_a_capture_for_which_others_leave_no_room_is_tried_without_them(feeder, monkeypatch):
    monkeypatch.setattr(module, "GraphPool", Pool)
    for name in ("synchronize", "empty_cache", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: 0)
    monkeypatch.setattr(Pool, "room", 0)
    step, report = step_of(Model(), feeder)
    small, large = (step_shape(tokens) for tokens in (256, 512))
    for shape in (small, large):
        step._slots[shape] = module._Slot(shape, torch.device("cpu"))
    step.pool = Pool()
    step._slots[small].graph, report.bucket(small).way, step.captures = Graph(), Way.CAPTURED, 1
    step._capture(step._slots[large], report.bucket(large))
    assert (report.bucket(large).way, report.bucket(large).reason) == (Way.CAPTURED, "")
    assert (report.bucket(small).way, step.captures) == (Way.EAGER, 1)
    assert step._slots[small].graph is None
    assert "given up" in report.notes[0]
    Pool.room = -9  # no room whatever is given up: it stays eager, with the reason
    step._capture(step._slots[small], report.bucket(small))
    assert report.bucket(small).way is Way.EAGER
    assert "OutOfMemoryError" in report.bucket(small).reason


def step_shape(tokens):
    return BucketShape(tokens=tokens, documents=8, longest=tokens, counted=tokens)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)

    def forward(self, x):
        return torch.nn.functional.gelu(self.inner(x))


class Layered(torch.nn.Module):
    """Two equal layers over an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(97, 8)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(2))

    def loss(self, inputs):
        x = self.embed(inputs["input_ids"].clamp(max=96))
        for layer in self.layers:
            x = layer(x)
        return (x.square().sum(-1) * (inputs["shift_labels"] > 0)).sum() / inputs["num_items_in_batch"]


def layered(feeder, backend=None, why_not=""):
    model = Layered()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    layers = None if backend is None else LayerCompiler(model, backend=backend, why_not=why_not)
    report = FastReport()
    step = BucketStep(model.loss, grads=[p.grad for p in model.parameters()], device=torch.device("cpu"), report=report,
                      split=feeder.split, why_not="dropout", layers=layers)  # fmt: skip
    return step, report


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's compiler looks at every input
def test_layers_are_compiled_where_nothing_can_be_captured(feeder):
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    ours, report = layered(feeder, backend)
    theirs, plain = layered(feeder)
    for number in [0] * 3 + [1]:
        batch = feeder.step(0, number)
        assert run(ours, batch) == pytest.approx(run(theirs, batch), rel=1e-6)
        for mine, other in zip(ours.grads, theirs.grads, strict=True):
            assert torch.allclose(mine, other, rtol=1e-5, atol=1e-7)
    assert calls
    again = [bucket for bucket in report.buckets.values() if bucket.runs >= module.COMPILE_FROM]
    assert again
    assert all(bucket.way is Way.COMPILED and bucket.reason == "dropout" for bucket in again)
    assert all(bucket.way is Way.EAGER for bucket in plain.buckets.values())
    assert any("compiled: dropout" in line for line in report.lines())
    assert not ours.layers.on, "between runs the layers are as they were"


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's compiler looks at every input
def test_layers_that_do_not_compile_stay_eager_and_say_why(feeder):
    def backend(graph, inputs):
        raise RuntimeError("no compiler here")

    ours, report = layered(feeder, backend)
    theirs, _ = layered(feeder)
    batch = feeder.step(0, 0)
    for _ in range(4):
        assert run(ours, batch) == pytest.approx(run(theirs, batch), rel=1e-6)
    assert not ours.layers.on
    reasons = [bucket.reason for bucket in report.buckets.values() if bucket.runs >= module.COMPILE_FROM]
    assert reasons
    assert all("not compiled" in reason and "no compiler here" in reason for reason in reasons)
    assert all(bucket.way is Way.EAGER for bucket in report.buckets.values())


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("wrong", [2.0, float("nan")], ids=["other", "nan"])
def test_a_compiler_that_computes_something_else_is_found_out(feeder, wrong):
    def backend(graph, inputs):
        return lambda *arguments: [out * wrong for out in graph.forward(*arguments)]

    ours, report = layered(feeder, backend)
    theirs, _ = layered(feeder)
    batch = feeder.step(0, 0)
    for _ in range(4):
        assert run(ours, batch) == pytest.approx(run(theirs, batch), rel=1e-6)
        for mine, other in zip(ours.grads, theirs.grads, strict=True):
            assert torch.allclose(mine, other, rtol=1e-5, atol=1e-7)
    assert all(bucket.way is Way.EAGER for bucket in report.buckets.values())
    assert any("compiled, the loss is" in bucket.reason for bucket in report.buckets.values())


def test_hand_written_layers_are_not_compiled(feeder):
    ours, report = layered(feeder, backend="eager", why_not="the layers are hand-written")
    batch = feeder.step(0, 0)
    for _ in range(4):
        run(ours, batch)
    reasons = [bucket.reason for bucket in report.buckets.values() if bucket.runs >= module.COMPILE_FROM]
    assert reasons
    assert set(reasons) == {"dropout; not compiled either: the layers are hand-written"}
