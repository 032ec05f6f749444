"""The numbers an export is judged by."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dropforge.export.compare import agreement
from dropforge.export.tolerances import bounds
from dropforge.export_kinds import GGUF_TYPES


def logprobs(seed: int, positions: int = 6, vocabulary: int = 200) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(positions, vocabulary)) * 3
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)


def test_equal_is_zero():
    truth = logprobs(0)
    found = agreement([truth], [truth.copy()])
    assert (found.relative_error, found.mean_kl, found.top1, found.positions) == (0.0, 0.0, 1.0, 6)


def test_unrelated_is_about_the_square_root_of_two():
    found = agreement([logprobs(0)], [logprobs(1)])
    assert found.relative_error == pytest.approx(math.sqrt(2), rel=0.1)
    assert found.mean_kl > 1
    assert found.top1 < 0.5


def test_kl_is_the_textbook_value():
    truth, other = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.25, 0.5]])
    assert agreement([truth], [other]).mean_kl == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))


def test_unlisted_tokens_count_as_one():
    truth, other = logprobs(0), logprobs(2)
    partly = other.copy()
    order = np.argsort(other, axis=-1)[:, :-20]
    np.put_along_axis(partly, order, np.nan, axis=-1)
    whole, part = agreement([truth], [other]), agreement([truth], [partly])
    assert 0 < part.mean_kl <= whole.mean_kl
    assert part.top1 == whole.top1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_runtime_that_computes_nothing_is_infinitely_far(bad):
    truth = logprobs(0)
    other = truth.copy()
    if math.isnan(bad):
        other[2] = bad
    else:
        other[2, 5] = bad
    assert agreement([truth], [other]).relative_error == math.inf


def test_nothing_compared_is_not_agreement():
    found = agreement([], [])
    assert found.relative_error == math.inf and found.top1 == 0.0


def test_every_type_has_bounds_that_tell_it_from_an_unrelated_model():
    for name in GGUF_TYPES:
        limit = bounds(name)
        assert limit.relative_error < 1.4 or name.startswith(("tq", "iq2", "iq1")), name
