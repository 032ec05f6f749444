"""A patched model computes what the unpatched one computes: loss, logits and every gradient, in fp32.

Tolerance: fp32 with another order of the same operations, a few dozen roundings deep: 2e-5 relative to the largest
value of the compared tensor.
"""

from __future__ import annotations

import copy

import pytest
import torch

TOLERANCE = 2e-5
FAMILIES = {
    "llama": {"rms_norm": 5, "swiglu": 2, "rope": 2, "linear_cross_entropy": 1},
    "mistral": {"rms_norm": 5, "swiglu": 2, "rope": 2, "linear_cross_entropy": 1},
    "qwen2": {"rms_norm": 5, "swiglu": 2, "rope": 2, "linear_cross_entropy": 1},
    "qwen3": {"rms_norm": 5, "swiglu": 2, "qk_norm_rope": 2, "linear_cross_entropy": 1},
    "gemma2": {"rms_norm": 9, "geglu": 2, "rope": 2, "linear_cross_entropy": 1},
    "gemma3_text": {"rms_norm": 9, "geglu": 2, "qk_norm_rope": 2, "linear_cross_entropy": 1},
    "phi3": {"rms_norm": 5, "swiglu_packed": 2, "rope": 2, "linear_cross_entropy": 1},
    "granite": {"rms_norm": 5, "swiglu": 2, "rope": 2, "linear_cross_entropy": 1},
}


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-12))


def uneven(x: torch.Tensor) -> torch.Tensor:
    """Wrong by another factor in every column: a norm behind it would take away one common factor."""
    return x * (torch.linspace(0.5, 1.5, x.shape[-1]) if x.dim() else 1.5)


def step(model, batch, **extra):
    """(loss, gradients) of one training step."""
    model.zero_grad()
    output = model(**batch, **extra)
    output.loss.backward()
    return output.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_logits_and_gradients(family, tiny, batch):
    from dropforge_kernels.patch.session import patched

    model = tiny(family)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.detach()
    loss, gradients = step(model, batch)
    with patched(model, policy="required") as report:
        assert report.counts() == {f"{family}.{name}": count for name, count in FAMILIES[family].items()}
        patched_logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.detach()
        patched_loss, patched_gradients = step(model, batch)
    assert distance(patched_logits, logits) < TOLERANCE
    assert distance(patched_loss, loss) < TOLERANCE
    assert patched_gradients.keys() == gradients.keys()
    assert len(gradients) == len(list(model.parameters()))
    worst = {name: distance(patched_gradients[name], gradients[name]) for name in gradients}
    # k's bias moves every score of a row alike, so its gradient is zero but for rounding; compare it with q's.
    for name in worst:
        if name.endswith("k_proj.bias"):
            scale = gradients[name.replace("k_proj", "q_proj")].abs().max()
            worst[name] = float((patched_gradients[name] - gradients[name]).abs().max() / scale)
    assert max(worst.values()) < TOLERANCE, sorted(worst.items(), key=lambda item: -item[1])[:3]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_swap_is_really_run(family, tiny, batch, monkeypatch):
    """A swap whose operation is broken on purpose must change the step; else the parity test would prove nothing."""
    import dropforge_kernels.patch.families._attention as attention_file
    import dropforge_kernels.patch.families._loss as loss_file
    import dropforge_kernels.patch.families._mlps as mlps_file
    import dropforge_kernels.patch.families._norms as norms_file
    from dropforge_kernels.patch.session import patched

    model = tiny(family)
    _, gradients = step(model, batch)
    places = (attention_file, loss_file, mlps_file, norms_file)
    for operation in FAMILIES[family]:
        (place,) = [file for file in places if operation in vars(file)]
        real = getattr(place, operation)

        def broken(*args, real=real, **kwargs):
            result = real(*args, **kwargs)
            return tuple(uneven(part) for part in result) if isinstance(result, tuple) else uneven(result)

        with monkeypatch.context() as patch:
            patch.setattr(place, operation, broken)
            with patched(model, names=[operation]):
                _, changed = step(model, batch)
        assert max(distance(changed[name], gradients[name]) for name in gradients) > 50 * TOLERANCE, operation


def test_normalisation_over_the_whole_optimizer_step(tiny, batch):
    """Two micro-batches normalised by the tokens of both equal the one large batch."""
    from dropforge_kernels.patch.session import patched

    model = tiny("llama")
    items = (batch["labels"][:, 1:] != -100).sum()
    _, whole = step(model, batch)
    with patched(model):
        model.zero_grad()
        for row in range(2):
            micro = {key: value[row : row + 1] for key, value in batch.items()}
            model(**micro, num_items_in_batch=items).loss.backward()
    for name, parameter in model.named_parameters():
        assert distance(parameter.grad, whole[name]) < TOLERANCE, name


def test_packed_positions_and_shifted_labels(tiny, batch):
    """Positions that restart inside a row (packing), and labels that come already shifted."""
    from dropforge_kernels.patch.session import patched

    model = tiny("llama")
    positions = torch.cat((torch.arange(6), torch.arange(7))).expand(2, -1)
    packed = {"input_ids": batch["input_ids"], "position_ids": positions, "labels": batch["labels"]}
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[..., 1:].contiguous()
    loss, gradients = step(model, packed, shift_labels=shifted)
    with patched(model):
        patched_loss, patched_gradients = step(model, packed, shift_labels=shifted)
    assert distance(patched_loss, loss) < TOLERANCE
    assert max(distance(patched_gradients[n], gradients[n]) for n in gradients) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_with_an_adapter_and_recomputed_layers(family, tiny, batch):
    """LoRA inside the patched modules, with gradient checkpointing."""
    from dropforge_kernels.patch.session import patched
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny(family), config)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss, gradients = step(model, batch)
    with patched(model, policy="required") as report:
        assert report.counts()[f"{family}.swiglu"] == 2
        patched_loss, patched_gradients = step(model, batch)
    assert gradients and all("lora_" in name for name in gradients)
    assert distance(patched_loss, loss) < TOLERANCE
    assert max(distance(patched_gradients[n], gradients[n]) for n in gradients) < TOLERANCE


def test_generation_with_a_cache(tiny, batch):
    from dropforge_kernels.patch.session import patched

    model = tiny("qwen3").eval()
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = model.generate(batch["input_ids"][:1], **arguments)
    with patched(model):
        got = model.generate(batch["input_ids"][:1], **arguments)
    assert torch.equal(got, want)


def test_bfloat16_is_not_worse_than_the_unpatched_model(tiny, batch):
    """Error of the loss against fp32, patched and unpatched, both in bf16."""
    from dropforge_kernels.patch.session import patched

    model = tiny("llama")
    truth, _ = step(model, batch)
    low = copy.deepcopy(model).to(torch.bfloat16)
    unpatched, _ = step(low, batch)
    with patched(low):
        fused, _ = step(low, batch)
    assert abs(fused - truth) <= 2 * abs(unpatched.float() - truth) + 0.02
