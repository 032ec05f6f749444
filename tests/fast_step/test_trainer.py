"""The trainer with the fast step is the trainer without it: same losses, same resuming, same callbacks (CPU)."""

from __future__ import annotations

import json

import pytest
import torch
from dropforge.errors import TrainingError
from dropforge.fast_step.trainer import FastOptions
from dropforge.packing.collate import model_inputs
from transformers import TrainerCallback

FAST = FastOptions(budget=1024)


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def norms(trainer):
    return [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_same_loss_curve_as_the_plain_trainer(tiny, documents, train, lora):
    """Two epochs and a bit: the order of the second epoch is TRL's too."""
    options = {"max_steps": 15, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    plain = train(tiny(lora=lora), documents(), **options)
    fast = train(tiny(lora=lora), documents(), fast=FAST, **options)
    assert fast.fast is not None, fast.report.notes
    assert losses(fast) == pytest.approx(losses(plain), rel=2e-5)
    assert norms(fast) == pytest.approx(norms(plain), rel=2e-4)
    rows = [(row["step"], row["learning_rate"]) for row in plain.state.log_history if "loss" in row]
    assert rows == [(row["step"], row["learning_rate"]) for row in fast.state.log_history if "loss" in row]


@pytest.mark.parametrize(("micro", "accumulated", "budget"), [(8, 1, 1024), (4, 2, 256), (2, 4, 128)])
def test_any_split_into_micro_batches_trains_alike(tiny, documents, train, micro, accumulated, budget):
    whole = train(tiny(lora=True), documents(longest=40), fast=FastOptions(budget=2048), max_steps=4)
    options = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulated}
    other = train(tiny(lora=True), documents(longest=40), fast=FastOptions(packing=False), max_steps=4, **options)
    assert losses(other) == pytest.approx(losses(whole), rel=2e-5)
    assert norms(other) == pytest.approx(norms(whole), rel=2e-4)
    assert sum(bucket.runs for bucket in other.report.buckets.values()) == 4 * accumulated


def test_logging_steps_average_and_total_as_the_plain_trainer(tiny, documents, train):
    options = {"max_steps": 7, "logging_steps": 3}
    plain, fast = train(tiny(), documents(), **options), train(tiny(), documents(), fast=FAST, **options)
    assert [row["step"] for row in fast.state.log_history] == [row["step"] for row in plain.state.log_history]
    assert losses(fast) == pytest.approx(losses(plain), rel=2e-5)
    ends = [trainer.state.log_history[-1]["train_loss"] for trainer in (fast, plain)]
    assert ends[0] == pytest.approx(ends[1], rel=2e-5)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
@pytest.mark.parametrize("packing", ["auto", True])
def test_resume_continues_the_exact_order(tiny, documents, train, tmp_path, packing, optim):
    """Interrupted in the second epoch; weights equal to the last bit."""
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 4, "optim": optim,
               "lr_scheduler_type": "cosine"}  # fmt: skip
    fast = FastOptions(packing=packing, budget=1024, rows_per_step=1 if packing is True else None)
    whole = train(tiny(lora=True), documents(count=40), fast=fast, **options)
    resumed = train(
        tiny(lora=True), documents(count=40), fast=fast, resume=str(tmp_path / "out/checkpoint-8"), **options
    )
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())
    assert losses(resumed) == losses(whole)


def test_a_checkpoint_of_another_order_is_refused(tiny, documents, train, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train(tiny(lora=True), documents(), fast=FAST, **options)
    folder = tmp_path / "out/checkpoint-2"
    assert json.loads((folder / "packing_order.json").read_text())["seed"] == 7
    with pytest.raises(TrainingError, match="another order") as caught:
        train(tiny(lora=True), documents(), fast=FAST, resume=str(folder), **{**options, "data_seed": 8})
    assert caught.value.code == "train-order"
    with pytest.raises(TrainingError, match="another order"):
        train(tiny(lora=True), documents(seed=1), fast=FAST, resume=str(folder), **options)


def test_callbacks_evaluation_and_stopping(tiny, documents, train):
    seen = []

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(("step", state.global_step))
            control.should_training_stop = state.global_step == 5

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                seen.append(("log", state.global_step))

        def on_evaluate(self, args, state, control, **kwargs):
            seen.append(("evaluate", state.global_step))

    model = tiny(lora=True)
    trainer = train(model, documents(), fast=FAST, eval_dataset=documents(count=6, seed=3), callbacks=[Stop()],
                    max_steps=10, eval_strategy="steps", eval_steps=2)  # fmt: skip
    assert [entry for entry in seen if entry[0] == "step"] == [("step", n) for n in range(1, 6)]
    assert [entry for entry in seen if entry[0] == "log"] == [("log", n) for n in range(1, 6)]
    assert [entry for entry in seen if entry[0] == "evaluate"] == [("evaluate", 2), ("evaluate", 4)]
    # nothing of it stays on the model
    assert "zero_grad" not in model.__dict__
    assert model.config._attn_implementation == "sdpa"
    assert trainer.report.tokens_per_second > 0
    assert 0 < trainer.report.filled <= 1
    assert trainer.report.host_ms_per_micro_batch > 0


def test_evaluation_in_between_gives_the_plain_trainers_loss(tiny, documents, train):
    options = {"eval_dataset": documents(count=6, seed=3), "eval_strategy": "steps", "eval_steps": 3, "max_steps": 6}
    plain, fast = train(tiny(), documents(), **options), train(tiny(), documents(), fast=FAST, **options)
    ours, theirs = ([row["eval_loss"] for row in t.state.log_history if "eval_loss" in row] for t in (fast, plain))
    assert len(ours) == 2
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "config", "reason"),
    [
        ({"neftune_noise_alpha": 5.0}, {}, "NEFTune"),
        ({"label_smoothing_factor": 0.1, "loss_type": "nll"}, {}, "label smoothing"),
        ({"train_sampling_strategy": "sequential"}, {}, "sampling"),
        ({}, {"attention_dropout": 0.1}, "attention dropout"),
    ],
    ids=["neftune", "smoothing", "sampling", "dropout"],
)
def test_what_cannot_be_packed_trains_plainly_and_says_why(tiny, documents, train, arguments, config, reason):
    options = {"max_steps": 2, **arguments}
    with pytest.warns(FutureWarning) if "label_smoothing_factor" in arguments else _nothing():
        trainer = train(tiny(**config), documents(), fast=FAST, **options)
    assert trainer.fast is None
    assert reason in trainer.report.notes[0]


def test_a_model_whose_documents_see_each_other_is_not_packed(tiny, documents, train, monkeypatch):
    from dropforge.fast_step import isolation

    def without_ends(flat, shape):
        return {name: value for name, value in model_inputs(flat, shape).items() if not name.startswith("cu_")}

    monkeypatch.setattr(isolation, "model_inputs", without_ends)  # attention is then causal over the whole row
    trainer = train(tiny(), documents(), fast=FAST, max_steps=2)
    assert trainer.fast is None
    assert "changes the loss of its neighbour" in trainer.report.notes[0]


def test_other_optimizers_run_over_flat_gradients(tiny, documents, train):
    options = {"optim": "sgd", "max_steps": 6, "max_grad_norm": 0.5}
    plain, fast = train(tiny(), documents(), **options), train(tiny(), documents(), fast=FAST, **options)
    assert "own" in fast.report.optimizer
    assert losses(fast) == pytest.approx(losses(plain), rel=2e-5)
    assert norms(fast) == pytest.approx(norms(plain), rel=2e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's compiler looks at every input
def test_layers_compiled_for_want_of_graphs_train_alike(tiny, documents, train, monkeypatch):
    from dropforge.fast_step import compiled

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", backend)
    model = tiny(lora=True)
    options = {"max_steps": 8, "logging_steps": 1}
    fast = train(model, documents(), fast=FastOptions(budget=1024, compile=True), **options)
    plain = train(tiny(lora=True), documents(), **options)
    assert graphs
    ways = {str(bucket.way): bucket.reason for bucket in fast.report.buckets.values()}
    assert ways["compiled"] == "CUDA graphs need a GPU"
    assert losses(fast) == pytest.approx(losses(plain), rel=2e-5)
    # nothing of it stays on the model
    assert all(module._compiled_call_impl is None for module in model.modules())
    assert not any(bucket.way == "compiled" for bucket in train(
        tiny(lora=True), documents(), fast=FAST, **options).report.buckets.values())  # fmt: skip


def _nothing():
    from contextlib import nullcontext

    return nullcontext()
