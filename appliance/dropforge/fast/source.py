"""Where the name given to from_pretrained leads: a model, or an adapter and the base it was trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dropforge.errors import ModelError
from dropforge.models.builtin import BUILTIN_PREFIX
from dropforge.models.source import HUB_FILES, HUB_IGNORED, ModelSource, check_model_files, resolve_model
from dropforge.paths import DataRoot
from dropforge.settings import settings
from dropforge.spec import ModelSpec

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """A PEFT adapter on disk: a saved one, or a trainer's checkpoint."""

    path: Path
    config: dict[str, Any]


def find_source(
    name: str, *, revision: str | None, remote_code: bool, offline: bool, token: str | None
) -> tuple[ModelSource, AdapterFolder | None]:
    """The base model's files, and the adapter when `name` is one (a folder, or a hub id).

    Raises ModelError, EnvironmentFault: unknown, incomplete, pickled or gated; no network.
    """
    adapter = _adapter(Path(name))
    if adapter is None:
        try:
            source = _find(name, revision=revision, remote_code=remote_code, offline=offline, token=token)
        except ModelError as error:
            # A hub repository or a folder under models/ that holds no model may hold an adapter.
            adapter = _adapter(Path(error.problems[0].where)) if error.code == "model-incomplete" else None
            if adapter is None:
                raise
        else:
            return source, None
    base = adapter.config.get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"the adapter {name} does not say which model it was trained on", code="adapter-base-unknown",
            where=f"{ADAPTER_CONFIG}: base_model_name_or_path", fix="write the model's id or folder there",
        )  # fmt: skip
    return _find(base, revision=adapter.config.get("revision"), remote_code=remote_code, offline=offline,
                 token=token), adapter  # fmt: skip


def _adapter(folder: Path) -> AdapterFolder | None:
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    return AdapterFolder(path=folder.absolute(), config=json.loads(path.read_text(encoding="utf-8")))


def _find(name: str, *, revision: str | None, remote_code: bool, offline: bool, token: str | None) -> ModelSource:
    folder = Path(name)
    if folder.is_dir():
        source = ModelSource(id=folder.name, path=folder.absolute(), revision=None, kind="folder")
        check_model_files(source, remote_code=remote_code)
        return source
    root = DataRoot(settings().data_root)
    try:
        spec = ModelSpec(id=name, revision=revision, remote_code=remote_code)
    except ValidationError as error:
        raise ModelError(
            f"there is no model {name!r}", code="model-unknown", where="model_name",
            why=f"it is no folder, and as a hub id it is not valid: {error.errors()[0]['msg']}",
            fix="write org/name, an existing folder, or builtin:tiny-llama",
        ) from error  # fmt: skip
    here = (root.models / name).is_dir() and revision is None
    if token is not None and not offline and not here and not name.startswith(BUILTIN_PREFIX):
        _fetch(spec, root=root, token=token)
    return resolve_model(spec, root=root, offline=offline)


def _fetch(spec: ModelSpec, *, root: DataRoot, token: str) -> None:
    """Download with a token that is used once and written nowhere; `resolve_model` then finds the files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        snapshot_download(
            spec.id, revision=spec.revision, cache_dir=root.cache / "hub", token=token,
            allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_IGNORED),
        )  # fmt: skip
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise ModelError(
            f"the hub does not give out {spec.id}", code="model-auth", where="model_name, token",
            why=str(error).splitlines()[0], fix="accept the model's terms on its page, and check the token",
        ) from error  # fmt: skip
