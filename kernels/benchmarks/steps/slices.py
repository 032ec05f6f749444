"""How far bf16 gradients are from fp32 on two layers of real width: every policy of the engine, PEFT under autocast.

The reference is transformers and PEFT in fp32 with eager attention, on the same bf16-rounded weights. One CSV row per
model and candidate; distances are relative L2, over all adapter matrices.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from dropforge_kernels.modules.offload import HostStore
from dropforge_kernels.modules.policy import Keep
from dropforge_kernels.patch.session import open_session
from torch import nn

from steps import adapters
from steps.models import MODELS, TARGETS
from steps.parity import distance
from steps.side_files import write_rows

LAYERS, RANK, TILE = 2, 16, 300
SHAPE, TINY_SHAPE = (2, 512), (2, 24)
QWEN = {
    "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True, "max_position_embeddings": 40960,
}  # fmt: skip
COLUMNS = (
    "model", "who", "loss_relative", "worst_gradient_relative", "mean_gradient_relative", "least_cosine", "gpu",
    "torch", "commit",
)  # fmt: skip

Answer = tuple[float, dict[str, torch.Tensor]]


def main(args: argparse.Namespace) -> None:
    """Writes the CSV at ``args.out``. On a CPU: the tiny model alone, which tries the script itself."""
    torch.backends.cuda.matmul.allow_tf32 = False
    made = _models(args.device)
    rows = [row for name, model in made for row in _compare(name, model, args.device)]
    write_rows(args.out, COLUMNS, rows, device=args.device, commit=args.commit)


def _models(device: str) -> Iterator[tuple[str, nn.Module]]:
    from transformers import LlamaConfig, Qwen3Config

    if device == "cpu":
        yield "tiny-2l", _adapted(LlamaConfig(**{**MODELS["tiny"], "num_hidden_layers": LAYERS}), device)
        return
    llama = {**MODELS["llama-3.1-8b"], "num_hidden_layers": LAYERS}
    yield "llama8b-2l", _adapted(LlamaConfig(**llama), device)
    yield "qwen3-0.6b-2l", _adapted(Qwen3Config(**QWEN, num_hidden_layers=LAYERS), device)


def _adapted(config: Any, device: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.config.use_cache = False
    options = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, options).train()
    adapters.reset(wrapped)
    return wrapped


def _compare(name: str, model: nn.Module, device: str) -> Iterator[dict[str, object]]:
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    seeded = torch.Generator().manual_seed(7)
    ids = torch.randint(3, vocabulary, SHAPE if device == "cuda" else TINY_SHAPE, generator=seeded).to(device)
    wide = copy.deepcopy(model).float()
    wide.set_attn_implementation("eager")  # type: ignore[operator]
    truth = _step(wide, ids)
    del wide
    for who, run in _candidates(model, ids, device):
        gc.collect()
        yield {"model": name, "who": who} | _distances(run(), truth)


def _candidates(model: nn.Module, ids: torch.Tensor, device: str) -> Iterator[tuple[str, Callable[[], Answer]]]:
    def ours(keep: Keep) -> Answer:
        session = open_session(model)
        try:
            assert session.engine is not None, session.report.engine
            session.engine.set_policies([keep] * LAYERS, mlp_tile=TILE, store=HostStore(depth=2))
            return _step(model, ids)
        finally:
            session.close()

    for keep in Keep:
        yield str(keep), lambda keep=keep: ours(keep)  # type: ignore[misc]

    def usual() -> Answer:
        with torch.autocast(device, dtype=torch.bfloat16):
            return _step(model, ids)

    yield "peft_autocast", usual


def _step(model: nn.Module, ids: torch.Tensor) -> Answer:
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach()), adapters.gradients(model)


def _distances(found: Answer, truth: Answer) -> dict[str, object]:
    errors = [distance(found[1][key], exact) for key, exact in truth[1].items()]
    cosines = [
        float(nn.functional.cosine_similarity(found[1][key].flatten(), exact.flatten(), dim=0))
        for key, exact in truth[1].items()
    ]
    return {
        "loss_relative": abs(found[0] - truth[0]) / abs(truth[0]),
        "worst_gradient_relative": max(errors),
        "mean_gradient_relative": sum(errors) / len(errors),
        "least_cosine": min(cosines),
    }
