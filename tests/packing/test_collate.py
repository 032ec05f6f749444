"""What a bucket holds is what its documents say; the thread hands out what was planned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from dropforge.packing.choose import choose_packing
from dropforge.packing.collate import collate_step, model_inputs
from dropforge.packing.feed import Feeder
from dropforge.packing.rows import from_flat, token_rows


def plan_of(data, **options):
    return choose_packing(data, **{"documents_per_step": 16, "per_micro": 4, "budget": 1024, "seed": 2, **options}).plan


def test_a_buckets_contents(rows):
    data = rows(80)
    plan = plan_of(data)
    for buckets in plan.epoch(0):
        step = collate_step(data, buckets, pad=0, pin=False, counted=plan.counted)
        assert step.documents == sum(len(bucket.documents) for bucket in buckets)
        assert step.counted == int(plan.counted[np.concatenate([b.documents for b in buckets])].sum())
        for micro in step.micro:
            check(data, micro, step)


def check(data, micro, step):
    shape, inputs = micro.shape, model_inputs(micro.flat, micro.shape)
    ends = inputs["cu_seq_lens_q"].tolist()
    assert inputs["cu_seq_lens_q"].dtype is torch.int32
    assert (ends[0], ends[-1], len(ends)) == (0, shape.tokens, shape.documents + 1)
    assert ends == sorted(ends)
    assert int(inputs["num_items_in_batch"]) == step.counted
    assert inputs["num_items_in_batch"].shape == ()
    documents = list(micro.bucket.documents)
    for slot, (start, stop) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        assert stop - start <= shape.longest
        assert inputs["position_ids"][0, start:stop].tolist() == list(range(stop - start))
        targets = inputs["shift_labels"][0, start:stop]
        if slot < len(documents):
            a, b = data.starts[documents[slot]], data.starts[documents[slot] + 1]
            assert inputs["input_ids"][0, start:stop].tolist() == data.input_ids[a:b].tolist()
            assert targets.tolist() == data.targets[a:b].tolist()
            assert targets[-1] == -100, "nothing is predicted across a boundary"
        else:
            assert (targets == -100).all()
    assert inputs["labels"] is inputs["shift_labels"]
    assert int((inputs["shift_labels"] != -100).sum()) <= inputs["max_valid"]


def test_rows_of_a_data_set():
    table = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9], [10]], "labels": [[-100, 6, 7], [8, 9], [10]]})
    data = token_rows(table)
    assert data.starts.tolist() == [0, 3, 5, 6]
    assert data.targets.tolist() == [6, 7, -100, 9, -100, -100]
    assert data.counted.tolist() == [2, 1, 0]
    picked = token_rows(table.select([2, 0]))  # a view with its own order
    assert picked.input_ids.tolist() == [10, 5, 6, 7]
    assert token_rows(table.select_columns(["input_ids"])).targets.tolist() == [6, 7, -100, 9, -100, -100]
    assert data.fingerprint() != picked.fingerprint()
    assert data.fingerprint() == token_rows(table).fingerprint()


def test_rows_that_trl_has_packed_are_cut_into_their_documents():
    table = Dataset.from_dict({"input_ids": [[1, 2, 3, 4, 5]], "seq_lengths": [[3, 2]]})
    assert token_rows(table).targets.tolist() == [2, 3, -100, 5, -100]


def test_empty_documents_are_left_out_and_mismatches_refused():
    data = from_flat(np.array([1, 2, 3]), np.array([1, 2, 3]), np.array([2, 0, 1]))
    assert data.lengths.tolist() == [2, 1]
    with pytest.raises(ValueError, match="3 tokens"):
        from_flat(np.array([1, 2, 3]), np.array([1, 2, 3]), np.array([2]))


def test_the_thread_hands_out_the_plan_from_any_step(rows):
    data = rows(60)
    plan = plan_of(data)
    feeder = Feeder(data, plan, pad=0, pin=False)
    expected = [bucket.documents.tolist() for buckets in plan.epoch(1) for bucket in buckets]
    ours = [m.bucket.documents.tolist() for step in range(feeder.steps) for m in feeder.step(1, step).micro]
    assert ours == expected
    onward = feeder.step(2, 0)  # the thread has gone on to the next epoch by itself
    again = feeder.step(1, 2)  # and starts anew anywhere
    assert [m.bucket.documents.tolist() for m in onward.micro] == [b.documents.tolist() for b in plan.epoch(2)[0]]
    assert [m.bucket.documents.tolist() for m in again.micro] == [b.documents.tolist() for b in plan.epoch(1)[2]]
    feeder.close()
    assert feeder._thread is None


def test_what_the_thread_meets_is_raised_where_the_step_is_asked_for(rows):
    data = rows(30)
    feeder = Feeder(data, plan_of(data), pad=0, pin=False)
    object.__setattr__(feeder.plan, "counted", None)
    with pytest.raises(TypeError):
        feeder.step(0, 0)
    feeder.close()


def test_a_micro_batch_is_cut_in_two(rows):
    data = rows(60)
    feeder = Feeder(data, plan_of(data, documents_per_step=30), pad=0, pin=False)
    whole = feeder.step(0, 0).micro[0]
    parts = feeder.split(whole)
    assert [d for part in parts for d in part.bucket.documents] == whole.bucket.documents.tolist()
    assert all(part.flat[-1] == whole.flat[-1] for part in parts)
    assert abs(parts[0].tokens - parts[1].tokens) <= data.lengths.max()
    single = parts[0]
    while len(single.bucket.documents) > 1:
        single = feeder.split(single)[0]
    assert feeder.split(single) == [single]
    feeder.close()
