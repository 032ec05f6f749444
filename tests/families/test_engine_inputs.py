"""Bad input to a model with the engine in it: an error that names the argument, or the model's own path."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def opened(tiny):
    """(model, session) with the engine in."""
    from dropforge_kernels.patch.session import open_session
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    session = open_session(model)
    assert session.engine is not None
    yield model, session
    session.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("labels", torch.ones(2, 12, dtype=torch.int64)),
        ("labels", torch.ones(1, 13, dtype=torch.int64)),
        ("attention_mask", torch.ones(1, 13, dtype=torch.int64)),
        ("attention_mask", torch.ones(2, 12, dtype=torch.int64)),
        ("position_ids", torch.arange(12)[None]),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, value, opened, batch):
    with pytest.raises(ValueError, match=rf"{name} must have the shape of input_ids, \(2, 13\); received"):
        opened[0](**{**batch, name: value})


def test_a_batch_of_padding_alone_is_the_models_own(opened, batch):
    model, session = opened
    padding = {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}
    got = model(**padding).loss
    assert session.report.declined == {"the batch has no token": 1}
    session.close()
    torch.testing.assert_close(got, model(**padding).loss)


def test_documents_without_positions_are_counted_on(opened, batch):
    """As transformers does: positions run on over the row when none are given."""
    model, _ = opened
    ids = batch["input_ids"][:1]
    edges = torch.tensor([0, 13], dtype=torch.int32)
    got = model(input_ids=ids, labels=ids, cu_seq_lens_q=edges, cu_seq_lens_k=edges).loss
    torch.testing.assert_close(got, model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"policies": ["keepp", "keep"]}, r"policies must be of keep, keep_attention.*received 'keepp'"),
        ({"policies": ["keep"]}, "policies must have 2 entries"),
        ({"policies": ["offload", "keep"]}, "need a store"),
        ({"policies": ["recompute", "keep"], "mlp_tile": 0}, "mlp_tile must be at least one row"),
    ],
)
def test_policies_are_checked(arguments, words, opened):
    engine = opened[1].engine
    with pytest.raises(ValueError, match=words):
        engine.set_policies(**arguments)
    assert not engine.planned
    engine.set_policies(["recompute", "keep"])
    assert engine.planned


def test_rows_longer_than_the_model_knows_are_said_once(opened, caplog):
    model, session = opened
    ids = torch.randint(3, 90, (1, 70))
    for _ in range(2):
        assert torch.isfinite(model(input_ids=ids, labels=ids).loss)
    words = "rows of 70 tokens, but this model knows 64 positions"
    assert caplog.text.count(words) == 1 and not session.report.declined
    model(input_ids=ids[:, :64], labels=ids[:, :64])
    assert caplog.text.count("positions") == 1
