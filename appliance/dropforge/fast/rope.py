"""Positions beyond those a model was made for: refused, or reached by scaling its rotary embedding.

Scaling types and their keys are transformers' (modeling_rope_utils): linear (Chen et al. 2023), dynamic, yarn (Peng et
al. 2023), llama3, longrope.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dropforge.errors import CommandError

TYPES = ("linear", "dynamic", "yarn", "llama3", "longrope")
KEPT = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
"""What belongs to the model and not to a scaling of it."""
FULL = "full_attention"


def known_length(config: Any) -> int | None:
    """How many positions the model reaches as it is; None where it has no limit of its own."""
    text = config.get_text_config()
    known = getattr(text, "max_position_embeddings", None)
    if not isinstance(known, int):
        return None
    rope = _rope(text) or {}
    if rope.get("rope_type") == "dynamic":
        return int(known * rope.get("factor", 1))
    return known


def check_length(config: Any, *, max_seq_length: int, rope_scaling: Mapping[str, Any] | None) -> None:
    """`max_seq_length` must lie within what the model was made for, unless its positions are scaled far enough.

    Raises CommandError: api-length, api-rope-scaling.
    """
    if isinstance(max_seq_length, bool) or not isinstance(max_seq_length, int) or max_seq_length < 1:
        raise CommandError(
            f"max_seq_length cannot be {max_seq_length!r}", code="api-length", where="max_seq_length",
            fix="write a whole number of at least 1, such as 2048",
        )  # fmt: skip
    known = known_length(config)
    if rope_scaling is not None:
        _check_scaling(config, rope_scaling, known=known, max_seq_length=max_seq_length)
        return
    if known is None or max_seq_length <= known:
        return
    raise CommandError(
        f"max_seq_length={max_seq_length} is more than the {known} positions this model knows",
        code="api-length",
        where="max_seq_length",
        why="positions it never saw come out as noise unless the rotary embedding is scaled",
        fix=f"use max_seq_length={known}, or pass "
        f"rope_scaling={{'rope_type': 'linear', 'factor': {max_seq_length / known:g}}}",
    )


def _check_scaling(config: Any, scaling: Mapping[str, Any], *, known: int | None, max_seq_length: int) -> None:
    kind = scaling.get("rope_type", scaling.get("type"))
    factor = scaling.get("factor")
    if _rope(config.get_text_config()) is None:
        raise _bad("this model has no rotary embedding, so its positions cannot be scaled", fix="leave it out")
    if kind not in TYPES:
        raise _bad(f"rope_scaling has no known rope_type: {kind!r}", fix=f"one of {', '.join(TYPES)}")
    if kind == "longrope":
        return
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or factor < 1:
        raise _bad(
            f"the factor of rope_scaling must be a number of at least 1, not {factor!r}", fix="see the model's page"
        )
    already = factor / _gain(config.get_text_config(), scaling)
    if known is not None and max_seq_length > known * factor / already:
        raise CommandError(
            f"max_seq_length={max_seq_length} is beyond the {int(known * factor / already)} positions that "
            f"a factor of {factor:g} reaches",
            code="api-length", where="max_seq_length, rope_scaling",
            fix=f"use a factor of at least {max_seq_length / known * already:g}, or a smaller max_seq_length",
        )  # fmt: skip


def _gain(text: Any, scaling: Mapping[str, Any]) -> float:
    """By how much the known length grows. A model that is scaled this way already counts its factor from the start."""
    rope = _rope(text) or {}
    same = rope.get("rope_type") == scaling.get("rope_type", scaling.get("type"))
    return float(scaling["factor"]) / float(rope.get("factor", 1.0) if same else 1.0)


def _bad(what: str, *, fix: str) -> CommandError:
    return CommandError(what, code="api-rope-scaling", where="rope_scaling", fix=fix)


def scale_positions(config: Any, scaling: Mapping[str, Any]) -> str:
    """Write the checked scaling into a model's config, before its weights are loaded. Returns a sentence about it.

    The base frequency stays the model's own. Models with several rotary embeddings (sliding and full attention) are
    scaled where the whole row is seen.
    """
    text = config.get_text_config()
    rope = _rope(text)
    assert rope is not None, "checked before"
    known = text.max_position_embeddings
    gain = _gain(text, scaling) if "factor" in scaling else 1.0
    was = rope.get("rope_type", "default")
    new = {key: rope[key] for key in KEPT if key in rope}
    new |= {("rope_type" if key == "type" else key): value for key, value in scaling.items()}
    if new["rope_type"] in ("yarn", "llama3", "longrope"):
        new.setdefault("original_max_position_embeddings", rope.get("original_max_position_embeddings", known))
    if new["rope_type"] == "llama3":
        new = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | new
    if FULL in text.rope_parameters:
        text.rope_parameters = {**text.rope_parameters, FULL: new}
    else:
        text.rope_parameters = new
    if new["rope_type"] != "dynamic":  # which measures its factor from this number
        text.max_position_embeddings = int(known * gain)
    replaced = "" if was == "default" else f", in place of the model's own {was} scaling"
    return f"rotary embedding scaled: {new['rope_type']}, factor {new.get('factor', 'as listed')}{replaced}"


def _rope(text: Any) -> dict[str, Any] | None:
    parameters = getattr(text, "rope_parameters", None)
    if not parameters:
        return None
    found = parameters.get(FULL, parameters)
    return dict(found) if found else None
