"""Two tiny models (SentencePiece and byte-level vocabularies), random adapters for them, and their exports, made once."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from dropforge.errors import EnvironmentFault
from dropforge.export import export_one
from dropforge.llama_cpp.locate import LlamaCpp, find_llama_cpp
from dropforge.paths import ResultFolder
from export_harness import Bench, memorise  # found through the line above

NAMES = ("tiny-llama", "tiny-qwen3")


@pytest.fixture(scope="session")
def llama_cpp() -> LlamaCpp:
    """The built tools. Without them the tests fail: a skipped verification would look like a passed one."""
    try:
        tools = find_llama_cpp()
        tools.tool("llama-server")
        tools.tool("llama-quantize")
        assert tools.converter.is_dir()
    except EnvironmentFault as fault:
        pytest.fail(f"these tests run llama.cpp's tools; build them with `make llama`\n{fault}", pytrace=False)
    return tools


@pytest.fixture(scope="session")
def benches(tmp_path_factory):
    """By model name: base, adapter and tokenizer folders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hints of the libraries at import; not what is tested
        return {name: Bench.make(name, tmp_path_factory.mktemp(name)) for name in NAMES}


@pytest.fixture(params=NAMES)
def bench(request, benches) -> Bench:
    return benches[request.param]


@pytest.fixture
def llama(benches) -> Bench:
    return benches["tiny-llama"]


@pytest.fixture
def qwen(benches) -> Bench:
    return benches["tiny-qwen3"]


@pytest.fixture(scope="session")
def exports(benches, llama_cpp):
    """By model name: the reports of a full export, by kind; files lie in the bench's result folder."""
    kinds = ("adapter", "merged", "gguf:f16", "gguf:bf16", "gguf:q8_0", "gguf:q4_k_m", "ollama")
    reports = {}
    for name, bench in benches.items():
        bench.result.path.mkdir()
        reports[name] = {kind: export_one(bench.stage, kind) for kind in kinds}
    return reports


@pytest.fixture(scope="session")
def memorised(benches, llama_cpp, tmp_path_factory):
    """A result folder of a fully trained tiny-llama that knows FACTS by heart, and its reports."""
    folder = tmp_path_factory.mktemp("memorised")
    bench = benches["tiny-llama"]
    memorise(bench, folder / "full")
    result = ResultFolder(folder / "result")
    reports = bench.export(
        ("merged", "ollama"), adapter=None, full=folder / "full", result=result, work=folder / "work",
        system='say """hi"""',
    )  # fmt: skip
    return result, reports
