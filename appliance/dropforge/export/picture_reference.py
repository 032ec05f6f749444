"""What the merged model says after a picture, in transformers: the truth a projector is compared with.

Shape legend: T positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.errors import ExportError
from dropforge.export.picture import make_picture
from dropforge.export.picture_families import PictureFamily, family_of, image_token
from dropforge.export.reference import quiet_libraries, selected_logprobs
from dropforge.files import read_json

if TYPE_CHECKING:
    import numpy as np

    from dropforge.export.picture import Pixels

    Array = np.ndarray[Any, np.dtype[np.float32]]

BEFORE = "Here is a picture:"
AFTER = "What does it show?"


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One picture in a text, as transformers' model takes it."""

    picture: Pixels
    ids: list[int]
    inputs: dict[str, Any]
    """The picture's own arguments of forward."""


class PictureReader:
    """The picture processor of a model folder. Raises ExportError: export-unsupported (a family that was not tried),
    export-picture (the processor does not run here)."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.folder = folder
        self.config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.family: PictureFamily = family_of(self.config)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        try:
            with quiet_libraries():
                self.processor: Any = _processor_class(folder).from_pretrained(folder, local_files_only=True)
                self.show(0, bos=[])
        except (AttributeError, ImportError, OSError, ValueError, KeyError) as error:
            raise ExportError(
                "the model's picture processor does not run here, so its projector could not be checked",
                code="export-picture", where="preprocessor_config.json", why=str(error).strip().split("\n")[0],
                fix="copy the base model's processor files, and install Pillow (it is among the locked packages)",
            ) from error  # fmt: skip

    def show(self, seed: int, *, bos: list[int]) -> Shown:
        """A made-up picture between BEFORE and AFTER; `bos` is what the runtime puts in front by itself."""
        import numpy as np

        picture = make_picture(self.family.side(self.config, self.processor), seed=seed)
        found = self.processor(images=[picture], return_tensors="pt", input_data_format="channels_last")
        text = BEFORE + self.family.text(self.config, self.tokenizer, found) + AFTER
        ids = [*bos, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        inputs = {
            key: value for key, value in found.items() if key in ("pixel_values", "image_grid_thw", "image_sizes")
        }
        return Shown(picture=np.asarray(picture), ids=ids, inputs=inputs)


def _processor_class(folder: Path) -> Any:
    """transformers' processor of this folder that works with Pillow: the one with torchvision may not be there."""
    import transformers

    path = folder / "preprocessor_config.json"
    found = read_json(path) if path.is_file() else read_json(folder / "processor_config.json")["image_processor"]
    name = str(found["image_processor_type"]).removesuffix("Fast").removesuffix("Pil")
    return getattr(transformers, f"{name}Pil")


def after_picture(model: Any, shown: Shown, tokens: list[int], *, family: PictureFamily) -> Array:
    """float32 [len(tokens) + 1, V]: log-probabilities of what follows the text, then each of `tokens`."""
    import torch

    ids = torch.tensor([[*shown.ids, *tokens]])
    arguments = {
        key: value.to(model.dtype) if value.is_floating_point() else value
        for key, value in shown.inputs.items()
    }  # fmt: skip
    if family.types:
        arguments[family.types] = (ids == image_token(model.config)).long()
    places = torch.arange(len(shown.ids) - 1, ids.shape[1])
    return selected_logprobs(model, torch.zeros_like(places), places, input_ids=ids, **arguments)
