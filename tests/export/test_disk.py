"""The room an export needs is computed before it is made: what is missing, and the file itself."""

from __future__ import annotations

import math

import pytest
from dropforge.export import disk
from dropforge.export.safetensors_stream import index_folder
from dropforge.export.stage import Stage


@pytest.fixture
def stage(llama, tmp_path):
    return Stage(llama.request((), work=tmp_path / "work"), log=llama.log.append)


@pytest.fixture
def numbers(llama) -> int:
    return sum(math.prod(info.shape) for info in index_folder(llama.base).values())


def test_what_is_there_is_not_counted_again(stage, numbers):
    first = disk.needed_bytes(stage, "gguf:q8_0")
    assert first == int(numbers * (2 + 2 + 8.5 / 8)), "merged folder, 16-bit GGUF, and the file"
    stage._results["merged"] = object()
    assert disk.needed_bytes(stage, "gguf:q8_0") == int(numbers * (2 + 8.5 / 8))
    stage._results["base gguf"] = object()
    assert disk.needed_bytes(stage, "gguf:q8_0") == int(numbers * 8.5 / 8)
    assert disk.needed_bytes(stage, "gguf:q8_0:1MB") == int(numbers * 8.5 / 4), "the whole file, then its parts"
    assert numbers < disk.needed_bytes(stage, "fp8") < 2 * numbers
    assert (
        disk.needed_bytes(stage, "adapter") < disk.needed_bytes(stage, "merged_4bit") < disk.needed_bytes(stage, "fp8")
    )
    assert disk.needed_bytes(stage, "ollama") == 0


def test_a_failed_product_is_still_to_be_made(stage, numbers):
    from dropforge.errors import ExportError

    stage._results["merged"] = ExportError("no", code="export-merge-wrong")
    assert disk.needed_bytes(stage, "merged") == 2 * numbers


def test_the_estimate_is_about_what_is_written(exports, llama, stage):
    stage._results |= {"merged": object(), "base gguf": object()}
    for kind in ("gguf:q8_0", "gguf:q4_k_m"):
        size = exports["tiny-llama"][kind].bytes
        assert 0.7 * size < disk.needed_bytes(stage, kind) + 100_000 < 1.5 * size + 100_000


def test_an_export_is_refused_with_both_numbers(stage, monkeypatch):
    from dropforge.errors import EnvironmentFault

    monkeypatch.setattr(disk, "free_bytes", lambda path: disk.MARGIN)
    with pytest.raises(EnvironmentFault, match=r"too full for gguf:f16: 0\.\d\d GiB needed, 0\.06 GiB free") as error:
        disk.refuse_full_disk(stage, "gguf:f16")
    assert error.value.code == "export-disk"
