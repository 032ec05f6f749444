"""The trials' arithmetic on the CPU, and that each of them notices a wrong answer."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from dropforge.doctor import trials


def test_products_are_right_and_a_wrong_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trials.torch_product("cpu") == "torch: products in float32, float16, bfloat16 are right"
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: product(a, b) + (a.dtype is torch.float16))
    with pytest.raises(trials.WrongAnswerError, match="float16"):
        trials.torch_product("cpu")


def test_bitsandbytes_is_right_and_wrong_weights_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import functional

    assert "are right" in trials.bitsandbytes_work("cpu")
    honest, calls = functional.dequantize_4bit, iter((1.0, 0.0))
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *a, **k: honest(*a, **k) + next(calls))
    with pytest.raises(trials.WrongAnswerError, match="4-bit"):
        trials.bitsandbytes_work("cpu")


def test_an_optimizer_that_goes_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", lambda self: None)
    with pytest.raises(trials.WrongAnswerError, match="optimizer"):
        trials.bitsandbytes_work("cpu")


def test_plain_pytorch_does_not_pass_for_a_triton_kernel() -> None:
    """In a process of its own, because other tests switch Triton's interpreter on."""
    code = "from dropforge.doctor.trials import triton_kernel; triton_kernel('cpu')"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0 and "the kernel was not used" in done.stderr


def test_without_a_gpu_the_process_says_why() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    facts = trials.torch_facts()
    assert facts["devices"] == 0 and facts["error"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "triton", "bitsandbytes"])
def test_on_every_gpu(name: str) -> None:
    from dropforge.doctor.trial_process import run_trial

    answer = run_trial(name)
    assert not answer.error
    assert [outcome["device"] for outcome in answer.outcomes] == list(range(torch.cuda.device_count()))
    assert [outcome for outcome in answer.outcomes if not outcome["ok"]] == []


@pytest.mark.gpu
def test_the_whole_pre_flight_on_this_machine() -> None:
    from pathlib import Path

    from dropforge.doctor.examination import Instruments, gpu_findings
    from dropforge.hardware import probe

    found = list(gpu_findings(probe(Path("/tmp")), device="auto", instruments=Instruments()))
    assert [finding for finding in found if finding.level == "fault"] == []
    assert (
        sum("triton" in finding.what and finding.what.startswith("GPU ") for finding in found)
        == torch.cuda.device_count()
    )
