"""Whole training runs on the kernels: 100 steps inside the spread of the seeds, and losses that no refactor may move.

golden_losses.json holds, for each family, the losses of 20 steps of LoRA with transformers' own code (CPU, fp32). They
move when the model, the data or transformers' arithmetic does; then the failing test prints the new ones.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).with_name("golden_losses.json")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite")
WIDER = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
PARTS = {"phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model, family):
    """A LoRA on every projection, its A matrices from a fixed seed of their own."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=PARTS.get(family, SEVEN)))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name:
                start = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
                parameter.copy_(start.to(parameter))
    return wrapped.train()


def sequences():
    """(16, 24) ids with a rule that can be learnt: each row repeats a random piece of four."""
    generator = torch.Generator().manual_seed(23)
    pieces = torch.randint(3, 97, (16, 4), generator=generator)
    return pieces.repeat(1, 6)


def curve(model, *, seed, steps, kernels, dtype=torch.float32):
    """Losses of `steps` steps of AdamW over micro-batches of four rows, drawn in an order of the seed."""
    from dropforge_kernels.patch.session import patched

    device = next(model.parameters()).device
    data = sequences().to(device)
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    with patched(model, policy="required") if kernels else nullcontext():
        for _ in range(steps):
            rows = data[torch.randperm(16, generator=generator)[:4].to(device)]
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
                loss = model(input_ids=rows, labels=rows).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_losses(family, tiny):
    """Transformers' own code makes them, our kernels must make them too; a rewrite of either shows here."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[family]
    for kernels in (False, True):
        losses = curve(adapted(tiny(family), family), seed=0, steps=20, kernels=kernels)
        assert losses == pytest.approx(golden, rel=1e-3), json.dumps([round(loss, 5) for loss in losses])
    assert min(golden[-5:]) < 0.96 * golden[0]


def smooth(losses, width=10):
    return torch.tensor(losses).unfold(0, width, 1).mean(dim=1)


def check_spread(make, *, closeness, **options):
    """The curve on the kernels lies by the plain one of its seed, measured by how far seeds lie apart."""
    plain = [smooth(curve(make(), seed=seed, steps=100, kernels=False, **options)) for seed in range(3)]
    ours = smooth(curve(make(), seed=0, steps=100, kernels=True, **options))
    spread = torch.stack(plain).std(dim=0).mean()
    assert (ours - plain[0]).abs().mean() < closeness * spread
    assert ours[-1] < 0.8 * ours[0]


def test_a_hundred_steps_stay_inside_the_spread_of_the_seeds(tiny):
    check_spread(lambda: adapted(tiny("llama"), "llama"), closeness=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES[1:])
def test_a_hundred_steps_of_the_other_families(family, tiny):
    check_spread(lambda: adapted(tiny(family), family), closeness=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hundred_steps_in_bfloat16(family, tiny):
    """On a GPU, 16-bit weights under fp32 adapters: rounding may move the curve, but within the spread of the seeds."""
    heads = {"head_dim": 64} if family in ("qwen3", "gemma2", "gemma3_text") else {}

    def make():
        model = tiny(family, **WIDER, **heads)
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn_like(parameter) * 0.05)
        # transformers' sdpa attention leaves out Gemma 2's capped scores.
        model.set_attn_implementation("eager" if family == "gemma2" else "sdpa")
        wrapped = adapted(model.cuda().bfloat16(), family)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return wrapped

    check_spread(make, closeness=1.0, dtype=torch.bfloat16)
