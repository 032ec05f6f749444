"""Whole trainings on CUDA graphs: splits, optimizer, evaluation, checkpoints, resuming, little memory (GPU)."""

from __future__ import annotations

import pytest
import torch
from dropforge.fast_step.compiled import LayerCompiler
from dropforge.fast_step.graph import GraphPool
from dropforge.fast_step.optimizer import FlatAdamW
from dropforge.fast_step.report import Way
from dropforge.fast_step.trainer import FastOptions
from dropforge_kernels.patch.attention_interface import packed_attention
from dropforge_kernels.patch.session import open_session

pytestmark = pytest.mark.gpu

OPTIONS = {"max_steps": 12, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "optim": "adamw_torch"}


def losses(trainer, name="loss"):
    return [row[name] for row in trainer.state.log_history if name in row]


def captured(report):
    return [bucket for bucket in report.buckets.values() if bucket.way is Way.CAPTURED]


def distance(one, other):
    return float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(other))


def test_gradient_of_a_step_is_equal_for_one_two_and_four_graphs(tiny, documents, new_bench):
    """The same 36 documents in buckets of different sizes, each replayed."""
    data = documents(36, longest=200)
    found = []
    for budget in (4096, 2048, 1024):
        model = tiny(lora=True, dtype=torch.bfloat16, device="cuda").train()
        with packed_attention(model):
            bench = new_bench(model, data, budget=budget, per_step=36)
            batch = bench.feeder.step(0, 0)
            for _ in range(3):  # eager, captured, replayed
                bench.flat.zero_grad()
                bench.step.begin()
                for micro in batch.micro:
                    bench.step.run(micro)
            torch.cuda.synchronize()
            bench.feeder.close()
        assert captured(bench.report), bench.report.lines()
        found.append((len(batch.micro), float(bench.step.loss), next(iter(bench.flat.grads.values())).float()))
    assert [micro for micro, _, _ in found] == [1, 2, 4]
    for _, loss, grad in found[1:]:
        assert loss == pytest.approx(found[0][1], rel=2e-3)
        assert distance(grad, found[0][2]) < 2e-2


def test_a_captured_optimizer_follows_the_schedule_as_the_plain_one():
    torch.manual_seed(0)
    values = torch.randn(5, 3000, device="cuda")
    grads = torch.randn(6, 5, 3000, device="cuda")
    results = []
    for capture in (False, True):
        parameters = [torch.nn.Parameter(value.clone()) for value in values]
        optimizer = FlatAdamW(parameters, lr=1e-2, weight_decay=0.1, max_grad_norm=1.0)
        if capture:
            optimizer.capture_with(GraphPool(torch.device("cuda", 0)).record)
        norms = []
        for step, grad in enumerate(grads):
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            for parameter, row in zip(parameters, grad, strict=True):
                parameter.grad.add_(row)
            optimizer.step()
            norms.append(float(optimizer.last_norm))
            optimizer.zero_grad()
        results.append((torch.stack([p.detach() for p in parameters]), norms))
    assert optimizer._graph is not None, optimizer.why_not_captured
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert results[1][1][0] == pytest.approx(float(torch.linalg.vector_norm(grads[0])), rel=1e-4)


def test_evaluation_and_checkpoints_between_replays_change_nothing(tiny, documents, train):
    data = documents(400, longest=200)
    plain = train(tiny(lora=True, dtype=torch.bfloat16, device="cuda"), data, fast=FastOptions(budget=2048), **OPTIONS)
    busy = train(
        tiny(lora=True, dtype=torch.bfloat16, device="cuda"), data, fast=FastOptions(budget=2048),
        eval_dataset=documents(40, seed=3), eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=4,
        **OPTIONS,
    )  # fmt: skip
    assert captured(busy.report), busy.report.lines()
    assert losses(busy) == pytest.approx(losses(plain), rel=1e-3)
    assert len(losses(busy, "eval_loss")) == 4
    assert all(value == pytest.approx(losses(busy, "eval_loss")[0], rel=0.2) for value in losses(busy, "eval_loss"))


def test_a_captured_training_is_resumed(tiny, documents, train, tmp_path):
    data = documents(400, longest=200)
    options = {**OPTIONS, "save_strategy": "steps", "save_steps": 6, "lr_scheduler_type": "cosine"}
    fast = FastOptions(budget=2048)
    whole = train(tiny(lora=True, dtype=torch.bfloat16, device="cuda"), data, fast=fast, **options)
    folder = str(tmp_path / "out/checkpoint-6")
    resumed = train(tiny(lora=True, dtype=torch.bfloat16, device="cuda"), data, fast=fast, resume=folder, **options)
    assert captured(resumed.report), resumed.report.lines()
    assert losses(resumed)[:6] == losses(whole)[:6]
    assert losses(resumed)[6:] == pytest.approx(losses(whole)[6:], rel=1e-3)
    ours, theirs = (torch.cat([p.detach().flatten() for p in t.model.parameters() if p.requires_grad])
                    for t in (resumed, whole))  # fmt: skip
    assert distance(ours, theirs) < 1e-2


def test_the_loss_is_read_back_late_and_under_its_own_step(tiny, documents, train):
    trainer = train(tiny(lora=True, dtype=torch.bfloat16, device="cuda"), documents(400, longest=200),
                    fast=FastOptions(budget=2048), **OPTIONS)  # fmt: skip
    rows = [row["step"] for row in trainer.state.log_history if "loss" in row]
    assert rows == list(range(1, 13))
    assert trainer.report.steady_tokens_per_second > 0
    assert trainer.report.host_ms_per_micro_batch > 0
    assert trainer.report.first_step_seconds > 0


WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 8, "head_dim": 64}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_hand_written_layers_in_graphs_learn_like_the_plain_trainer(tiny, documents, train, family):
    """A graph that kept the adapters' first values would stop learning."""
    data = documents(400, longest=200)
    options = {**OPTIONS, "max_steps": 20}
    model = tiny(family, lora=True, dtype=torch.bfloat16, device="cuda", **WIDE)
    session = open_session(model)
    assert session.engine is not None, session.report.lines()
    fast = train(model, data, fast=FastOptions(budget=2048), kernels=session, **options)
    assert captured(fast.report), fast.report.lines()
    assert session.engine.declined == {}
    assert fast.report.planned_memory > 0
    assert fast.report.planned_graphs > 0
    session.close()
    plain = train(tiny(family, lora=True, dtype=torch.bfloat16, device="cuda", **WIDE), data, **options)
    assert losses(plain)[-1] < 0.99 * losses(plain)[0]
    assert losses(fast) == pytest.approx(losses(plain), rel=1e-2)


def test_with_little_memory_graphs_make_room_for_new_shapes(tiny, documents, new_bench):
    """There is room for one bucket and a half: the first run of a larger shape beside the graph does not fit."""
    data = documents(900, longest=200)

    def run(limit):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        model = tiny(lora=True, dtype=torch.bfloat16, device="cuda", **WIDE).train()
        with packed_attention(model):
            bench = new_bench(model, data, budget=8192, per_step=60)
            total = torch.cuda.get_device_properties(0).total_memory
            held = torch.cuda.memory_allocated()
            if limit is not None:
                torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + limit) / total)
            try:
                found = bench.steps(9)
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
            return bench, found, torch.cuda.max_memory_allocated() - held

    _, theirs, peak = run(None)
    bench, ours, _ = run(int(1.5 * peak) + (64 << 20))
    assert any("given up" in note for note in bench.report.notes), (bench.report.notes, peak)
    assert captured(bench.report), bench.report.lines()
    for (loss, grad), (other, expected) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(other, rel=2e-3)
        assert distance(grad.float(), expected.float()) < 2e-2


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it meets
def test_layers_are_compiled_where_graphs_cannot_be_had(tiny, documents, new_bench):
    data = documents(400, longest=200)
    results = []
    for compiled in (True, False):
        model = tiny(lora=True, dtype=torch.bfloat16, device="cuda").train()
        layers = LayerCompiler(model) if compiled else None
        with packed_attention(model):
            bench = new_bench(model, data, budget=2048, capture=False, layers=layers)
            results.append(bench.steps(6))
            if layers is not None:
                report = bench.report
    ways = {bucket.way for bucket in report.buckets.values()}
    assert Way.COMPILED in ways, report.lines()
    for (loss, grad), (other, expected) in zip(*results, strict=True):
        assert loss == pytest.approx(other, rel=5e-3)
        assert distance(grad.float(), expected.float()) < 5e-2
