"""A job that was stopped anywhere ends with the bytes of the uninterrupted one (CPU, same seed)."""

from __future__ import annotations

import pytest
from dropforge.checkpoints import CheckpointStore
from dropforge.errors import JobStopped, Reason
from dropforge.events import RunLog
from dropforge.states import State
from dropforge.stop import StopSignal

CASES = {
    "lora adamw_8bit": {},
    "lora with dropout, adamw_torch": {
        "extra": "adapter: {lora_dropout: 0.1}",
        "train": "max_steps: 8, optim: adamw_torch",
    },
    "qlora": {"model": "{id: 'builtin:tiny-llama', quantization: nf4}"},
    "cosine, two epochs, noise": {"train": "num_train_epochs: 2, lr_scheduler_type: cosine, neftune_noise_alpha: 5"},
}


class StopAt(RunLog):
    """Asks the job to stop when it reports a step."""

    def __init__(self, run, stop: StopSignal, step: int) -> None:
        super().__init__(run)
        self.stop, self.step = stop, step

    def metrics(self, **values) -> None:
        super().metrics(**values)
        if values.get("step") == self.step:
            self.stop.request(Reason.SHUTDOWN)


@pytest.mark.parametrize("case", CASES, ids=CASES)
def test_stopped_and_resumed_equals_uninterrupted(bench, make_spec, case):
    options = {"train": "max_steps: 8", **CASES[case]}
    whole = bench.run_folder(make_spec(name="whole", **options))
    assert bench.go(whole) is State.SUCCEEDED

    broken = bench.run_folder(make_spec(name="broken", **options))
    for step in (3, 5):
        stop = StopSignal()
        with pytest.raises(JobStopped) as caught:
            bench.go(broken, stop=stop, log=StopAt(broken, stop, step))
        assert caught.value.reason is Reason.SHUTDOWN
    assert bench.go(broken) is State.SUCCEEDED
    assert [event["step"] for event in bench.events(broken, "resume")] == [4, 6]
    assert bench.adapter_hash(broken) == bench.adapter_hash(whole)


def test_a_damaged_newest_checkpoint_is_passed_over(bench, make_spec):
    whole = bench.run_folder(make_spec(name="whole", train="max_steps: 6"))
    bench.go(whole)
    broken = bench.run_folder(make_spec(name="broken", train="max_steps: 6, save_steps: 2"))
    stop = StopSignal()
    with pytest.raises(JobStopped):
        bench.go(broken, stop=stop, log=StopAt(broken, stop, 4))
    newest = CheckpointStore(broken.checkpoints).all()[-1]
    (newest.path / "optimizer.pt").write_bytes(b"torn")
    assert bench.go(broken) is State.SUCCEEDED
    assert bench.events(broken, "checkpoint_skipped")
    assert bench.adapter_hash(broken) == bench.adapter_hash(whole)


def test_save_steps_keeps_two_whole_checkpoints(bench, make_spec):
    run = bench.run_folder(make_spec(train="max_steps: 6, save_steps: 2"))
    bench.go(run)
    kept = CheckpointStore(run.checkpoints).all()
    assert [checkpoint.step for checkpoint in kept] == [4, 6]
    assert [checkpoint.verify() for checkpoint in kept] == ["", ""]
