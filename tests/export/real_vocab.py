"""Tokenizers of published model families, rebuilt from the vocabulary-only GGUF files in llama.cpp's source archive.

The vocabularies keep their own licences, so they are taken from the pinned archive at test time and never stored here.
"""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path

from dropforge.llama_cpp.pre_tokenizer import _LLAMA3, _QWEN2
from dropforge.llama_cpp.release import SOURCE_IN_SDIST
from dropforge.llama_cpp.source import check_hash, fetch
from dropforge.settings import settings

CONTROL, USER_DEFINED, BYTE = 3, 4, 6


def archive() -> Path:
    """The pinned source archive, from the cache or the package index."""
    folder = settings().cache / "llama-sdist"
    folder.mkdir(parents=True, exist_ok=True)
    path = fetch(folder, log=print)
    check_hash(path)
    return path


def source_archive_files(start: str, *, suffix: str) -> dict[str, bytes]:
    """Files of llama.cpp's tree below `start`, by name."""
    found = {}
    with tarfile.open(archive()) as tar:
        for member in tar:
            name = member.name.removeprefix(SOURCE_IN_SDIST)
            if member.isfile() and name.startswith(start) and name.endswith(suffix):
                found[name] = tar.extractfile(member).read()
    return found


def vocabularies(folder: Path, names: tuple[str, ...]) -> dict[str, Path]:
    """Vocabulary-only GGUF files by name, unpacked into `folder`."""
    files = source_archive_files("models/ggml-vocab-", suffix=".gguf")
    paths = {}
    for name in names:
        paths[name] = folder / f"{name}.gguf"
        paths[name].write_bytes(files[f"models/ggml-vocab-{name}.gguf"])
    return paths


def _read(path: Path) -> dict:
    import gguf

    fields = gguf.GGUFReader(path).fields
    return {
        name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items() if "tokenizer" in name
    }


def write_tokenizer(
    path: Path, folder: Path, *, kind: str, template: str, eos: str, extra: tuple[str, ...] = ()
) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja of a family; `kind` is llama3, qwen2, gemma or spm."""
    found = _read(path)
    tokens, types = list(found["tokens"]), found["token_type"]
    for number, text in enumerate(extra):  # markers in the place of tokens nobody uses
        unused = [i for i, token in enumerate(tokens) if re.match(r"<unused\d|<\|reserved", token)]
        if text not in tokens:
            tokens[unused[number]] = text
    special = [i for i, kind_of in enumerate(types) if kind_of == CONTROL or tokens[i] in extra or tokens[i] == eos]
    added = [i for i, kind_of in enumerate(types) if kind_of == USER_DEFINED and i not in special]
    definition = {
        "llama3": _llama3, "qwen2": _qwen2, "gemma": _gemma, "spm": _sentencepiece,
    }[kind](found, tokens)  # fmt: skip
    definition |= {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {
                "id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                "special": i in set(special),
            }
            for i in sorted({*special, *added})
        ],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(definition, ensure_ascii=False))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "pad_token": eos,
        "clean_up_tokenization_spaces": False,
    }
    if kind != "qwen2":
        config["bos_token"] = tokens[found["bos_token_id"]]
    if "unknown_token_id" in found:
        config["unk_token"] = tokens[found["unknown_token_id"]]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(template)


def _bos(found, tokens) -> dict:
    bos = tokens[found["bos_token_id"]]
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [found["bos_token_id"]], "tokens": [bos]}},
    }  # fmt: skip


def _byte_level(found, tokens, *, pattern: str, ignore_merges: bool) -> dict:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None, "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges,
            "vocab": {token: i for i, token in enumerate(tokens)}, "merges": [m.split(" ", 1) for m in found["merges"]],
        },
    }  # fmt: skip


def _llama3(found, tokens) -> dict:
    definition = _byte_level(found, tokens, pattern=_LLAMA3, ignore_merges=True)
    return {**definition, "post_processor": _bos(found, tokens)}


def _qwen2(found, tokens) -> dict:
    return {**_byte_level(found, tokens, pattern=_QWEN2, ignore_merges=False), "normalizer": {"type": "NFC"}}


def _with_bytes(found, tokens, merges, *, normalizer) -> dict:
    return {
        "normalizer": normalizer, "pre_tokenizer": None, "post_processor": _bos(found, tokens),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": tokens[found["unknown_token_id"]], "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges,
        },
    }  # fmt: skip


_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}


def _gemma(found, tokens) -> dict:
    """Gemma's merges are in the file; spaces become U+2581, and nothing is put before a text."""
    return _with_bytes(found, tokens, [m.split(" ", 1) for m in found["merges"]], normalizer=_SPACES)


def _sentencepiece(found, tokens) -> dict:
    """Llama 2's kind: merges are every way to cut a piece into two, the best piece first, as its converters do."""
    known = {token: i for i, token in enumerate(tokens) if found["token_type"][i] in (1, USER_DEFINED)}
    merges = []
    for piece, i in known.items():
        local = [
            (piece[:cut], piece[cut:]) for cut in range(1, len(piece)) if piece[:cut] in known and piece[cut:] in known
        ]
        local.sort(key=lambda pair: (known[pair[0]], known[pair[1]]))
        merges += [(-found["scores"][i], pair) for pair in local]
    merges.sort(key=lambda entry: entry[0])
    return _with_bytes(found, tokens, [list(pair) for _, pair in merges], normalizer=_SPACES)
