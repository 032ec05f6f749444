"""Write a SentencePiece `tokenizer.model` without the protobuf package.

Why: transformers 5 saves only tokenizer.json, and llama.cpp's converter needs tokenizer.model to read a Llama-type
vocabulary right (without it every piece gets the same score and texts are cut differently, silently). The file is a
protocol buffer message `ModelProto` with three fields that matter here: pieces (1), trainer_spec (2),
normalizer_spec (3); field numbers are those of sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum

_BPE = 2  # TrainerSpec.ModelType.BPE
_VARINT, _BYTES, _FLOAT32 = 0, 2, 5  # wire types


class PieceType(IntEnum):
    """ModelProto.SentencePiece.Type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One vocabulary entry; its id is its place in the list. For BPE the score is minus the merge rank."""

    text: str
    score: float
    type: PieceType = PieceType.NORMAL


def sentencepiece_model(
    pieces: Iterable[Piece], *, bos_id: int, eos_id: int, pad_id: int, unk_id: int = 0, add_dummy_prefix: bool = False
) -> bytes:
    """The bytes of tokenizer.model: BPE with byte fallback, no normalisation, spaces written as U+2581.

    An id of -1 means that the vocabulary has no such token. `add_dummy_prefix` puts a space before every text.
    """
    listed = list(pieces)
    body = b"".join(_field(1, _piece(piece)) for piece in listed)
    # Readers look the special tokens up by their text (fields 45 to 48), not by the id.
    ids = {45: unk_id, 46: bos_id, 47: eos_id, 48: pad_id}
    names = b"".join(_field(number, listed[id_].text.encode()) for number, id_ in ids.items() if id_ >= 0)
    trainer = _integers({3: _BPE, 4: len(listed), 35: 1, 40: unk_id, 41: bos_id, 42: eos_id, 43: pad_id}) + names
    normalizer = _field(1, b"identity") + _integers({3: int(add_dummy_prefix), 4: 0, 5: 1})
    return body + _field(2, trainer) + _field(3, normalizer)


def byte_piece(value: int) -> str:
    """The name of the fallback piece for one byte: 10 -> <0x0A>."""
    return f"<0x{value:02X}>"


def pieces_from_bpe(
    vocab: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    *,
    special: Iterable[str],
    unused: Iterable[str] = (),
    unknown: str = "<unk>",
) -> list[Piece]:
    """Pieces in id order from the vocabulary and merges of a tokenizer.json of the Llama type.

    A merged piece scores minus the rank of its first merge, so that the best-scored pair is the first merge. Single
    characters never compete with each other and come after all merges. `special` pieces become CONTROL, `unused`
    ones UNUSED. Raises ValueError unless the ids are 0..n-1 without a gap.
    """
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(merges):
        rank.setdefault(left + right, index)
    order = sorted(vocab, key=vocab.__getitem__)
    if [vocab[text] for text in order] != list(range(len(order))):
        raise ValueError("token ids must be 0..n-1 without a gap")
    bytes_of_fallback = {byte_piece(value) for value in range(256)}
    controls, fillers = set(special), set(unused)
    pieces = []
    for text in order:
        if text == unknown:
            kind = PieceType.UNKNOWN
        elif text in controls:
            kind = PieceType.CONTROL
        elif text in fillers:
            kind = PieceType.UNUSED
        elif text in bytes_of_fallback:
            kind = PieceType.BYTE
        else:
            kind = PieceType.NORMAL
        normal = kind is PieceType.NORMAL
        pieces.append(Piece(text=text, score=-float(rank.get(text, len(rank))) if normal else 0.0, type=kind))
    return pieces


def _piece(piece: Piece) -> bytes:
    text = _field(1, piece.text.encode("utf-8"))
    score = bytes([2 << 3 | _FLOAT32]) + struct.pack("<f", piece.score)
    return text + score + _integers({3: int(piece.type)})


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(payload)) + payload


def _integers(fields: Mapping[int, int]) -> bytes:
    return b"".join(_varint(number << 3 | _VARINT) + _varint(value) for number, value in fields.items())


def _varint(value: int) -> bytes:
    """Base-128, low groups first; negative numbers as their 64-bit two's complement."""
    value &= 2**64 - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
