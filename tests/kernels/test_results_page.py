"""The pages of measured speed say what the results file says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "kernels" / "benchmarks"
RESULTS = BENCHMARKS / "results"
PAGES = [ROOT / "docs" / "reference" / name for name in ("kernels.md", "kernels-losses.md")]

YOUNGER = {
    "packed_attention",
    "relu_squared",
    "steady",
}  # operations younger than the file; the next run of `make bench` empties this


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _tables

    yield _tables
    for name in ("_tables", "_report"):
        sys.modules.pop(name, None)


@pytest.fixture
def rows(tables):
    """The rows of the file that the pages are made of."""
    found = tables.cases(results_of(PAGES[0].read_text()))
    return [row for providers in found.values() for same in providers.values() for row in same]


def results_of(page):
    """The file of the page's tables; other measurements have a word after the GPU's name."""
    (name,) = set(re.findall(r"results/([\w.-]+-h200\.csv)", page))
    return RESULTS / name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_table_is_that_of_the_file(tables, path):
    page = path.read_text()
    results = results_of(page)
    assert len(tables.MARKED.findall(page)) >= 4
    assert tables.fill(page, results) == page, f"python kernels/benchmarks/runner.py docs {results.relative_to(ROOT)}"
    number = re.search(r"(?<=\| )[\d,]+\.\d(?= \|)", page)
    changed = page.replace(number[0], "999.9")
    assert tables.fill(changed, results) == page


def test_the_file_is_of_one_clean_commit_which_the_pages_name(rows):
    (commit,) = {row["commit"] for row in rows}
    assert re.fullmatch(r"[0-9a-f]{7,40}", commit), f"{commit}: uncommitted changes were measured"
    assert len({results_of(path.read_text()) for path in PAGES}) == 1
    for path in PAGES:
        page = path.read_text()
        assert f"commit {commit}" in page.replace("Commit", "commit")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_other_files_of_a_page_are_there_and_name_a_commit(path):
    page = path.read_text()
    for name in set(re.findall(r"results/([\w.-]+\.csv)", page)) - {results_of(page).name}:
        lines = (RESULTS / name).read_text().splitlines()
        commits = {line.rsplit(",", 1)[1] for line in lines[1:]}
        assert len(commits) == 1
        assert f"commit {commits.pop()}" in page


def test_what_failed_its_parity_check_has_no_speed(rows):
    for row in rows:
        if row["status"] != "ok":
            assert not row["gpu_us"]
        elif row["provider"] == "ours":
            assert float(row["gpu_us"]) > 0


def test_every_benchmarked_model_and_peer_is_there(rows):
    assert {"llama-8b", "qwen3-0.6b", "gemma-3-4b"} <= {row["shape"] for row in rows}
    assert {"ours", "torch", "compile", "liger", "unsloth", "copy"} <= {row["provider"] for row in rows}
    files = {path.stem for path in BENCHMARKS.glob("*.py") if not path.stem.startswith("_")} - {"runner"} - YOUNGER
    measured = {row["op"] for row in rows}
    missing = {f for f in files if not any(op.startswith(f) or f == "qk_norm" for op in measured)}
    assert not missing


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_pictures_are_of_the_same_run(path):
    page = path.read_text()
    pictures = re.findall(r"results/([\w.-]+\.png)", page)
    assert pictures
    for name in pictures:
        assert name.startswith(results_of(page).stem)
        assert (RESULTS / name).is_file()
