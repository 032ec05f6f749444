"""The tokenizers of the builtin models, trained on builtin_corpus.txt. Same text in, same bytes out.

Both are exact in llama.cpp too: the Llama kind through its tokenizer.model, the Qwen kind because its pre-tokenizer
is Qwen2's.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from dropforge.models.sentencepiece_file import byte_piece
from dropforge.models.templates import TEMPLATES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCAB_SIZE = 1536
MAX_LENGTH = 2048

# Order is the order of ids. <pad> is its own token: a pad that equals the end token would be masked out of the loss.
LLAMA_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# Qwen2's published split pattern; llama.cpp knows it under the name "qwen2".
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def corpus() -> str:
    """The text both tokenizers are trained on."""
    return files("dropforge.models").joinpath("builtin_corpus.txt").read_text(encoding="utf-8")


def llama_tokenizer() -> PreTrainedTokenizerBase:
    """SentencePiece-type BPE with byte fallback, without a space prefix; adds bos <s>, the end token is <|im_end|>.

    No prefix, because with one llama.cpp puts a space after every special token while the Hugging Face tokenizer
    puts it only at the start of the text.
    """
    from transformers import LlamaTokenizer

    vocab, merges = _llama_pieces()
    tokenizer = LlamaTokenizer(
        vocab=vocab, merges=merges, unk_token="<unk>", bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>",
        add_bos_token=True, add_prefix_space=False, legacy=False, additional_special_tokens=["</s>", "<|im_start|>"],
        model_max_length=MAX_LENGTH, padding_side="right",
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATES["chatml-bos"].text
    return tokenizer


def qwen_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE with Qwen2's split pattern and NFC; no bos, the end token is <|im_end|>, pad is <|endoftext|>."""
    from transformers import Qwen2Tokenizer

    vocab, merges = _qwen_pieces()
    no_token: Any = None  # transformers declares its token arguments as str, and takes None for "there is none"
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=merges, unk_token=no_token, bos_token=None, eos_token="<|im_end|>",
        pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>"], model_max_length=MAX_LENGTH,
        padding_side="right",
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATES["chatml"].text
    return tokenizer


def _llama_pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges such that SentencePiece (best score wins) and BPE (first merge wins) always cut alike."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="never", split=True),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(" ", "isolated"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    learnt = _train(learner, trainers.BpeTrainer(vocab_size=VOCAB_SIZE, min_frequency=2, show_progress=False))
    characters = sorted(text for text in learnt if len(text) == 1)
    known = set(characters)
    merges: list[tuple[str, str]] = []
    for piece in sorted((text for text in learnt if len(text) > 1), key=learnt.__getitem__):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if {piece[:i], piece[i:]} <= known]
        if splits and not _ambiguous(splits):
            known.add(piece)
            merges += splits
    merged = list(dict.fromkeys(left + right for left, right in merges))
    fallback = [byte_piece(value) for value in range(256)]
    return _numbered([*LLAMA_SPECIAL, *fallback, *merged, *characters]), merges


def _ambiguous(splits: list[tuple[str, str]]) -> bool:
    """True when two ways to make the piece can overlap (aa+a and a+aa): there the two algorithms differ in ties."""
    return any(right == left for first in splits for left, _ in splits if (right := first[1]) and first[0] != left)


def _qwen_pieces() -> tuple[dict[str, int], Any]:
    import json

    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.NFC()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    size = VOCAB_SIZE - len(QWEN_SPECIAL)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learnt = _train(
        learner,
        trainers.BpeTrainer(vocab_size=size, min_frequency=2, show_progress=False, initial_alphabet=alphabet),
    )
    merges = [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]
    ordered = sorted(learnt, key=learnt.__getitem__)
    return _numbered([*ordered, *QWEN_SPECIAL]), merges


def _train(learner: object, trainer: object) -> Mapping[str, int]:
    """Learn from the corpus line by line, so that no piece spans lines."""
    learner.train_from_iterator(corpus().splitlines(), trainer)  # type: ignore[attr-defined]
    return learner.get_vocab()  # type: ignore[attr-defined, no-any-return]


def _numbered(pieces: list[str]) -> dict[str, int]:
    """Ids in order, filled up to VOCAB_SIZE with reserved pieces, so that row lengths stay multiples of 256."""
    if len(pieces) > VOCAB_SIZE:
        raise ValueError(f"{len(pieces)} pieces do not fit into a vocabulary of {VOCAB_SIZE}")
    reserved = [f"<|reserved_{index}|>" for index in range(VOCAB_SIZE - len(pieces))]
    return {text: index for index, text in enumerate([*pieces, *reserved])}
