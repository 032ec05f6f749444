"""Both builtin tokenizers, made once, and a helper that prepares data from files in a temporary folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dropforge.data import PreparedData, prepare_data
from dropforge.errors import DataError
from dropforge.models.builtin import BUILTIN, build_builtin
from dropforge.models.tokenizer import load_tokenizer
from dropforge.spec import Spec


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[str, Any]:
    loaded = {}
    for name in BUILTIN:
        folder = tmp_path_factory.mktemp(name)
        build_builtin(name, folder)
        loaded[name] = load_tokenizer(folder)[0]
    return loaded


@pytest.fixture(params=sorted(BUILTIN))
def tokenizer(request, tokenizers) -> Any:
    return tokenizers[request.param]


class Workbench:
    """Files in one folder, and `prepare` over them."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder, self.tokenizer, self.said = folder, tokenizer, []

    def write(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    def jsonl(self, name: str, rows: list[Any]) -> str:
        return self.write(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def locate(self, name: str) -> Path:
        if not (self.folder / name).exists():
            raise DataError(f"data {name!r} does not exist", code="data-missing", where="data.train")
        return self.folder / name

    def prepare(self, data: Any, *, length: int = 512, seed: int = 3407, work: Path | None = None) -> PreparedData:
        spec = Spec.model_validate(
            {
                "version": 1,
                "name": "test",
                "model": {"id": "builtin:tiny-llama", "max_seq_length": length},
                "data": data,
                "train": {"seed": seed},
                "export": ["adapter"],
            }
        )
        return prepare_data(spec, self.tokenizer, locate=self.locate, log=self.said.append, work=work)

    def error(self, data: Any, **options: Any) -> DataError:
        with pytest.raises(DataError) as caught:
            self.prepare(data, **options)
        return caught.value

    def learnt(self, row: dict[str, list[int]]) -> str:
        """The text of the labels that are kept."""
        return self.tokenizer.decode([label for label in row["labels"] if label != -100])


@pytest.fixture
def bench(tmp_path, tokenizers) -> Workbench:
    """With the Llama tokenizer: what is tested there does not depend on the tokenizer."""
    return Workbench(tmp_path, tokenizers["tiny-llama"])
