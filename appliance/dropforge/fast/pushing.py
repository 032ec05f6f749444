"""push_to_hub_merged and push_to_hub_gguf: the same verified exports as save_pretrained_*, pushed to the hub."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge import __version__
from dropforge.export.hub_plan import HubUpload, plan_uploads
from dropforge.export.hub_push import HubTarget, push
from dropforge.fast.extras import SAVING, check_extras
from dropforge.fast.saving import exported, gguf_kinds, merged_kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOG = logging.getLogger("dropforge")


def push_to_hub_merged(
    self: Any,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    save_method: str = "merged_16bit",
    *,
    private: bool = False,
    token: str | None = None,
    dry_run: bool = False,
    **extras: Any,
) -> list[dict[str, Any]]:
    """Export as save_pretrained_merged does and push it as `repo_id`; returns repository, commit and files.

    `dry_run` exports and verifies, and pushes nothing. Raises what save_pretrained_merged raises, and EnvironmentFault
    hub-auth, hub-unreachable.
    """
    check_extras(extras, SAVING, function="push_to_hub_merged", names=("tokenizer", "save_method"))
    target = HubTarget(private=private, token=token or None, dry_run=dry_run)
    return _push(self, tokenizer, kinds=(merged_kind(save_method),), repo=repo_id, target=target)


def push_to_hub_gguf(
    self: Any,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantization_method: str | list[str] = "q8_0",
    *,
    private: bool = False,
    token: str | None = None,
    dry_run: bool = False,
    **extras: Any,
) -> list[dict[str, Any]]:
    """Export as save_pretrained_gguf does, with a Modelfile, and push it as `repo_id`; returns what went where.

    `dry_run` exports and verifies, and pushes nothing. Raises what save_pretrained_gguf raises, and EnvironmentFault
    hub-auth, hub-unreachable.
    """
    check_extras(extras, SAVING, function="push_to_hub_gguf", names=("tokenizer", "quantization_method"))
    target = HubTarget(private=private, token=token or None, dry_run=dry_run)
    return _push(self, tokenizer, kinds=(*gguf_kinds(quantization_method), "ollama"), repo=repo_id, target=target)


def _push(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, *, kinds: tuple[str, ...], repo: str, target: HubTarget
) -> list[dict[str, Any]]:
    name = repo.rpartition("/")[2]
    with exported(model, tokenizer, kinds=kinds, name=name, beside=Path(tempfile.gettempdir())) as (result, reports):
        uploads = plan_uploads(result, reports, repo=repo)
        return push(uploads, target=target, card=_card(model, name), log=lambda text: LOG.info("%s", text))


def _card(model: Any, name: str) -> Any:
    """A short model card: what the files are and what they come from."""
    from dropforge.fast.language_model import needed_state
    from dropforge.model_card import HUB_ID

    source = needed_state(model).source

    def card(upload: HubUpload) -> str:
        lines = ["---"]
        if HUB_ID.fullmatch(source.id):
            lines += [f"base_model: {source.id}", f"base_model_relation: {upload.relation}"]
        lines += ["tags: [dropforge]", "---", f"# {name}", ""]
        return "\n".join([*lines, f"Made by Dropforge {__version__} from `{source.id}`; every file was verified.", ""])

    return card
