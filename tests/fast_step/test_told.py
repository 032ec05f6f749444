"""A long job says in its events which buckets are captured while it trains, not only at its end."""

from __future__ import annotations

from types import SimpleNamespace

from dropforge.fast_step.report import FastReport, Way
from dropforge.packing.shapes import BucketShape
from dropforge.training_callbacks import JobCallback

SHAPE = BucketShape(tokens=8192, documents=80, longest=512, counted=4096)


def test_every_line_of_the_report_is_told_once_and_early():
    told = []
    log = SimpleNamespace(
        event=lambda action, **fields: told.append((action, fields["text"])),
        metrics=lambda **fields: None, progress=lambda **fields: None,
    )  # fmt: skip
    callback = JobCallback(log=log, stop=None, train=None, trained_tokens=100, clock=lambda: 1.0)
    callback.speed = FastReport(packing="documents: short ones")
    state = SimpleNamespace(global_step=2, max_steps=10, epoch=0.1)
    callback.on_log(None, state, None, logs={"loss": 1.0, "grad_norm": 1.0})
    assert told == [("engine", "packing: documents: short ones")]
    callback.speed.bucket(SHAPE).way = Way.CAPTURED
    for _ in range(2):
        callback.on_log(None, state, None, logs={"loss": 1.0, "grad_norm": 1.0})
    assert len(told) == 2
    assert "captured as CUDA graphs: 1 buckets of [8192] tokens" in told[1][1]
    callback.speed.bucket(SHAPE).way = Way.EAGER
    callback.speed.bucket(SHAPE).reason = "capture failed"
    callback.tell_engine()
    assert told[2:] == [("engine", "bucket of 8192 tokens eager: capture failed")]


def test_without_the_fast_step_nothing_is_told():
    callback = JobCallback(log=None, stop=None, train=None, trained_tokens=1)
    callback.tell_engine()
