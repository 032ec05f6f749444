"""How each family of models that read pictures puts one into a text, in transformers and in llama.cpp.

Only families that were tried are here, because a projector that nobody can check is not exported. Shapes: a picture of
[side, side] pixels is cut into patches of `patch` pixels, and `merge` x `merge` of them become one token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dropforge.errors import ExportError

ROW_END = "[IMG_BREAK]"
PATCHES = 8
"""Merged patches per side of the pictures that families of any picture size are tried with."""


@dataclass(frozen=True, kw_only=True)
class PictureFamily:
    """One family."""

    side: Callable[[Any, Any], int]
    """Of the model's config and its picture processor: a size of picture that neither runtime has to change."""
    text: Callable[[Any, Any, Any], str]
    """Of config, tokenizer and what the processor made: the text that stands for the picture in transformers."""
    around: tuple[str, str] = ("", "")
    """Text before and after a picture that llama.cpp does not write itself."""
    types: str = ""
    """The argument of forward that marks the picture's tokens."""
    shifted: Mapping[str, float] = field(default_factory=dict)
    """Tensors that the converter adds a number to, by the end of their names."""
    unused: tuple[str, ...] = ()
    """Parts of names of tensors that no picture runs through."""
    rotated: tuple[str, ...] = ()
    """Ends of names of matrices whose rows a GGUF holds in another order, as llama.cpp's rotation wants them: in each
    head row 2i + j of the file is row i + j n/2 of the model."""
    row_end: str = ""
    """The token between two rows of a picture, whose embedding is in the projector's file too."""


def image_token(config: Any) -> int:
    """Id of the token that stands for one piece of a picture."""
    found = getattr(config, "image_token_id", None)
    return int(config.image_token_index if found is None else found)


def _word(tokenizer: Any, token: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(token))


def _fixed_side(config: Any, processor: Any) -> int:
    return int(config.vision_config.image_size)


def _gemma3(config: Any, tokenizer: Any, found: Any) -> str:
    begin, end = _word(tokenizer, config.boi_token_index), _word(tokenizer, config.eoi_token_index)
    return f"\n\n{begin}{_word(tokenizer, image_token(config)) * config.mm_tokens_per_image}{end}\n\n"


def _qwen_side(config: Any, processor: Any) -> int:
    unit = int(config.vision_config.patch_size * config.vision_config.spatial_merge_size)
    least = math.ceil(math.sqrt(processor.size["shortest_edge"]) / unit)
    return unit * max(PATCHES, least)


def _qwen(config: Any, tokenizer: Any, found: Any) -> str:
    count = int(found["image_grid_thw"][0].prod()) // config.vision_config.spatial_merge_size**2
    begin, end = _word(tokenizer, config.vision_start_token_id), _word(tokenizer, config.vision_end_token_id)
    return f"{begin}{_word(tokenizer, image_token(config)) * count}{end}"


def _mistral3_side(config: Any, processor: Any) -> int:
    return int(config.vision_config.patch_size * config.spatial_merge_size) * PATCHES


def _mistral3(config: Any, tokenizer: Any, found: Any) -> str:
    unit = config.vision_config.patch_size * config.spatial_merge_size
    height, width = (int(extent) // unit for extent in found["image_sizes"][0])
    row = _word(tokenizer, image_token(config)) * width
    return ROW_END.join([row] * height) + "[IMG_END]"


_QWEN = PictureFamily(side=_qwen_side, text=_qwen, types="mm_token_type_ids")
FAMILIES: dict[tuple[str, str], PictureFamily] = {
    ("gemma3", "siglip_vision_model"): PictureFamily(
        side=_fixed_side, text=_gemma3, around=("\n\n", "\n\n"), types="token_type_ids",
        # Gemma's norms multiply by 1 + weight; the file holds the sum.
        shifted={"mm_soft_emb_norm.weight": 1.0}, unused=("vision_model.head.",),
    ),
    ("qwen2_5_vl", "qwen2_5_vl_vision"): _QWEN,
    ("mistral3", "pixtral"): PictureFamily(
        side=_mistral3_side, text=_mistral3, rotated=("q_proj.weight", "k_proj.weight"), row_end=ROW_END,
    ),
}  # fmt: skip
"""By `model_type` of the configuration and of its vision_config, as transformers' classes have it."""


def family_of(config: Any) -> PictureFamily:
    """The family of transformers' configuration. Raises ExportError (export-unsupported) for one that was not tried."""
    kind, tower = str(config.model_type), str(config.vision_config.model_type)
    if (kind, tower) not in FAMILIES:
        tried = ", ".join(f"{known} with {eye}" for known, eye in FAMILIES)
        raise without_projector(
            f"{kind} with {tower}", why=f"projectors of this kind were not tried yet (tried: {tried})"
        )
    return FAMILIES[kind, tower]


def without_projector(model: str, *, why: str) -> ExportError:
    """The refusal of a model whose projector cannot be exported."""
    return ExportError(
        f"the projector (mmproj) of {model} cannot be exported", code="export-unsupported", where="config.json",
        why=f"{why}; a GGUF without its projector would be half of what was trained",
        fix="leave gguf, mmproj and ollama out of `export`; adapter and merged hold everything",
    )  # fmt: skip
