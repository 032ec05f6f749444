"""A checkpoint is whole or it is not one."""

from __future__ import annotations

import pytest
from dropforge.checkpoints import MANIFEST, CheckpointStore


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    store.clean()
    return store


def save(store: CheckpointStore, step: int, *, text: str = "weights"):
    written = store.partial / f"checkpoint-{step}"
    (written / "sub").mkdir(parents=True)
    (written / "model.bin").write_text(f"{text} {step}")
    (written / "sub" / "rng").write_text("state")
    return store.commit(written, step)


def test_the_newest_whole_checkpoint_wins(store):
    for step in (5, 10, 15):
        save(store, step)
    newest, skipped = store.newest_good()
    assert newest.step == 15
    assert skipped == []
    assert newest.verify() == ""


def test_only_two_are_kept(store):
    for step in (5, 10, 15):
        save(store, step)
    assert [c.step for c in store.all()] == [10, 15]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "no manifest", "link", "torn manifest"])
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(store, damage, tmp_path):
    save(store, 5)
    bad = save(store, 10).path
    weights = bad / "model.bin"
    if damage == "truncate":
        weights.write_text("w")
    elif damage == "flip":
        weights.write_text("weightz 10")
    elif damage == "remove":
        weights.unlink()
    elif damage == "no manifest":
        (bad / MANIFEST).unlink()
    elif damage == "torn manifest":
        (bad / MANIFEST).write_text('{"step": 10, "fil')
    else:
        weights.rename(tmp_path / "elsewhere")
        weights.symlink_to(tmp_path / "elsewhere")
    newest, skipped = store.newest_good()
    assert newest.step == 5
    assert len(skipped) == 1 and skipped[0].startswith("step-00000010: ")


def test_what_an_interrupted_save_left_is_never_a_checkpoint(store):
    save(store, 5)
    half = store.partial / "checkpoint-10"
    half.mkdir()
    (half / "model.bin").write_text("half")
    assert store.newest_good()[0].step == 5
    store.clean()
    assert list(store.partial.iterdir()) == []


def test_saving_the_same_step_again_replaces_it(store):
    save(store, 5, text="old")
    again = save(store, 5, text="new")
    assert (again.path / "model.bin").read_text() == "new 5"
    assert again.verify() == ""


def test_no_checkpoint_at_all(tmp_path):
    assert CheckpointStore(tmp_path / "nothing").newest_good() == (None, [])
