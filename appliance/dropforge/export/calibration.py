"""What every linear layer of the merged model is fed with by the training rows: for importance matrices and scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.export.reference import is_streamed, merged_model
from dropforge.export.samples import TrainingRow
from dropforge.models.pictures import language_part

if TYPE_CHECKING:
    import torch

ROW_TOKENS = 512
TOKENS = 8192
PIECE_TOKENS = 2048
"""Tokens of rows that go through a streamed model together: each pass reads all weights once."""


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """By module path of a linear layer in a model of text, over all tokens read."""

    squares: dict[str, torch.Tensor]
    """float32 [in]: the sum of squares of the layer's inputs."""
    largest: dict[str, float]
    """The largest magnitude among the layer's inputs."""
    tokens: int
    layers: int
    """How many decoder layers the model has."""


def input_statistics(folder: Path, rows: tuple[TrainingRow, ...]) -> InputStatistics:
    """Run the first training rows (at most TOKENS tokens, ROW_TOKENS of each) through the model in `folder`."""
    import torch

    squares: dict[str, torch.Tensor] = {}
    largest: dict[str, float] = {}
    mask = torch.ones(0)

    def observe(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def add(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            found = inputs[0].detach().float().flatten(0, -2)
            if len(found) == len(mask):
                found = found[mask]
            total = found.pow(2).sum(dim=0)
            squares[name] = squares[name] + total if name in squares else total
            largest[name] = max(largest.get(name, 0.0), float(found.abs().max()))

        return add

    with merged_model(folder) as (model, _):
        hooks = [
            module.register_forward_pre_hook(observe(name))
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        ]
        # Nobody reads the logits: the head is observed, then runs for one place only.
        head = model.get_output_embeddings()
        hooks.append(head.register_forward_pre_hook(lambda module, inputs: (inputs[0][:1, -1:],)))
        tokens = 0
        try:
            with torch.no_grad():
                for batch in _batches(rows, together=PIECE_TOKENS if is_streamed(model) else 1):
                    ids = torch.zeros((len(batch), max(map(len, batch))), dtype=torch.long)
                    here = torch.zeros(ids.shape, dtype=torch.bool)
                    for place, row in enumerate(batch):
                        ids[place, : len(row)] = torch.tensor(row)
                        here[place, : len(row)] = True
                    mask = here.flatten()
                    model(input_ids=ids, use_cache=False)
                    tokens += int(here.sum())
        finally:
            for hook in hooks:
                hook.remove()
        layers = int(model.config.get_text_config().num_hidden_layers)
        part = language_part(model)
    if part is not None:  # as the language model alone would call them
        squares = {name.replace(f"{part}.", "model.", 1): value for name, value in squares.items()}
        largest = {name.replace(f"{part}.", "model.", 1): value for name, value in largest.items()}
    return InputStatistics(squares=squares, largest=largest, tokens=tokens, layers=layers)


def _batches(rows: tuple[TrainingRow, ...], *, together: int) -> Iterator[list[tuple[int, ...]]]:
    """Rows cut to ROW_TOKENS, up to TOKENS in all; several at once while they have at most `together` tokens."""
    batch: list[tuple[int, ...]] = []
    total = 0
    for row in rows:
        ids = row.ids[:ROW_TOKENS]
        if total and total + len(ids) > TOKENS:
            break
        total += len(ids)
        if batch and sum(map(len, batch)) + len(ids) > together:
            yield batch
            batch = []
        batch.append(ids)
    if batch:
        yield batch
