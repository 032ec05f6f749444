"""A user's session: drop, watch, chat, export more, cancel, retry; a power cut in the middle; a clean stop."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path


def adapter_hash(appliance, job_id: str) -> str:
    (path,) = appliance.root.glob(f"results/*/{job_id}/adapter/adapter_model.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_from_a_dropped_job_to_a_chat_answer(appliance, make_job):
    job_id = appliance.drop(make_job(name="doubles", train="num_train_epochs: 40", export="'gguf:q8_0', ollama"))
    appliance.wait_state(job_id, "succeeded", "failed", "partial")
    shown = appliance.json("status", job_id)
    assert shown["state"] == "succeeded", shown
    result = appliance.root / shown["result"]
    check = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=result, capture_output=True, text=True
    )
    assert check.returncode == 0, check.stdout
    answers = appliance.json(
        "chat", "doubles", "--prompt", "What is the double of 7?", "--prompt", "What is the double of 3?"
    )
    assert [entry["answer"].strip() for entry in answers] == ["14", "6"]
    assert "training" in appliance.run("logs", "doubles").stdout


def test_more_exports_of_a_finished_job_are_verified_and_summed(appliance):
    reports = appliance.json("export", "doubles", "gguf:q4_k_m", "merged")
    assert [(report["kind"], report["ok"]) for report in reports] == [("gguf:q4_k_m", True), ("merged", True)]
    result = appliance.root / appliance.json("status", "doubles")["result"]
    sums = (result / "SHA256SUMS").read_text()
    assert "Q4_K_M.gguf" in sums and "Q8_0.gguf" in sums and "merged/model.safetensors" in sums


def test_a_warm_daemon_starts_training_within_five_seconds_of_the_drop(appliance, make_job):
    warm = appliance.root / "state" / "warm-runner.log"
    appliance.wait(warm.exists, "the warm runner")
    time.sleep(8)  # it imports while nothing else runs
    started = time.monotonic()
    job_id = appliance.drop(make_job(name="quick", train="max_steps: 2"))
    appliance.wait_state(job_id, "training", "exporting", "succeeded")
    seconds = time.monotonic() - started
    appliance.wait_state(job_id, "succeeded")
    assert seconds < 5, f"{seconds:.1f} s from submit to training"


def test_cancel_and_retry(appliance, make_job):
    job_id = appliance.drop(make_job(name="long", train="max_steps: 100000"))
    appliance.wait(lambda: appliance.status(job_id).get("step", 0) >= 3, "three steps")
    appliance.run("cancel", "long")
    assert appliance.wait_state(job_id, "cancelled")["reason"] == "user"
    stopped_at = appliance.status(job_id)["step"]
    appliance.run("retry", job_id)
    appliance.wait(lambda: appliance.status(job_id).get("step", 0) > stopped_at, "it to go on from its checkpoint")
    assert '"resume"' in (appliance.root / "runs" / job_id / "events.jsonl").read_text()
    appliance.run("cancel", job_id)
    appliance.wait_state(job_id, "cancelled")


def test_a_bad_spec_by_hand_is_kept_with_its_explanation_and_the_daemon_goes_on(appliance, make_job):
    dropped = appliance.root / "inbox" / "typo.yaml"
    dropped.write_text(make_job(name="typo", train="max_stepz: 2"))
    rejected = appliance.root / "rejected"
    appliance.wait(lambda: any(rejected.glob("*/typo.yaml")), "the rejection")
    (folder,) = {path.parent for path in rejected.glob("*/typo.yaml")}
    text = (folder / "ERROR.txt").read_text()
    assert "max_stepz" in text and "'max_steps'" in text and "line 6" in text
    assert not dropped.exists()
    assert appliance.daemon.poll() is None


def test_a_failing_job_says_why_and_the_next_one_runs(appliance, make_job):
    (appliance.root / "datasets" / "empty.jsonl").write_text("")
    bad = appliance.drop(make_job(name="bad", train="max_steps: 1").replace("doubles.jsonl", "empty.jsonl"))
    good = appliance.drop(make_job(name="good", train="max_steps: 1, seed: 7"))
    assert appliance.wait_state(bad, "failed")["reason"] == "bad_data"
    text = (appliance.root / "runs" / bad / "ERROR.txt").read_text()
    assert "empty.jsonl" in text and "data-" in text
    appliance.wait_state(good, "succeeded")


def test_power_cut_in_the_middle_of_training_ends_with_the_same_bytes(appliance, make_job):
    train = "max_steps: 60, save_steps: 5"
    whole = appliance.drop(make_job(name="whole", train=train))
    appliance.wait_state(whole, "succeeded")

    cut = appliance.drop(make_job(name="cut", train=train))
    appliance.wait(lambda: appliance.status(cut).get("step", 0) >= 20, "step 20")
    appliance.kill_everything()
    assert appliance.status(cut)["state"] == "training", "the cut came too late to test anything"
    appliance.start()
    appliance.wait_state(cut, "succeeded")
    assert '"resume"' in (appliance.root / "runs" / cut / "events.jsonl").read_text()
    assert adapter_hash(appliance, cut) == adapter_hash(appliance, whole)


def test_stop_saves_and_the_next_start_goes_on(appliance, make_job):
    job_id = appliance.drop(make_job(name="stopped", train="max_steps: 150"))
    appliance.wait(lambda: appliance.status(job_id).get("step", 0) >= 5, "five steps")
    assert appliance.stop() == 128 + signal.SIGTERM
    status = appliance.status(job_id)
    assert status["state"] in ("interrupted", "queued"), status
    assert status["step"] < 150
    appliance.start()
    appliance.wait_state(job_id, "succeeded")


def test_a_second_daemon_stands_by_and_says_why(appliance):
    second = subprocess.Popen(
        [sys.executable, "-P", "-m", "dropforge", "watch"], env=appliance.environment, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    assert second.stderr is not None
    said = ""
    while "daemon-running" not in said:
        line = second.stderr.readline()
        assert line, f"it ended: {said}"
        said += line
    assert "standing by" in said
    second.terminate()
    assert second.wait(30) == 128 + signal.SIGTERM
    second.stderr.close()


def test_the_foreground_run_hands_over_to_the_daemon(appliance, make_job, tmp_path: Path):
    spec = tmp_path / "fore.yaml"
    spec.write_text(make_job(name="fore", train="max_steps: 1"))
    done = appliance.run("run", str(spec), "--json")
    assert '"state": "succeeded"' in done.stdout
