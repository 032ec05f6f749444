"""CUDA graphs of packed buckets give what eager gives, and what cannot be captured goes on without them (GPU)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dropforge.fast_step.graph import GraphPool
from dropforge.fast_step.report import Way
from dropforge.fast_step.trainer import FastOptions
from dropforge.packing.collate import model_inputs
from dropforge_kernels.patch.attention_interface import packed_attention

pytestmark = pytest.mark.gpu


def compare(ours, theirs, *, tolerance):
    for (loss, grad), (other, expected) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(other, rel=tolerance)
        assert torch.linalg.vector_norm(expected) > 0
        difference = torch.linalg.vector_norm(grad - expected) / torch.linalg.vector_norm(expected)
        assert difference < tolerance


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_captured_equals_eager_over_several_buckets(tiny, documents, lora, new_bench):
    data = documents(400, longest=200)
    results = []
    for capture in (True, False):
        model = tiny(lora=lora, dtype=torch.bfloat16, device="cuda").train()
        with packed_attention(model):
            bench = new_bench(model, data, capture=capture)
            results.append(bench.steps(10))
    captured = [bucket for bucket in bench.report.buckets.values() if bucket.way is Way.CAPTURED]
    assert not captured, "the second bench must be eager"
    compare(*results, tolerance=2e-2)


def test_several_shapes_are_captured_and_share_one_pool(tiny, documents, new_bench):
    model = tiny(lora=True, dtype=torch.bfloat16, device="cuda").train()
    with packed_attention(model):
        bench = new_bench(model, documents(800, longest=200), per_step=35)
        bench.steps(20)
    captured = [bucket for bucket in bench.report.buckets.values() if bucket.way is Way.CAPTURED]
    assert len({bucket.shape for bucket in captured}) >= 2, bench.report.lines()
    assert all(bucket.capture_seconds > 0 and not bucket.reason for bucket in captured)


def test_full_graph_is_exact_for_one_shape(tiny, documents, new_bench):
    """The same micro-batch eagerly and replayed: nothing is left over from earlier replays."""
    model = tiny(lora=True, dtype=torch.bfloat16, device="cuda").train()
    with packed_attention(model):
        bench = new_bench(model, documents(60, longest=60), per_step=30)
        batch = bench.feeder.step(0, 0)
        losses = []
        for _ in range(5):  # eager, captured, replayed three times
            bench.step.begin()
            for micro in batch.micro:
                bench.step.run(micro)
            losses.append(float(bench.step.loss))
        bench.feeder.close()
    assert bench.step.captures >= 1, bench.report.lines()
    assert np.ptp(losses) <= 1e-3 * abs(losses[0])


def test_what_waits_for_the_gpu_stays_eager_with_its_reason(tiny, documents, new_bench):
    model = tiny(lora=True, dtype=torch.bfloat16, device="cuda").train()
    with packed_attention(model):
        bench = new_bench(model, documents(200, longest=60), per_step=40)

        def loss_of(inputs):
            if float(inputs["input_ids"].sum()) < 0:
                raise AssertionError
            return model(**inputs).loss

        bench.loss_of = loss_of
        first = bench.steps(5)
        again = new_bench(model, documents(200, longest=60), per_step=40, capture=False)
        compare(first, again.steps(5), tolerance=2e-2)
    assert bench.step.captures == 0
    assert any("capture failed" in bucket.reason for bucket in bench.report.buckets.values())
    # torch is whole again: random numbers, allocations and another capture work
    torch.rand(4, device="cuda")
    model2 = tiny(lora=True, dtype=torch.bfloat16, device="cuda").train()
    with packed_attention(model2):
        fresh = new_bench(model2, documents(200, longest=60), per_step=40)
        fresh.steps(5)
    assert fresh.step.captures >= 1, fresh.report.lines()


def test_out_of_memory_in_capture_falls_back(tiny, documents, new_bench):
    model = tiny(lora=True, dtype=torch.bfloat16, device="cuda").train()
    with packed_attention(model):
        bench = new_bench(model, documents(200, longest=60), per_step=40)

        def loss_of(inputs):
            if torch.cuda.is_current_stream_capturing():
                torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
            return model(**inputs).loss

        bench.loss_of = loss_of
        compare(bench.steps(5), new_bench(model, documents(200, longest=60), per_step=40, capture=False).steps(5),
                tolerance=2e-2)  # fmt: skip
    reasons = [bucket.reason for bucket in bench.report.buckets.values() if bucket.reason]
    assert reasons
    assert all("OutOfMemoryError" in reason for reason in reasons)


def test_a_bucket_that_does_not_fit_is_cut_in_two(tiny, documents, new_bench):
    model = tiny(lora=True, dtype=torch.bfloat16, device="cuda").train()
    with packed_attention(model):
        bench = new_bench(model, documents(400, longest=200), budget=4096, per_step=40)

        def loss_of(inputs):
            loss = model(**inputs).loss
            if inputs["input_ids"].shape[1] > 2048:
                loss = loss * Fails.apply(loss)
            return loss

        bench.loss_of = loss_of
        ours = bench.steps(5)
        bench.loss_of = lambda inputs: model(**inputs).loss
        theirs = new_bench(model, documents(400, longest=200), budget=2048, per_step=40, capture=False).steps(5)
        compare(ours, theirs, tolerance=2e-2)
    assert any(bucket.way is Way.SPLIT for bucket in bench.report.buckets.values())


class Fails(torch.autograd.Function):
    """Runs out of memory in the backward, after other gradients have been written."""

    @staticmethod
    def forward(ctx, x):
        return torch.ones_like(x)

    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError("CUDA out of memory, says the test. And more")


def test_documents_of_a_graph_are_alone_and_as_they_are_unpacked(tiny, documents, new_bench):
    """bf16: each document's loss as alone, to 1e-3; another document's token changes not one bit of it."""
    model = tiny(dtype=torch.bfloat16, device="cuda").eval()
    bench = new_bench(model, documents(60, longest=90), per_step=30)
    micro = bench.feeder.step(0, 0).micro[0]
    bench.feeder.close()
    flat = micro.flat.cuda()
    inputs = model_inputs(flat, micro.shape)
    losses = torch.zeros(micro.shape.tokens, device="cuda")

    def work():
        losses.copy_(nll(model, inputs))

    rows, pool = bench.feeder.rows, GraphPool(torch.device("cuda", 0))
    with packed_attention(model), torch.no_grad():
        with pool.beside():
            work()
        graph, why_not = pool.record(work)
        assert graph is not None, why_not
        graph.replay()
        packed = losses.clone()
        lengths = rows.lengths[micro.bucket.documents]
        ends = np.cumsum(lengths)
        victim = int(np.argmax(lengths))
        at = int(ends[victim] - lengths[victim] // 2)
        flat[at] = 3 + (int(flat[at]) - 3 + 1) % 94
        graph.replay()
        for slot, (end, length) in enumerate(zip(ends, lengths, strict=True)):
            place = slice(int(end - length), int(end))
            assert torch.equal(losses[place], packed[place]) == (slot != victim), slot
            start = rows.starts[micro.bucket.documents[slot]]
            own = slice(start, start + length)
            alone = nll(model, {
                "input_ids": torch.tensor(rows.input_ids[own].astype(np.int64), device="cuda")[None],
                "shift_labels": torch.tensor(rows.targets[own].astype(np.int64), device="cuda")[None],
            })  # fmt: skip
            assert float(packed[place].mean()) == pytest.approx(float(alone.mean()), rel=1e-3)


def nll(model, inputs):
    """(tokens,) loss of every target."""
    targets = inputs["shift_labels"][0]
    given = {k: v for k, v in inputs.items() if k not in ("labels", "shift_labels", "num_items_in_batch", "max_valid")}
    logits = model(**given).logits[0].float()
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="none")


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_trainer_with_graphs_learns_like_the_plain_one(tiny, documents, train, lora):
    data = documents(400, longest=200)
    options = {"max_steps": 12, "bf16": True, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    fast = train(tiny(lora=lora, device="cuda"), data, fast=FastOptions(budget=2048), **options)
    plain = train(tiny(lora=lora, device="cuda"), data, **options)
    ours = [row["loss"] for row in fast.state.log_history if "loss" in row]
    theirs = [row["loss"] for row in plain.state.log_history if "loss" in row]
    assert ours == pytest.approx(theirs, rel=5e-3)
    assert fast.report.as_dict()["buckets"]
    assert any(bucket.way is Way.CAPTURED for bucket in fast.report.buckets.values()), fast.report.lines()


def test_dropout_works_in_a_graph(tiny, documents, train):
    data = documents(400, longest=200)
    options = {"max_steps": 8, "bf16": True, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1}
    trainer = train(tiny(lora=True, dropout=0.1, device="cuda"), data, fast=FastOptions(budget=2048), **options)
    assert any(bucket.way is Way.CAPTURED for bucket in trainer.report.buckets.values()), trainer.report.lines()
    assert all(np.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row)


def test_recomputed_layers_can_be_captured(tiny, documents, train):
    options = {"max_steps": 8, "bf16": True, "gradient_checkpointing": True,
               "gradient_checkpointing_kwargs": {"use_reentrant": False, "preserve_rng_state": False}}  # fmt: skip
    trainer = train(tiny(lora=True, device="cuda"), documents(400, longest=200), fast=FastOptions(), **options)
    assert any(bucket.way is Way.CAPTURED for bucket in trainer.report.buckets.values()), trainer.report.lines()
