"""Attention: the choice of a backend, the reference against plain loops, every backend against the reference
(GPU).
"""

from __future__ import annotations

import importlib
import re
from functools import partial

import pytest
import torch
from dropforge_kernels import ops, reference
from dropforge_kernels.ops._sinks import apply_sinks, sinks_gradient
from dropforge_kernels.ops.attention import PREFERENCE, AttentionBackend, Case, choose_attention, fa4_missing
from dropforge_kernels.testing import CONSTANT, assert_parity, capture_and_replay, random_tensor
from torch.nn.attention.flex_attention import create_block_mask

# ops.attention is the function of that name.
attention_module = importlib.import_module("dropforge_kernels.ops.attention")
PLAIN = Case(packed=False, window=False, softcap=False, sinks=False, dtype=torch.bfloat16, width=128)
LENGTHS = [5, 0, 130, 1, 64]  # a zero-length document among them


def inputs(dtype, device, *, packed=True, heads=4, groups=2, width=64, lengths=LENGTHS, sinks=False):
    shape = (sum(lengths),) if packed else (2, 72)
    given = {
        name: random_tensor((*shape, count, width), dtype=dtype, device=device, seed=seed)
        for seed, (name, count) in enumerate((("q", heads), ("k", groups), ("v", groups)))
    }
    if packed:
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
        given |= {"cu_seqlens": ends, "max_seqlen": max(lengths)}
    if sinks:
        given["sinks"] = random_tensor((heads,), dtype=dtype, device=device, seed=9)
    return given


@pytest.mark.parametrize(
    ("change", "backend"),
    [
        ({}, "cudnn"),
        ({"packed": True}, "flash"),
        ({"packed": True, "longest": 8192}, "flash"),
        ({"packed": True, "longest": 8192, "mask": True}, "flex"),
        ({"packed": True, "longest": 512, "mask": True}, "flash"),
        ({"packed": True, "longest": 8192, "mask": True, "width": 256}, "flash"),
        ({"window": True}, "flash"),
        ({"packed": True, "sinks": True}, "flash"),
        ({"softcap": True}, "flex"),
        ({"softcap": True, "sinks": True, "packed": True}, "flex"),
        ({"dtype": torch.float32}, "flex"),
        ({"width": 256}, "flash"),
        ({"width": 512}, "flex"),
        ({"width": 8, "dtype": torch.float32}, "reference"),
    ],
)
def test_choice_and_its_reason(change, backend, monkeypatch):
    monkeypatch.setattr(attention_module, "fa4_missing", lambda: "the package flash-attn-4 is not installed")
    choice = choose_attention(PLAIN._replace(**change), cuda=True)
    assert choice.backend == backend
    for earlier in PREFERENCE[PLAIN._replace(**change).kind]:
        if earlier == backend:
            break
        assert earlier in choice.reason


def test_choice_without_cuda_and_by_name():
    assert choose_attention(PLAIN, cuda=False).backend is AttentionBackend.REFERENCE
    assert choose_attention(PLAIN, cuda=True, force="flex").reason == "named by the caller"
    with pytest.raises(ValueError, match="backend cudnn has no soft-capped scores"):
        choose_attention(PLAIN._replace(softcap=True), cuda=True, force="cudnn")
    with pytest.raises(ValueError, match="backend flash needs a CUDA device"):
        choose_attention(PLAIN, cuda=False, force="flash")
    with pytest.raises(ValueError, match="backend fa4 cannot be traced by torch.compile"):
        choose_attention(PLAIN._replace(compiling=True), cuda=True, force="fa4")
    if (why := fa4_missing()) is not None:
        with pytest.raises(ValueError, match=f"backend fa4 {re.escape(why)}"):
            choose_attention(PLAIN, cuda=True, force="fa4")


def test_flash_attention_4_goes_first_where_it_is_installed(monkeypatch):
    case = PLAIN._replace(packed=True)
    monkeypatch.setattr(attention_module, "fa4_missing", lambda: None)
    assert choose_attention(case, cuda=True).backend is AttentionBackend.FA4
    assert choose_attention(case._replace(softcap=True), cuda=True).backend is AttentionBackend.FA4
    assert choose_attention(PLAIN, cuda=True).backend is AttentionBackend.CUDNN
    compiling = choose_attention(case._replace(compiling=True), cuda=True)
    assert compiling.backend is AttentionBackend.FLASH
    assert "fa4 cannot be traced by torch.compile" in compiling.reason


def naive(q, k, v, *, cu_seqlens, window=None, softcap=None, sinks=None, **_):
    """One query and one head at a time."""
    out = torch.zeros_like(q)
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        for i in range(start, end):
            first = start if window is None else max(start, i - window + 1)
            for h in range(q.shape[1]):
                g = h // (q.shape[1] // k.shape[1])
                scores = k[first : i + 1, g] @ q[i, h] * q.shape[-1] ** -0.5
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat((scores, sinks[h : h + 1]))
                out[i, h] = torch.softmax(scores, 0)[: i + 1 - first] @ v[first : i + 1, g]
    return out


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 1.5}, {"window": 3, "softcap": 2.0}])
@pytest.mark.parametrize("sinks", [False, True])
def test_reference_against_plain_loops(options, sinks):
    given = inputs(torch.float64, "cpu", width=8, lengths=[3, 0, 6, 1], sinks=sinks) | options
    torch.testing.assert_close(reference.attention(**given), naive(**given))
    if not sinks and not options:
        dense = {n: given[n][3:9][None] for n in ("q", "k", "v")}
        alone = naive(**{n: t[0] for n, t in dense.items()}, cu_seqlens=torch.tensor([0, 6]))
        torch.testing.assert_close(reference.attention(**dense)[0], alone)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 1.5}])
def test_padding_documents_of_no_length_change_nothing(options):
    """A fixed number of documents, filled up with the total, is how a captured step gets rows of any packing."""
    given = inputs(torch.float32, "cpu", width=8, lengths=[3, 6, 2], sinks=True) | options
    leaves = [given[name].requires_grad_() for name in ("q", "k", "v", "sinks")]
    padded = given | {"cu_seqlens": torch.tensor([0, 3, 9, 11, 11, 11, 11], dtype=torch.int32), "max_seqlen": 11}
    results = []
    for case in (given, padded):
        out = ops.attention(**case, validate=False)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for plain, filled in zip(*results, strict=True):
        assert torch.equal(plain, filled)
        assert filled.isfinite().all()


@pytest.mark.parametrize("window", [None, 1, 100, 129, 300])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [None, [128, 128, 256], [700], [5, 0, 130, 1, 64, 300], [128, 0, 400, 0], [3]])
def test_block_mask_has_the_blocks_of_the_whole_matrix(lengths, causal, window):
    """Against torch's own builder, which looks at every pair."""
    tokens = sum(lengths) if lengths else 515
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) if lengths else None
    found = ops.block_mask(tokens, device="cpu", cu_seqlens=ends, causal=causal, window=window)
    seen = reference.visible(tokens, causal=causal, window=window, cu_seqlens=ends, device=torch.device("cpu"))
    expected = create_block_mask(lambda b, h, q, k: seen[q, k], None, None, tokens, tokens, device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(found.to_dense(), expected.to_dense())
    for blocks, counts in (("kv_indices", "kv_num_blocks"), ("full_kv_indices", "full_kv_num_blocks")):
        for ours, theirs, count in zip(
            getattr(found, blocks)[0, 0], getattr(expected, blocks)[0, 0], getattr(expected, counts)[0, 0], strict=True
        ):
            assert torch.equal(ours[:count], theirs[:count])


def test_documents_do_not_see_each_other(device):
    given = inputs(torch.float32, device, width=16, lengths=[4, 6])
    backend = "reference" if device == "cpu" else None
    before = ops.attention(**given, backend=backend)
    given["k"], given["v"] = given["k"].clone(), given["v"].clone()
    given["k"][:4] += 1
    given["v"][:4] += 1
    after = ops.attention(**given, backend=backend)
    assert torch.equal(before[4:], after[4:])
    assert not torch.equal(before[:4], after[:4])


def test_sink_launches_turn_plain_attention_into_sink_attention(device):
    given = inputs(torch.float32, device, width=16, lengths=[7, 5], sinks=True)
    sinks = given.pop("sinks").requires_grad_()
    expected = reference.attention(**given, sinks=sinks)
    dout = random_tensor(tuple(expected.shape), dtype=torch.float32, device=device, seed=4)
    (expected_gradient,) = torch.autograd.grad(expected, sinks, dout)
    out = reference.attention(**given).contiguous()
    q, k = given["q"].transpose(0, 1), given["k"].transpose(0, 1).repeat_interleave(2, 0)
    mask = reference.visible(12, causal=True, window=None, cu_seqlens=given["cu_seqlens"], device=out.device)
    lse = (q @ k.transpose(1, 2) / 4).masked_fill(~mask, float("-inf")).logsumexp(-1).contiguous()
    apply_sinks(out, lse, sinks.detach())
    torch.testing.assert_close(out, expected.detach(), atol=1e-5, rtol=1e-5)
    gradient = sinks_gradient(dout, out, lse, sinks.detach())
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-4)


GPU_CASES = [
    ("flash", {}, {}),
    ("flash", {"groups": 4}, {"causal": False}),
    ("flash", {"width": 128}, {"window": 17}),
    ("flash", {"width": 256, "groups": 1}, {}),
    ("flash", {"sinks": True}, {}),
    ("flash", {"sinks": True, "groups": 1}, {"window": 17, "scale": 0.3}),
    ("flash", {"packed": False, "sinks": True}, {"window": 9}),
    ("flash", {"packed": False, "width": 72}, {}),
    ("cudnn", {"packed": False}, {}),
    ("cudnn", {"packed": False, "width": 128, "groups": 1}, {"causal": False}),
    ("flex", {}, {}),
    ("flex", {"width": 128}, {"softcap": 5.0, "window": 33}),
    ("flex", {"packed": False, "groups": 4}, {"softcap": 5.0}),
    ("flex", {"sinks": True}, {"softcap": 5.0}),
    ("reference", {}, {"window": 17}),
    ("fa4", {}, {}),
    ("fa4", {"groups": 4, "width": 16}, {"causal": False}),
    ("fa4", {"width": 128}, {"window": 17, "scale": 0.3}),
    ("fa4", {"width": 256, "groups": 1}, {}),
    ("fa4", {"width": 128}, {"softcap": 5.0}),
    ("fa4", {"sinks": True}, {"window": 17}),
    ("fa4", {"packed": False, "sinks": True}, {}),
    ("fa4", {"width": 72}, {}),
]


def needs(backend):
    if backend == "fa4" and fa4_missing() is not None:
        pytest.skip(f"flash-attn-4: {fa4_missing()}")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Argument aux_data:UserWarning")  # flash-attn-4 at its first call of a kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("backend", "shape", "options"), GPU_CASES)
def test_every_backend_against_the_reference(backend, shape, options, dtype):
    needs(backend)
    given = inputs(dtype, "cuda", **shape) | options
    grad = ("q", "k", "v", "sinks") if "sinks" in given else ("q", "k", "v")
    # FlashAttention's backward starts from the rounded output: the sum that is the sinks' gradient carries one
    # rounding step of every element, where eager autograd keeps the softmax's inner product in fp32. One step of the
    # dtype.
    constant = {"grad sinks": 8 * CONSTANT[dtype]}
    assert_parity(partial(ops.attention, backend=backend), reference.attention, given, grad=grad, constant=constant)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Argument aux_data:UserWarning")
@pytest.mark.parametrize("backend", [None, "flash", "fa4"])
def test_strided_inputs_and_chosen_backend(backend):
    needs(backend)
    joint = random_tensor((200, (4 + 2 + 2) * 64), dtype=torch.bfloat16, device="cuda")
    q, k, v = (t.unflatten(-1, (-1, 64)) for t in joint.split((256, 128, 128), -1))
    given = inputs(torch.bfloat16, "cuda", sinks=True) | {"q": q, "k": k, "v": v}
    constant = {"grad sinks": 8 * CONSTANT[torch.bfloat16]}  # as above
    call = partial(ops.attention, backend=backend)
    assert_parity(call, reference.attention, given, grad=("q", "k", "v", "sinks"), constant=constant)


@pytest.mark.gpu
def test_extreme_sinks_stay_finite():
    given = inputs(torch.bfloat16, "cuda")
    given["sinks"] = torch.tensor([-1e4, 1e4, 0.0, 80.0], dtype=torch.float32, device="cuda").requires_grad_()
    out = ops.attention(**given)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert given["sinks"].grad.isfinite().all()
    without = ops.attention(**(given | {"sinks": None}))
    torch.testing.assert_close(out[:, 0], without[:, 0])
    assert (out[:, 1] == 0).all()


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_autocast_casts_what_is_not_in_its_dtype(kind):
    given = inputs(torch.float32, kind)
    mixed = given | {"v": given["v"].bfloat16()}  # a rotation in fp32 leaves q and k wider than v
    with torch.autocast(kind, dtype=torch.bfloat16):
        assert ops.attention(**given).dtype is torch.bfloat16
        assert torch.equal(ops.attention(**mixed), ops.attention(**given))
    with pytest.raises(TypeError, match="v must have the dtype of q|k must have the dtype of q"):
        ops.attention(**mixed)


@pytest.mark.gpu
def test_empty_row():
    given = inputs(torch.bfloat16, "cuda", lengths=[0, 0])
    assert ops.attention(**(given | {"max_seqlen": 1})).shape == (0, 4, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_break(backend):
    torch._dynamo.reset()
    given = inputs(torch.bfloat16, "cuda", sinks=True)

    def block(q, k, v, sinks, cu_seqlens, max_seqlen, kind=ops):
        return kind.attention(q * 2, k, v, sinks=sinks, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, window=40)

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    assert_parity(compiled, partial(block, kind=reference), given, grad=("q", "k", "v", "sinks"))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Argument aux_data:UserWarning")
@pytest.mark.parametrize("packed", [True, False])
def test_cuda_graph_capture(packed):
    def build():
        given = inputs(torch.bfloat16, "cuda", packed=packed, sinks=packed)
        leaves = [given[n].requires_grad_() for n in ("q", "k", "v")]

        def step():
            out = ops.attention(**given, validate=False)
            # Query gradients are summed with atomic additions in both kernels; keys' and values' are not.
            return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))[1:]

        return step

    capture_and_replay(build)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Argument aux_data:UserWarning")
@pytest.mark.parametrize("backend", ["flash", "fa4"])
@pytest.mark.parametrize("options", [{}, {"window": 40}, {"sinks": True}], ids=["plain", "window", "sinks"])
def test_one_captured_graph_serves_every_packing(options, backend):
    """cu_seqlens changes between replays: other documents, another number of them, filled up with the total."""
    needs(backend)
    options = dict(options)
    sinks = options.pop("sinks", False) if options else False
    given = inputs(torch.bfloat16, "cuda", lengths=[70, 130], sinks=sinks) | options
    given |= {"cu_seqlens": torch.full((9,), 200, dtype=torch.int32, device="cuda"), "max_seqlen": 200}

    def step():
        leaves = {n: given[n].detach().requires_grad_() for n in ("q", "k", "v")}  # of the stream that runs it
        out = ops.attention(**(given | leaves), validate=False, backend=backend)
        return out, *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))

    given["cu_seqlens"][0] = 0
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for ends in ([0, 200], [0, 70, 200], [0, 5, 5, 6, 100, 199, 200]):
        padded = ends + [200] * (9 - len(ends))
        given["cu_seqlens"].copy_(torch.tensor(padded, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        for replayed, expected in zip(captured, step(), strict=True):
            torch.testing.assert_close(replayed, expected)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"v": torch.ones(200, 2, 32)}, ValueError, "v must have the shape of k"),
        ({"k": torch.ones(200, 3, 64), "v": torch.ones(200, 3, 64)}, ValueError, "received 4 and 3"),
        ({"cu_seqlens": None}, ValueError, "cu_seqlens goes with packed"),
        ({"max_seqlen": None}, ValueError, "max_seqlen"),
        ({"cu_seqlens": torch.tensor([0, 5, 200])}, TypeError, "cu_seqlens must have dtype int32"),
        ({"cu_seqlens": torch.tensor([0, 5, 201], dtype=torch.int32)}, ValueError, "end with .* 200; received 201"),
        (
            {"cu_seqlens": torch.tensor([0, 9, 5, 200], dtype=torch.int32)},
            ValueError,
            "must not fall; received 9 then 5",
        ),
        ({"cu_seqlens": torch.tensor([1, 200], dtype=torch.int32)}, ValueError, "start with 0; received 1"),
        ({"window": 0}, ValueError, "window must be positive"),
        ({"sinks": torch.ones(3)}, ValueError, r"sinks must have shape \(4\); received \(3,\)"),
    ],
)
def test_wrong_arguments_are_refused(change, error, text):
    given = inputs(torch.float32, "cpu") | change
    with pytest.raises(error, match=text):
        ops.attention(**given)
