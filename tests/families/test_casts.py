"""Adapter matrices in the compute dtype: the values of their masters, in few launches however many layers there are."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Counts the operations that would launch something."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ not in ("detach", "view", "slice", "alias"):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def projections(*shapes, scale=1.0, inputs=12):
    from dropforge_kernels.modules.adapters import Adapted

    def matrix(*size):
        return torch.nn.Parameter(torch.randn(size))

    return tuple(
        Adapted(
            outputs=outputs, bias=None, a=matrix(rank, inputs) if rank else None,
            b=matrix(outputs, rank) if rank else None, scale=scale,
        )
        for outputs, rank in shapes
    )  # fmt: skip


def check(group, made):
    """Every block holds its master's values, and nothing lies beside them."""
    expected = torch.zeros_like(group.b)
    for part, projection in zip(group.parts, made, strict=True):
        if part.adapted:
            a = projection.a.detach().to(group.a.dtype) * part.scale
            torch.testing.assert_close(group.a[part.ranks], a, rtol=0, atol=0)
            expected[part.columns, part.ranks] = projection.b.detach().to(expected.dtype)
    torch.testing.assert_close(group.b, expected, rtol=0, atol=0)


def test_blocks_hold_their_masters_and_zeros_elsewhere():
    from dropforge_kernels.modules.adapters import Casts

    torch.manual_seed(0)
    layers, kinds = 3, (((8, 2), (4, 2), (4, 3)), ((12, 2),), ((20, 2), (20, 0)), ((8, 0), (4, 2), (4, 0)))
    casts = Casts(torch.bfloat16, layers=layers)
    made = [projections(*kind, scale=1.5) for _ in range(layers) for kind in kinds]
    groups = [casts.group(one) for one in made]
    for _ in range(2):
        casts.refresh()
        for group, one in zip(groups, made, strict=True):
            check(group, one)
        for one in made:
            for projection in one:
                if projection.a is not None:
                    projection.a.data, projection.b.data = projection.a.data * 2, projection.b.data - 1
    assert casts.group(projections((5, 0))).b is None


def test_more_alike_groups_than_layers_go_into_a_second_stack():
    from dropforge_kernels.modules.adapters import Casts

    casts = Casts(torch.float32, layers=2)
    made = [projections((8, 2), (4, 2)) for _ in range(5)]
    groups = [casts.group(one) for one in made]
    casts.refresh()
    for group, one in zip(groups, made, strict=True):
        check(group, one)


def test_launches_do_not_grow_with_the_layers():
    from dropforge_kernels.modules.adapters import Casts

    counts = []
    for layers in (2, 20):
        casts = Casts(torch.bfloat16, layers=layers)
        for _ in range(layers):
            for kind in (((8, 2), (4, 2), (4, 2)), ((12, 2),), ((20, 2), (20, 2)), ((12, 2),)):
                casts.group(projections(*kind))
        with Calls() as calls:
            casts.refresh()
        assert calls.names.count("_foreach_copy_") == 1
        counts.append(len(calls.names))
    assert counts[0] == counts[1] == 1 + 2 * 5, "one for all dense copies, two for each of q, k, v, gate and up"
