"""``patched`` touches one model, gives everything back, and says what it did."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite")


def outputs(model, batch):
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return [output.loss.detach(), output.logits.detach(), *(p.grad.clone() for p in model.parameters())]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def instance_forwards(model):
    return [path for path, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("family", FAMILIES)
def test_restored_exactly_and_the_second_model_never_changes(family, tiny, batch):
    from dropforge_kernels.patch.session import patched

    model, second = tiny(family), tiny(family)
    before, before_second = outputs(model, batch), outputs(second, batch)
    keys = list(model.state_dict())
    with patched(model) as report:
        assert report.swaps
        assert list(model.state_dict()) == keys
        assert equal(outputs(second, batch), before_second)
        assert instance_forwards(second) == []
    assert instance_forwards(model) == []
    assert equal(outputs(model, batch), before)
    assert equal(outputs(second, batch), before_second)


def test_restored_after_an_exception(tiny, batch):
    from dropforge_kernels.patch.session import patched

    model = tiny("llama")
    before = outputs(model, batch)
    with pytest.raises(KeyError, match="inside"), patched(model):
        assert instance_forwards(model)
        raise KeyError("inside")
    assert instance_forwards(model) == []
    assert equal(outputs(model, batch), before)


def test_restored_when_opening_fails_half_way(tiny):
    from dropforge_kernels.patch.families.llama import SPECS
    from dropforge_kernels.patch.session import open_session

    def refuse(plain):
        raise RuntimeError("cannot build")

    model = tiny("llama")
    with pytest.raises(RuntimeError, match="cannot build"):
        open_session(model, specs=(SPECS[0], dataclasses.replace(SPECS[1], build=refuse)))
    assert instance_forwards(model) == []


def test_two_claims_on_one_module_are_an_error_that_names_both(tiny):
    from dropforge_kernels.patch.families.llama import SPECS
    from dropforge_kernels.patch.session import open_session
    from dropforge_kernels.patch.spec import PatchError

    model = tiny("llama")
    rival = dataclasses.replace(SPECS[1], operation="geglu")
    with pytest.raises(PatchError, match=r"llama\.swiglu and llama\.geglu both claim model\.layers\.0\.mlp\.forward"):
        open_session(model, specs=(*SPECS, rival))
    assert instance_forwards(model) == []


def test_unknown_family_trains_unpatched_and_the_report_says_so(tiny, batch):
    from dropforge_kernels.patch.session import patched
    from dropforge_kernels.patch.spec import PatchError

    model = tiny("olmo")
    before = outputs(model, batch)
    with patched(model) as report:
        assert equal(outputs(model, batch), before)
    assert report.swaps == []
    assert "no kernels for the model type 'olmo'" in report.skips[0].reason
    assert report.lines()[0].startswith("kernels: the whole model left as it was")
    with pytest.raises(PatchError, match="olmo"), patched(model, policy="required"):
        pass


def test_unmet_requirement_is_skipped_with_its_reason_or_refused(tiny):
    from dropforge_kernels.patch.session import patched
    from dropforge_kernels.patch.spec import PatchError

    model = tiny("llama", hidden_act="gelu")
    with patched(model) as report:
        assert "llama.swiglu" not in report.counts()
        assert report.counts()["llama.rms_norm"] == 5
    reasons = {(skip.path, skip.reason) for skip in report.skips}
    assert ("model.layers.0.mlp", "its activation is GELUActivation, not SiLU") in reasons
    with pytest.raises(PatchError, match="not SiLU"), patched(model, policy="required"):
        pass
    assert instance_forwards(model) == []


def test_adapter_on_the_head_keeps_the_models_own_loss(tiny, batch):
    from dropforge_kernels.patch.session import patched
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with patched(model) as report:
        assert model(**batch).logits is not None
    assert [skip.reason for skip in report.skips] == ["its head is a peft.tuners.lora.layer.Linear, not a plain Linear"]


def test_a_forward_somebody_replaced_before_is_left_alone(tiny):
    from dropforge_kernels.patch.session import patched

    model = tiny("llama")
    norm = model.model.norm
    theirs = norm.forward = lambda hidden_states: hidden_states
    with patched(model) as report:
        assert norm.forward is theirs
    assert norm.forward is theirs
    assert [skip.path for skip in report.skips] == ["model.norm"]


def test_a_forward_somebody_wrapped_inside_falls_back_to_the_class(tiny, batch):
    """accelerate and TRL wrap a model's forward; after the session the wrapper must reach the plain computation."""
    from dropforge_kernels.patch.session import patched

    model = tiny("llama")
    with patched(model) as report:
        inner = model.forward
        model.forward = lambda **kwargs: inner(**kwargs)
        assert model(**batch).logits is None
    assert report.wrapped == [""]
    assert model(**batch).logits is not None


def test_policies_names_and_signature(tiny, batch):
    from dropforge_kernels.patch.session import patched
    from dropforge_kernels.patch.spec import PatchError

    model = tiny("llama")
    signature = inspect.signature(model.forward)
    with patched(model, policy="off") as report:
        assert instance_forwards(model) == [] and report.swaps == []
    with patched(model, names=["rope", "llama.rms_norm"]) as report:
        assert report.counts() == {"llama.rope": 2, "llama.rms_norm": 5}
    with patched(model):
        assert inspect.signature(model.forward) == signature  # trainers choose columns by it
        model.eval()
        assert model(**batch).logits is not None
    with pytest.raises(PatchError, match="did you mean 'swiglu'"), patched(model, names=["swigli"]):
        pass
    with pytest.raises(PatchError, match="policy must be one of"), patched(model, policy="on"):
        pass


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-8B", None, 3])
def test_what_is_no_model_is_refused_by_its_argument(model):
    from dropforge_kernels.patch.session import PatchError, open_session

    with pytest.raises(PatchError, match=f"model must be a loaded model.*{type(model).__name__}"):
        open_session(model)
