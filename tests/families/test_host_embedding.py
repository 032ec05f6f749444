"""The input embedding in host memory: the same numbers, everything given back, and refused where it cannot be."""

from __future__ import annotations

import copy

import pytest
import torch


def trained(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [7, 64, 4100])
def test_the_kernel_fetches_the_rows(dtype, width):
    from dropforge_kernels.ops._host_rows import gather_rows, host_rows

    torch.manual_seed(0)
    table = torch.randn(11, width).to(dtype)
    ids = torch.tensor([[10, 0, 3], [3, 5, 10]])
    for kind in (torch.int64, torch.int32):
        rows = gather_rows(table, ids.reshape(-1).to(kind))
        assert rows.dtype is dtype and torch.equal(rows, table[ids.reshape(-1)])
    assert torch.equal(host_rows(table, ids, pinned=False), table[ids])
    assert gather_rows(table, ids[:0].reshape(-1)).shape == (0, width)


def test_an_id_outside_the_table_is_seen():
    from dropforge_kernels.ops._host_rows import gather_rows

    rows = gather_rows(torch.ones(4, 8), torch.tensor([3, 4, -1]))
    assert rows[0].eq(1).all() and rows[1:].isnan().all()


@pytest.mark.parametrize("way", ["host", "kernel"])
@pytest.mark.parametrize("policy", ["auto", "off"])
def test_the_same_step_and_everything_given_back(policy, way, tiny, batch, monkeypatch, adapted):
    from dropforge_kernels.ops._host_rows import gather_rows
    from dropforge_kernels.patch import host_embedding
    from dropforge_kernels.patch.session import patched

    def fetched(table, ids, *, pinned):
        calls.append(pinned)
        return gather_rows(table, ids.reshape(-1)).view(*ids.shape, table.shape[1])

    calls = []
    if way == "kernel":
        monkeypatch.setattr(host_embedding, "host_rows", fetched)
    model = adapted(tiny("llama", tie_word_embeddings=False))
    table = model.get_input_embeddings()
    weight, keys = table.weight, list(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    before, plain = copy.deepcopy(model.state_dict()), trained(model, batch)
    with patched(model, policy=policy):
        expected = trained(model, batch)
    with patched(model, policy=policy, offload_embedding=True) as report:
        assert model.get_input_embeddings() is table and table.weight is weight
        assert "embedding's 0.00 GiB lie in host memory" in report.lines()[-1]
        assert not any("embed_tokens" in name for name, _ in model.named_parameters())
        assert list(model.state_dict()) == keys
        model.load_state_dict(before)
        assert equal(trained(model, batch), expected) and bool(calls) is (way == "kernel")
    assert [name for name, _ in model.named_parameters()] == names and table.weight is weight
    assert "forward" not in vars(table) and "weight" not in vars(table) and weight.device == model.device
    assert not table._state_dict_hooks and not table._load_state_dict_pre_hooks
    assert equal(trained(model, batch), plain)
    assert torch.equal(model.state_dict()[keys[0]], before[keys[0]])


def test_a_trainer_that_moves_the_model_leaves_the_table(tiny):
    """To a device that every machine has; "meta" holds no values, so the table must not have gone there."""
    from dropforge_kernels.patch.session import open_session

    model = tiny("llama", tie_word_embeddings=False).requires_grad_(False)
    session = open_session(model, policy="off", offload_embedding=True)
    table = model.get_input_embeddings().weight
    values = table.detach().clone()
    model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"} and model.device.type == "meta"
    assert table.device.type == "cpu" and torch.equal(table, values)
    # ids elsewhere: the rows go where the ids are
    assert model.get_input_embeddings()(torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 3, values.shape[1])
    session.close()
    session.close()


def test_a_paused_session_keeps_it_and_a_wrapped_forward_still_works(tiny, batch, adapted):
    from dropforge_kernels.patch.session import open_session

    model = adapted(tiny("qwen2", tie_word_embeddings=False))
    table = model.get_input_embeddings()
    plain = table(batch["input_ids"])
    session = open_session(model, policy="off", offload_embedding=True)
    session.pause()
    assert session.resume() and "weight" in vars(table)
    inner = table.forward
    table.forward = lambda ids: inner(ids) * 1
    session.close()
    assert torch.equal(table(batch["input_ids"]), plain) and not session.resume()
    del table.forward


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"tie_word_embeddings": True}, "the head is the embedding's own matrix"),
        ({"tie_word_embeddings": False, "trained": True}, "the embedding is trained"),
        ({"tie_word_embeddings": False, "twice": True}, "lies in host memory already"),
    ],
)
def test_refused(change, why, tiny, batch):
    from dropforge_kernels.patch.session import open_session, patched
    from dropforge_kernels.patch.spec import PatchError

    flags = {name: change.pop(name, False) for name in ("trained", "twice")}
    change = dict(change)
    model = tiny("llama", **change).requires_grad_(flags["trained"])
    if flags["twice"]:
        open_session(model, policy="off", offload_embedding=True)
    with pytest.raises(PatchError, match=why), patched(model, offload_embedding=True):
        pass
    assert not any("forward" in vars(module) for module in model.model.layers.modules())
