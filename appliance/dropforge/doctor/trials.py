"""Real work on every GPU, checked against the right answer: `python -m dropforge.doctor.trials NAME` for one kind.

Prints one JSON object per line: {"device": 0, "ok": true, "text": "..."}, and for `torch` first {"facts": {...}}.
Each kind runs in a process of its own, because a GPU that is not well may end or hang the process that asks it.
Every trial takes the device, so that its arithmetic can be tested on the CPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

ROWS, WIDTH = 64, 512
EPS = 1e-6


class WrongAnswerError(Exception):
    """The device computed something else than it should."""


def torch_product(device: str) -> str:
    """Matrix products of small whole numbers, which every floating-point type of a GPU must get exactly right."""
    import torch

    numbers = (torch.arange(64 * 64) % 3).reshape(64, 64)
    right = numbers @ numbers
    kinds = [torch.float32, torch.float16]
    if not device.startswith("cuda") or torch.cuda.is_bf16_supported(including_emulation=False):
        kinds.append(torch.bfloat16)
    for kind in kinds:
        on_device = numbers.to(device=device, dtype=kind)
        if not torch.equal((on_device @ on_device).cpu().to(torch.int64), right):
            raise WrongAnswerError(f"torch: a product in {str(kind).removeprefix('torch.')} is wrong")
    return "torch: products in " + ", ".join(str(kind).removeprefix("torch.") for kind in kinds) + " are right"


def triton_kernel(device: str) -> str:
    """Our RMSNorm, forward and backward, through Triton; its plain PyTorch twin says what is right."""
    import torch
    from dropforge_kernels import ops, reference
    from dropforge_kernels.dispatch import Backend, choose

    x = torch.linspace(-2, 3, ROWS * WIDTH).reshape(ROWS, WIDTH).sin()
    weight, upstream = torch.linspace(0.5, 1.5, WIDTH), torch.linspace(-1, 1, ROWS * WIDTH).reshape(ROWS, WIDTH).cos()
    answers = []
    for where, norm in (("cpu", reference.rms_norm), (device, ops.rms_norm)):
        a = x.to(where).requires_grad_()
        b = weight.to(where).requires_grad_()
        y = norm(a, b, eps=EPS)
        answers.append([tensor.detach().cpu() for tensor in (y, *torch.autograd.grad(y, (a, b), upstream.to(where)))])
    chosen = choose("rms_norm", x.to(device))
    if chosen.backend is not Backend.TRITON:
        raise WrongAnswerError(f"triton: the kernel was not used: {chosen.reason}")
    for what, right, found in zip(("output", "gradient", "gradient of the weight"), *answers, strict=True):
        if not torch.allclose(right, found, rtol=1e-4, atol=1e-4):
            raise WrongAnswerError(f"triton: the {what} of a kernel is off by {(right - found).abs().max().item():.2g}")
    return f"triton {metadata.version('triton')}: a kernel compiles, and its output and gradients are right"


def bitsandbytes_work(device: str) -> str:
    """4-bit weights back to 32 bits, equal to what the CPU makes of them; one step of the 8-bit optimizer."""
    import bitsandbytes
    import torch
    from bitsandbytes import functional

    x = torch.linspace(-2, 3, ROWS * WIDTH).reshape(ROWS, WIDTH).sin()
    packed, state = functional.quantize_4bit(x.to(device), quant_type="nf4")
    found = functional.dequantize_4bit(packed, state).cpu()
    cpu_packed, cpu_state = functional.quantize_4bit(x, quant_type="nf4")
    right = functional.dequantize_4bit(cpu_packed, cpu_state)
    # A value between two of the sixteen levels may be rounded either way; anything else is wrong.
    if (found - x).abs().max() > 1.01 * (right - x).abs().max() or (found != right).float().mean() > 0.01:
        raise WrongAnswerError("bitsandbytes: 4-bit weights come back wrong")
    weight = torch.nn.Parameter(torch.zeros(4096, 4, device=device))
    optimizer = bitsandbytes.optim.AdamW8bit([weight], lr=0.5, weight_decay=0.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    if not torch.allclose(weight.detach().cpu(), torch.full((4096, 4), -0.5), rtol=0.05):
        raise WrongAnswerError("bitsandbytes: a step of its 8-bit optimizer goes wrong")
    return f"bitsandbytes {metadata.version('bitsandbytes')}: 4-bit weights and 8-bit optimizer are right"


def vllm_kernel(device: str) -> str:
    """One of vLLM's own compiled kernels, RMSNorm, against plain PyTorch."""
    import torch
    from dropforge_kernels import reference
    from vllm import _custom_ops

    x = torch.linspace(-2, 3, ROWS * WIDTH).reshape(ROWS, WIDTH).sin()
    weight = torch.linspace(0.5, 1.5, WIDTH)
    out = torch.empty(ROWS, WIDTH, device=device)
    _custom_ops.rms_norm(out, x.to(device), weight.to(device), EPS)
    if not torch.allclose(out.cpu(), reference.rms_norm(x, weight, eps=EPS), rtol=1e-4, atol=1e-4):
        raise WrongAnswerError("vLLM: a kernel gives a wrong answer")
    return f"vLLM {metadata.version('vllm')}: its kernels load, and one is right"


TRIALS: dict[str, Callable[[str], str]] = {
    "torch": torch_product, "triton": triton_kernel, "bitsandbytes": bitsandbytes_work, "vllm": vllm_kernel,
}  # fmt: skip


def torch_facts() -> dict[str, Any]:
    """What torch was built for and what it sees; `error` says why it sees nothing."""
    import torch

    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda or "", "devices": 0, "list": ""}
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        return facts | {"error": str(error)}
    return facts | {"devices": torch.cuda.device_count(), "list": " ".join(torch.cuda.get_arch_list())}


def main(arguments: list[str]) -> int:
    import torch

    (name,) = arguments
    if name == "torch":
        print(json.dumps({"facts": torch_facts()}), flush=True)
    for index in range(torch.cuda.device_count()):
        try:
            with torch.cuda.device(index):
                said = {"ok": True, "text": TRIALS[name](f"cuda:{index}")}
        except Exception as error:  # noqa: BLE001  # whatever goes wrong on the device is the answer
            said = {"ok": False, "text": f"{type(error).__name__}: {error}"}
        print(json.dumps({"device": index, **said}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
