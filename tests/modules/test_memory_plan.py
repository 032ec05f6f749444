"""The planner's promises, for models and cards of every size: what fits is never exceeded, more memory is never slower."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest
from dropforge_kernels.modules.head_pieces import head_pieces
from dropforge_kernels.modules.memory_peak import Counts, peak
from dropforge_kernels.modules.memory_plan import (
    GIB,
    MemoryPlan,
    extra_work,
    longest_tokens,
    plan_memory,
    step_back,
    tiles_for,
)
from dropforge_kernels.modules.model_shape import ModelShape, Training, Work, model_shape
from dropforge_kernels.modules.policy import Keep
from hypothesis import given, settings
from hypothesis import strategies as st

LLAMA_8B = ModelShape(
    layers=32, hidden=4096, intermediate=14336, queries=4096, keys=1024, heads=32, vocabulary=128256
)  # fmt: skip
QWEN_06B = ModelShape(
    layers=28, hidden=1024, intermediate=3072, queries=2048, keys=1024, heads=16, vocabulary=151936, tied=True,
    head_norms=True,
)  # fmt: skip
GEMMA_4B = ModelShape(
    layers=34, hidden=2560, intermediate=10240, queries=2048, keys=1024, heads=8, vocabulary=262208, tied=True,
    head_norms=True, end_norms=True,
)  # fmt: skip
SHAPES = (LLAMA_8B, QWEN_06B, GEMMA_4B)

requests = st.fixed_dictionaries(
    {
        "shape": st.sampled_from(SHAPES),
        "training": st.builds(
            Training.of_rank, st.sampled_from([0, 8, 64]), weights=st.sampled_from(["nf4", "bf16"]),
            gradients_stay=st.booleans(),
        ),
        "tokens": st.integers(1, 300_000),
        "budget": st.integers(1 * GIB, 200 * GIB),
        "host": st.integers(0, 200 * GIB),
    }
)  # fmt: skip


def plan(**fields) -> MemoryPlan:
    return plan_memory(fields.pop("shape"), fields.pop("training"), **fields)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(requests)
def test_what_fits_is_never_exceeded(fields):
    made = plan(**fields)
    assert len(made.policies) == fields["shape"].layers
    assert made.fits == (made.predicted_peak <= fields["budget"] * 0.97)
    assert made.host_bytes <= fields["host"]
    assert made.mlp_tile is None or made.mlp_tile < fields["tokens"]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(requests, st.floats(1.01, 3.0))
def test_more_memory_is_never_slower(fields, factor):
    small = plan(**fields)
    large = plan(**{**fields, "budget": int(fields["budget"] * factor)})
    assert large.fits or not small.fits
    if small.fits:
        assert large.extra_work <= small.extra_work


@settings(max_examples=12, deadline=None, derandomize=True)
@given(requests)
def test_more_host_memory_is_never_slower(fields):
    made, more = plan(**fields), plan(**{**fields, "host": 2 * fields["host"] + GIB})
    assert more.fits or not made.fits
    if made.fits:
        assert more.extra_work <= made.extra_work


@settings(max_examples=12, deadline=None, derandomize=True)
@given(requests)
def test_the_last_layers_are_kept_first(fields):
    order = [Keep.OFFLOAD, Keep.OFFLOAD_OUTPUT, Keep.NONE, Keep.OUTPUT, Keep.ATTENTION, Keep.ALL]
    places = [order.index(policy) for policy in plan(**fields).policies]
    assert places == sorted(places)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(requests)
def test_stepping_back_needs_less_or_says_that_nothing_does(fields):
    made = plan(**fields)
    try:
        smaller = step_back(made)
    except ValueError as error:
        assert "per_device_train_batch_size" in str(error)
        least = plan(**{**fields, "budget": 1})
        assert least.predicted_peak >= made.predicted_peak * 0.875
    else:
        assert smaller.predicted_peak < made.predicted_peak
        assert smaller.extra_work >= made.extra_work
        assert "stepping back" in smaller.lines()[0]


def test_stepping_back_ends():
    made, steps = plan_memory(LLAMA_8B, Training.of_rank(32), tokens=16384, budget=130 * GIB, host=64 * GIB), 0
    with pytest.raises(ValueError, match="nothing needs less"):
        while True:
            made, steps = step_back(made), steps + 1
    assert 3 <= steps <= 20
    assert made.policies[0] is Keep.OFFLOAD and made.predicted_peak < 20 * GIB


@pytest.mark.parametrize(("shape", "weights"), list(product(SHAPES, ["nf4", "bf16"])))
def test_the_peak_grows_with_what_is_kept_and_with_tokens(shape, weights):
    training, layers = Training.of_rank(16, weights=weights), shape.layers
    ladder = [
        Counts(offload=layers),
        Counts(recompute=layers),
        Counts(output=layers),
        Counts(attention=layers),
        Counts(keep=layers),
    ]
    for tokens in (4096, 65536):
        peaks = [peak(shape, training, counts, tokens=tokens, tile=None).total for counts in ladder]
        assert peaks == sorted(peaks) and len(set(peaks)) == 5
    for counts in ladder:
        assert (
            peak(shape, training, counts, tokens=8192, tile=None).total
            < peak(shape, training, counts, tokens=16384, tile=None).total
        )


def test_tiles_save_memory_where_the_mlp_is_computed_again():
    counts, training = Counts(recompute=32), Training.of_rank(16)
    whole, tiled = (
        peak(LLAMA_8B, training, counts, tokens=131072, tile=tile, row=131072).total for tile in (None, 8192)
    )
    assert tiled < whole - 4 * GIB
    assert tiles_for(4096) == (None, 2048, 1024) and tiles_for(100) == (None,)


def test_the_known_sizes_of_an_8b_model():
    """Numbers that can be worked out by hand: 6.98 G values in the layers, 2.95 MiB kept per token, 42 M adapters."""
    assert LLAMA_8B.layers * LLAMA_8B.layer_values == pytest.approx(6.98e9, rel=1e-3)
    assert Training.of_rank(16).trained_values(LLAMA_8B) == 41_943_040
    assert Training.of_rank(16, weights="nf4").weight_bytes(LLAMA_8B) == pytest.approx(5.3 * GIB, rel=0.01)
    keep = Counts(keep=32)
    more, less = (peak(LLAMA_8B, Training(), keep, tokens=n, tile=None).total for n in (16384, 8192))
    # x and y 2 H, q k v 1.5 H, attention's output H, gate and up 7 H, in 2 bytes, log-sum-exp; then one layer's work
    kept = 32 * (2 * (2 * 4096 + 6144 + 4096 + 28672) + 128)
    assert kept < (more - less) / 8192 < kept * 1.05


def test_everything_is_kept_on_a_large_card_and_nothing_on_a_small_one():
    large = plan_memory(LLAMA_8B, Training.of_rank(32, weights="nf4"), tokens=16384, budget=138 * GIB, host=100 * GIB)
    assert set(large.policies) == {Keep.ALL} and large.extra_work == 0 and large.host_bytes == 0
    small = plan_memory(
        LLAMA_8B, Training.of_rank(16, weights="nf4"), tokens=2048, budget=int(7.4 * GIB), host=16 * GIB
    )
    assert small.fits and small.predicted_peak < 7.4 * GIB
    assert 0.2 < small.extra_work < 0.5


def test_what_does_not_fit_says_what_would():
    made = plan_memory(LLAMA_8B, Training.of_rank(16, weights="nf4"), tokens=200_000, budget=10 * GIB, host=0)
    assert not made.fits
    text = made.lines()[-1]
    longest = longest_tokens(replace(made.request, document=200_000))
    assert f"{longest:,} tokens" in text and 2048 < longest < 200_000
    assert plan_memory(LLAMA_8B, Training.of_rank(16, weights="nf4"), tokens=longest, budget=10 * GIB).fits
    assert not plan_memory(LLAMA_8B, Training.of_rank(16, weights="nf4"), tokens=longest + 512, budget=10 * GIB).fits
    nothing = plan_memory(LLAMA_8B, Training.of_rank(16), tokens=2048, budget=8 * GIB)
    assert "nf4" in nothing.lines()[-1]


def test_what_is_resident_counts_instead_of_the_guess():
    training = Training.of_rank(16)
    guess = plan_memory(LLAMA_8B, training, tokens=4096, budget=100 * GIB)
    resident = guess.predicted.weights + 6 * training.trained_values(LLAMA_8B) + 3 * GIB
    found = plan_memory(LLAMA_8B, training, tokens=4096, budget=100 * GIB, resident=resident)
    assert found.predicted_peak - guess.predicted_peak == 3 * GIB


def test_the_lines_tell_every_run_of_layers():
    made = plan_memory(LLAMA_8B, Training.of_rank(32, weights="nf4"), tokens=16384, budget=23 * GIB, host=64 * GIB)
    text = "\n".join(made.lines())
    assert "layers 1 to " in text and " 32: everything kept" in text and "host memory" in text
    assert "computing again adds about" in text and f"{made.predicted_peak / GIB:.1f} GiB" in text


def test_extra_work_of_full_recomputation_is_about_a_third():
    counts = Counts(recompute=32)
    assert 0.25 < extra_work(LLAMA_8B, counts, None, document=512) < 0.4
    long, short = Work.of(LLAMA_8B, document=131072), Work.of(LLAMA_8B, document=512)
    assert long.gate_up == short.gate_up and long.scores == 256 * short.scores


def test_long_sequences_run_attention_once():
    """128K tokens on 40 GiB: inputs and attention's outputs go to the host rather than that attention runs twice."""
    made = plan_memory(LLAMA_8B, Training.of_rank(32, weights="nf4"), tokens=131072, budget=36 * GIB, host=100 * GIB)
    assert made.fits and made.policies.count(Keep.OFFLOAD_OUTPUT) > 20 and made.store_depth == 2
    assert made.extra_work < 0.5 * extra_work(LLAMA_8B, Counts(recompute=32), None, document=131072)
    short = plan_memory(
        LLAMA_8B, Training.of_rank(32, weights="nf4"), tokens=131072, document=512, budget=36 * GIB, host=100 * GIB
    )
    assert Keep.OFFLOAD_OUTPUT not in short.policies and short.store_depth == 1


@pytest.mark.parametrize(
    ("card", "tokens", "offloaded"),
    [(24, 100_096, 28), (24, 179_200, 28), (37, 131_072, 26), (80, 400_128, 24), (80, 500_224, 20), (139, 131_072, 0)],
)
def test_long_documents_fit_the_cards_they_are_promised_for(card, tokens, offloaded):
    """Llama-8B in NF4, one document, 100 GiB of a 128 GiB host; the card less the CUDA context."""
    training, budget = Training.of_rank(32, weights="nf4"), int((card - 0.65) * GIB)
    made = plan_memory(LLAMA_8B, training, tokens=tokens, budget=budget, host=100 * GIB)
    assert made.fits and made.predicted_peak < 0.97 * budget and made.host_bytes <= 100 * GIB
    assert sum(policy.on_host for policy in made.policies) >= offloaded
    assert made.extra_work < 0.3


def test_peaks_at_long_lengths_worked_out_by_hand():
    """Inputs and attention's outputs on the host, 128K tokens, MLP in tiles of 16,384; in units of T H 2 bytes.

    Worst is attention's backward: the gradient that comes in and dy (2), x and the two tensors on their way (3), q k v,
    output, low-rank products (2.53), d output and d qkv (2.5), of cuDNN's 5.5 a quarter, log-sum-exp of all layers.
    """
    tokens, unit = 131072, 131072 * 4096 * 2
    counts = Counts(offload_output=31, output=1)
    found = peak(LLAMA_8B, Training.of_rank(32, weights="nf4"), counts, tokens=tokens, tile=16384, row=tokens)
    units = (found.activations - 32 * 32 * 4 * tokens) / unit
    assert units == pytest.approx(2 + 3 + 2.53 + 2.5 + 5.5 / 4, abs=0.1)
    assert found.host == 62 * unit


@pytest.mark.parametrize(
    ("heads", "groups", "tokens", "pieces"),
    [
        (32, 8, 65535, 1),
        (32, 8, 65536, 4),
        (32, 32, 131072, 4),
        (16, 8, 131072, 2),
        (8, 2, 131072, 1),
        (28, 4, 131072, 2),
    ],
)
def test_heads_are_split_evenly_and_not_too_finely(heads, groups, tokens, pieces):
    assert head_pieces(heads, groups, tokens) == pieces
    assert groups % pieces == 0 and heads // pieces >= min(heads, 8)


def test_shapes_from_configurations():
    config = {
        "model_type": "qwen3", "num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 3072,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": True,
    }  # fmt: skip
    assert model_shape(config) == QWEN_06B
    assert model_shape({"text_config": config}) == QWEN_06B
    without = {key: value for key, value in config.items() if key not in ("head_dim", "num_key_value_heads")}
    assert model_shape(without).keys == 1024 and model_shape(without).queries == 1024
    with pytest.raises(ValueError, match="intermediate_size"):
        model_shape({key: value for key, value in config.items() if key != "intermediate_size"})


@pytest.mark.parametrize(
    ("fields", "splits"),
    [
        ({}, True),
        ({"sliding_window": None}, True),
        ({"sliding_window": 4096}, False),
        ({"sliding_window": 4096, "use_sliding_window": False}, True),
        ({"attn_logit_softcapping": 50.0}, False),
        ({"head_dim": 256}, False),
    ],
)
def test_only_plain_attention_is_split_into_pieces(fields, splits):
    config = {
        "num_hidden_layers": 2, "hidden_size": 4096, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 1000, **fields,
    }  # fmt: skip
    shape = model_shape(config)
    assert shape.splits_heads == splits
    options = {"tokens": 131072, "tile": 2048}
    split, whole = (
        peak(shape, Training.of_rank(8), Counts(offload=2), row=row, **options).total for row in (131072, 0)
    )
    assert (split < whole) == splits


@pytest.mark.parametrize("fields", [{"tokens": 0, "budget": GIB}, {"tokens": 5, "budget": 0}])
def test_bad_numbers_are_refused(fields):
    with pytest.raises(ValueError, match="must be positive"):
        plan_memory(LLAMA_8B, Training(), **fields)
    with pytest.raises(ValueError, match="nf5"):
        Training(weights="nf5")
    with pytest.raises(ValueError, match="qkv"):
        Training(ranks={"qkv": 4})


def test_planning_needs_no_torch():
    code = "import sys, dropforge_kernels.modules.memory_plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("tokens", [256, 4096, 100_000])
def test_a_tiled_mlp_is_tiled_also_where_there_is_room(tokens):
    asked = {"shape": LLAMA_8B, "training": Training.of_rank(16), "tokens": tokens, "budget": 600 * GIB}
    free, forced = plan(**asked), plan(**asked, tiled=True)
    assert set(free.policies) == {Keep.ALL} and free.mlp_tile is None
    assert Keep.ALL not in forced.policies and forced.mlp_tile is not None and forced.fits
    assert forced.predicted_peak <= free.predicted_peak
    assert step_back(forced).mlp_tile is not None and Keep.ALL not in step_back(forced).policies


def test_an_embedding_on_the_host_is_not_counted():
    training = Training.of_rank(16)
    here, there = training.weight_bytes(LLAMA_8B), replace(training, embedding_on_host=True).weight_bytes(LLAMA_8B)
    assert here - there == 2 * LLAMA_8B.vocabulary * LLAMA_8B.hidden
    tied = replace(LLAMA_8B, tied=True)
    assert replace(training, embedding_on_host=True).weight_bytes(tied) == training.weight_bytes(tied)
