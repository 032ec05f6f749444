"""The page of errors is what the results say, and nothing is missing in it."""

from __future__ import annotations

import json

from error_report import FAMILIES, PAGE, PICTURES, RESULTS, page
from test_every_type import KINDS

FOUND = json.loads(RESULTS.read_text(encoding="utf-8"))


def test_the_page_is_what_the_results_say():
    assert PAGE.read_text(encoding="utf-8") == page(FOUND), "run tests/export/error_report.py --page"


def test_every_kind_was_measured_on_random_and_on_trained_weights():
    rows = [row for row in FOUND["rows"] if "model" in row]
    for weights in ("random", "trained"):
        assert {row["kind"] for row in rows if row["weights"] == weights} == set(KINDS), "run `make export-errors`"


def test_every_family_was_measured():
    rows = FOUND["rows"]
    assert {row["family"] for row in rows if "family" in row} == set(FAMILIES)
    assert {row["pictures"] for row in rows if "pictures" in row} == set(PICTURES)


def test_the_larger_error_is_shown():
    rows = [{"model": name, "weights": weights, "kind": "gguf:q8_0", "relative_error": error, "mean_kl": 0.0, "positions": 4,
             "worst_weight_error": 0.005} for name, weights, error in
            (("a", "random", 0.03), ("b", "random", 0.04), ("a", "trained", 0.01), ("b", "trained", 0.002))]  # fmt: skip
    families = [{"family": name, "kind": "fp8", "relative_error": 0.1} for name in FAMILIES]
    pictures = [{"pictures": name, "kind": "mmproj:f16", "relative_error": 0.1, "another_picture": 0.8, "text_type": "f16"}
                for name in PICTURES]  # fmt: skip
    shown = page({**FOUND, "rows": [*rows, *families, *pictures]})
    assert "| q8_0 | 0.0400 | 0.0100 | 0.12 |" in shown and "| 3.0 |" in shown
