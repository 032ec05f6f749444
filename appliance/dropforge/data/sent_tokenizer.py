"""A tokenizer as a data worker has it: the part in Rust at once, all of it only when a chat template has to be run.

The whole one takes seconds to import; most workers never need it, because the shapes of the conversations were found
before they started.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


class SentTokenizer:
    """Answers as the tokenizer it was made from does. Pickles without importing transformers."""

    def __init__(self, *, backend: str, whole: bytes, eos_token_id: int | None) -> None:
        """`backend` is tokenizer.json's text, `whole` the pickled tokenizer."""
        from tokenizers import Tokenizer

        self._backend, self._pickled = backend, whole
        self._whole: PreTrainedTokenizerBase | None = None
        self.backend_tokenizer: Tokenizer = Tokenizer.from_str(backend)
        self.eos_token_id = eos_token_id

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (self._backend, self._pickled, self.eos_token_id)

    def __getattr__(self, name: str) -> Any:
        if self._whole is None:
            self._whole = pickle.loads(self._pickled)
        return getattr(self._whole, name)


def sent(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer in the form that is sent; to be used as the tokenizer itself."""
    made = SentTokenizer(
        backend=tokenizer.backend_tokenizer.to_str(),
        whole=pickle.dumps(tokenizer, protocol=pickle.HIGHEST_PROTOCOL),
        eos_token_id=tokenizer.eos_token_id,
    )
    return cast("PreTrainedTokenizerBase", made)


def _made(backend: str, whole: bytes, eos_token_id: int | None) -> SentTokenizer:
    return SentTokenizer(backend=backend, whole=whole, eos_token_id=eos_token_id)
