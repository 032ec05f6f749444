"""The host store gives every tensor back bit for bit, in the order of a backward, and says when it cannot."""

from __future__ import annotations

import pytest
import torch
from dropforge_kernels.modules.offload import SMALLEST_SLAB, HostStore, slab_sizes

MIB = 1 << 20


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


def tensors(device: str, count: int = 5) -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [torch.randn(100 + i, 64, device=device).to(torch.bfloat16) for i in range(count)]


@pytest.mark.parametrize("depth", [1, 2, 9])
def test_reverse_order_gives_the_same_bits(device, depth):
    store, originals = HostStore(depth=depth), tensors(device)
    for _ in range(3):  # the slabs are used again by the next step
        store.clear()
        tickets = [store.put(x.clone()) for x in originals]
        back = [store.get(ticket) for ticket in reversed(tickets)]
        for x, y in zip(reversed(originals), back, strict=True):
            assert y.dtype == x.dtype and y.device == x.device and torch.equal(x, y)
    assert store.capacity == SMALLEST_SLAB and store.used == sum(x.nbytes for x in originals)


def test_any_order_works(device):
    store, originals = HostStore(), tensors(device)
    tickets = [store.put(x.clone()) for x in originals]
    for i in (1, 4, 2, 0, 3):
        assert torch.equal(store.get(tickets[i]), originals[i])


def test_no_more_tensors_stay_than_the_depth(device):
    store, originals = HostStore(depth=2), tensors(device, 6)
    tickets = [store.put(x) for x in originals]
    assert sorted(store._here) == [4, 5]
    store.get(tickets[5])
    assert sorted(store._here) == [3, 4]
    store.get(tickets[4])
    store.get(tickets[3])
    assert sorted(store._here) == [1, 2]
    store.clear()
    assert store._here == {}


def test_a_tensor_may_lie_across_slabs(device):
    store = HostStore()
    store.reserve(SMALLEST_SLAB, torch.device(device))
    originals = [torch.full((9 * MIB,), i, dtype=torch.uint8, device=device) for i in range(1, 8)]
    originals[1][::3] = 77
    tickets = [store.put(x) for x in originals]
    assert len(store._slabs) > 2
    for ticket, x in zip(reversed(tickets), reversed(originals), strict=True):
        assert torch.equal(store.get(ticket), x)


def test_what_is_fetched_is_a_copy(device):
    """All but the tensor put last, which never left: the host's copy must not change with the original."""
    store = HostStore()
    first, second = tensors(device, 2)
    tickets = [store.put(first), store.put(second)]
    expected = first.clone()
    if device == "cuda":
        torch.cuda.synchronize()
    first.zero_()
    assert torch.equal(store.get(tickets[1]), second)
    assert torch.equal(store.get(tickets[0]), expected)


def test_a_ticket_of_an_earlier_forward_is_refused(device):
    store = HostStore()
    old = store.put(torch.ones(4, 4, device=device))
    store.clear()
    store.put(torch.zeros(4, 4, device=device))
    with pytest.raises(RuntimeError, match="before the next forward"):
        store.get(old)


def test_a_view_with_gaps_is_refused():
    with pytest.raises(ValueError, match="contiguous"):
        HostStore().put(torch.ones(4, 8)[:, ::2])


@pytest.mark.parametrize("nbytes", [1, SMALLEST_SLAB, 3 * SMALLEST_SLAB + 1, 21 << 30, 110 << 30])
def test_slabs_are_powers_of_two_and_waste_next_to_nothing(nbytes):
    sizes = slab_sizes(nbytes)
    assert all(size & (size - 1) == 0 for size in sizes)
    assert nbytes <= sum(sizes) < nbytes + SMALLEST_SLAB
    assert sizes == sorted(set(sizes), reverse=True)


def test_nothing_needs_no_slab():
    assert slab_sizes(0) == [] and slab_sizes(-5) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_do_not_pile_up_while_the_gpu_lags():
    """The host queues 40 layers while the GPU is still busy with something else; two tensors may be alive."""
    size = 32 * MIB
    store = HostStore()
    store.reserve(40 * size, torch.device("cuda"))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda._sleep(200_000_000)
    tickets = []
    for i in range(40):
        x = torch.full((size,), i, dtype=torch.uint8, device="cuda")
        tickets.append(store.put(x))
        del x
    assert torch.cuda.max_memory_allocated() - before <= 2 * size
    torch.cuda.reset_peak_memory_stats()
    for i, ticket in reversed(list(enumerate(tickets))):
        x = store.get(ticket)
        assert int(x[0]) == i and bool((x == i).all())
        del x
    # x, the one that comes, and the comparison's result
    assert torch.cuda.max_memory_allocated() - before <= 3 * size + MIB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_overlap_with_computing():
    """A product that takes longer than the copy hides it: under 10% slower than without the store."""
    store = HostStore()
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def run(*, offload: bool) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        store.clear()
        start.record()
        tickets = []
        for _ in range(16):
            if offload:
                tickets.append(store.put(x.clone()))
            a @ a
        for ticket in reversed(tickets) if offload else range(16):
            if offload:
                store.get(ticket)
            a @ a
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    run(offload=True)
    plain = min(run(offload=False) for _ in range(5))
    assert min(run(offload=True) for _ in range(5)) < 1.1 * plain


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("depth", [1, 2])
def test_capture_in_a_cuda_graph(depth):
    store = HostStore(depth=depth)
    x = torch.zeros(3, 1024, device="cuda")
    out = torch.zeros(3, 1024, device="cuda")

    def step() -> None:
        store.clear()
        tickets = [store.put(x * scale) for scale in (1.0, 2.0, 3.0)]
        total = torch.zeros_like(x)
        for ticket in reversed(tickets):
            total = total * 10 + store.get(ticket)
        out.copy_(total)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for value in (1.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert torch.equal(out, torch.full_like(out, 321 * value))
