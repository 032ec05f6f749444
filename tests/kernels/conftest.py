"""Where the kernel tests run: Triton's interpreter on the CPU by default, the GPU with ``-m gpu``.

``device`` gives each test both: "cpu" (small shapes, kernels forced through the interpreter) and "cuda" (marked gpu,
the full grid).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()

if not HAS_CUDA:
    if "dropforge_kernels.ops" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "dropforge_kernels.ops was imported before TRITON_INTERPRET=1 was set; set it in the environment"
        )
    # Triton looks at this when a kernel is defined, so it must be set before the first import of
    # dropforge_kernels.ops.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def loops_in_the_interpreter() -> Iterator[None]:
    """Kernels may loop over a run-time count."""
    if HAS_CUDA:
        yield
        return
    from dropforge_kernels.testing import interpreted_loops

    with interpreted_loops():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked gpu where there is no CUDA device."""
    if HAS_CUDA:
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of a kernel test; on "cpu" every operation of the test runs its Triton kernel in the interpreter."""
    from dropforge_kernels.dispatch import Backend, forced

    if request.param == "cuda":
        yield "cuda"
        return
    if HAS_CUDA:
        pytest.skip("the interpreter is for machines without CUDA; kernels are compiled here")
    with forced(Backend.TRITON):
        yield "cpu"
