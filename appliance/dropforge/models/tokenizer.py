"""Load a tokenizer that is fit to train a chat model: with a chat template and a pad token of its own."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.errors import DataError, ModelError
from dropforge.models.template_end import repair_end
from dropforge.models.templates import ALIASES, TEMPLATES, find_template, is_custom, parse_custom
from dropforge.models.templates.apply import apply_custom, apply_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens that published vocabularies set aside and that no text contains; the first one found becomes the pad token.
PAD_CANDIDATES = (
    "<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<|vision_pad|>", "<|fim_pad|>",
    "<|endoftext|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<SPECIAL_10>", "<unused0>", "<unk>",
)  # fmt: skip
NEW_PAD = "<|pad|>"


@dataclass(frozen=True, kw_only=True)
class TemplateChoice:
    """Which chat template is used and what had to be repaired. Goes into the data report and the provenance."""

    name: str
    """`model` for the model's own template, else a name of TEMPLATES."""
    reason: str
    repairs: tuple[str, ...] = ()
    added_tokens: tuple[str, ...] = ()
    """Tokens the vocabulary did not have: the embedding must grow if len(tokenizer) exceeds config.vocab_size."""


def load_tokenizer(path: Path, *, template: str = "auto") -> tuple[PreTrainedTokenizerBase, TemplateChoice]:
    """The tokenizer in folder `path` with a usable chat template, right-padding, and pad different from eos.

    `template` is `auto` (the model's own, else ChatML) or a name. Never runs code from the folder. Raises ModelError
    (tokenizer-unreadable, tokenizer-slow) or DataError (template-unknown).
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            "the tokenizer cannot be read", code="tokenizer-unreadable", where=str(path), why=str(error).split("\n")[0],
            fix="copy the tokenizer's files of the model again; tokenizer.json is the one that matters",
        ) from error  # fmt: skip
    if not tokenizer.is_fast:
        raise ModelError(
            "the tokenizer has no tokenizer.json",
            code="tokenizer-slow",
            where=str(path),
            why="masks are made from character positions, which only the tokenizers library gives",
            fix="use a version of the model that has tokenizer.json",
        )
    tokenizer.padding_side = "right"
    name, reason, repairs = _choose_template(tokenizer, template)
    end_repair = repair_end(tokenizer) if name == "model" else []
    pad_repair, added = _repair_pad(tokenizer)
    choice = TemplateChoice(name=name, reason=reason, repairs=(*repairs, *end_repair, *pad_repair), added_tokens=added)
    return tokenizer, choice


def use_template(tokenizer: PreTrainedTokenizerBase, name: str, **options: Any) -> tuple[str, ...]:
    """Give a loaded tokenizer another chat template, by name or as an example with {INPUT} and {OUTPUT}.

    `options` are those of `apply_template`. Returns what had to be repaired. Raises DataError (template-unknown,
    template-invalid).
    """
    return tuple(_choose_template(tokenizer, name, **options)[2])


def _choose_template(tokenizer: PreTrainedTokenizerBase, wanted: str, **options: Any) -> tuple[str, str, list[str]]:
    if wanted == "auto" and tokenizer.chat_template:
        return "model", "the model brings its own chat template", []
    if wanted == "auto":
        repairs = apply_template(tokenizer, TEMPLATES["chatml"], **options)
        return "chatml", "the model brings no chat template, so ChatML is used", repairs
    if is_custom(wanted):
        try:
            custom = parse_custom(wanted)
            also = options.get("extra_ends", ())
            repairs = apply_custom(tokenizer, custom, system=options.get("system"), extra_ends=also)
        except ValueError as error:
            raise DataError(
                "the chat template cannot be understood", code="template-invalid", where="data.template",
                why=str(error), fix="write an example conversation with {INPUT} and {OUTPUT} in place of the texts",
            ) from error  # fmt: skip
        return "custom", "written out in data.template", repairs
    template = find_template(wanted)
    if template is None:
        names = sorted([*TEMPLATES, *ALIASES])
        nearest = difflib.get_close_matches(wanted, names, n=1)
        raise DataError(
            f"there is no chat template {wanted[:60]!r}",
            code="template-unknown",
            where="data.template",
            fix=(f"did you mean {nearest[0]}? " if nearest else "") + f"Known: auto, {', '.join(names)}",
        )
    return template.name, "named in data.template", apply_template(tokenizer, template, **options)


def _repair_pad(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], tuple[str, ...]]:
    """A pad equal to eos would be masked out of the loss by many collators, and the model would never learn to stop."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return [], ()
    was = "missing" if tokenizer.pad_token_id is None else f"the end token {tokenizer.eos_token!r}"
    vocabulary = tokenizer.get_vocab()
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    for candidate in PAD_CANDIDATES:
        if candidate in vocabulary and candidate not in taken:
            tokenizer.pad_token = candidate
            return [f"pad token was {was}, now {candidate!r} of the vocabulary"], ()
    tokenizer.add_special_tokens({"pad_token": NEW_PAD})
    return [f"pad token was {was}, now {NEW_PAD!r}, added to the vocabulary"], (NEW_PAD,)
