"""Packed and unpacked rows learn the same tokens: what the trainer packs has the labels the data pipeline made."""

from __future__ import annotations

import random

import numpy as np
from dropforge.packing.collate import collate
from dropforge.packing.plan import PackingMode, PackingPlan
from dropforge.packing.rows import token_rows
from dropforge.packing.shapes import buckets_for


def conversations(count):
    generator = random.Random(3)
    words = ["river", "sea", "calm", "stone", "light", "north", "水", "😀", "metal,", "glass.", "paper\n"]

    def text():
        return " ".join(generator.choices(words, k=generator.randrange(1, 30)))

    for _ in range(count):
        turns = []
        for _ in range(generator.randrange(1, 4)):
            turns += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        yield {"messages": turns}


def test_packed_and_unpacked_masks_agree(bench):
    train = bench.prepare(bench.jsonl("a.jsonl", list(conversations(60)))).train
    rows = token_rows(train)
    buckets = buckets_for(rows.lengths, budget=2048)
    plan = PackingPlan(
        lengths=rows.lengths, counted=rows.counted, mode=PackingMode.ROWS, per_step=1, buckets=buckets, seed=1
    )
    seen = []
    for step in plan.epoch(0):
        for bucket in step:
            flat = collate(rows, bucket, pad=0, pin=False, items=1).flat.numpy()
            total = bucket.shape.tokens
            ids, targets = flat[:total], flat[2 * total : 3 * total]
            at = 0
            for document in bucket.documents:
                own = train[int(document)]
                end = at + len(own["input_ids"])
                assert ids[at:end].tolist() == own["input_ids"]
                # A position predicts the token after it; the last one of a document predicts nothing of the next.
                assert targets[at:end].tolist() == [*own["labels"][1:], -100]
                at = end
                seen.append(int(document))
            assert (targets[at:] == -100).all()
    assert sorted(seen) == list(range(60))
    assert int(rows.counted.sum()) == sum(np.count_nonzero(np.asarray(row["labels"][1:]) != -100) for row in train)
