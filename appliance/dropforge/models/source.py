"""Where a model comes from: made on the spot, a folder under models/, or the hub. Only safetensors weights."""

from __future__ import annotations

import difflib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from dropforge.errors import EnvironmentFault, ModelError, Reason
from dropforge.files import rename_folder
from dropforge.models.builtin import BUILTIN, BUILTIN_PREFIX, build_builtin, builtin_folder, recipe_hash
from dropforge.models.remote_code import foreign_kernel, needs_code, read_config
from dropforge.paths import DataRoot
from dropforge.spec import ModelSpec

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "vocab.txt")
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "README.md")
HUB_IGNORED = ("original/*", "onnx/*", "openvino/*", "consolidated*.safetensors", "*.onnx.json", "checkpoint-*/*")
TOKEN_NAME = "HF_TOKEN"


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model whose files are all here. `path` holds config.json, safetensors weights and a tokenizer."""

    id: str
    path: Path
    revision: str | None
    """The hub's commit, the recipe's hash for a builtin model, None for a folder."""
    kind: Literal["builtin", "folder", "hub"]
    runs_code: bool = False
    """Whether code that came with it may run: code_approval.py alone says so."""


def resolve_model(model: ModelSpec, *, root: DataRoot, offline: bool = False) -> ModelSource:
    """Find the model, fetching or making it if needed.

    A folder under models/ wins over a hub id of the same name, unless a revision is asked for. `offline` uses only
    what was fetched before. Raises ModelError (unknown, incomplete, pickle-only, auth, remote code) or
    EnvironmentFault (offline).
    """
    if model.id.startswith(BUILTIN_PREFIX):
        return _builtin(model.id)
    folder = root.models / model.id
    if folder.is_dir() and model.revision is None:
        source = ModelSource(id=model.id, path=folder, revision=None, kind="folder")
    elif "/" in model.id:
        source = _from_hub(model, root=root, offline=offline)
    else:
        _unknown_folder(model.id, root)
    check_model_files(source, remote_code=model.remote_code)
    return source


def _builtin(model_id: str) -> ModelSource:
    name = model_id.removeprefix(BUILTIN_PREFIX)
    folder = builtin_folder(model_id)
    if folder is None:
        nearest = difflib.get_close_matches(name, BUILTIN, n=1, cutoff=0) or ["tiny-llama"]
        raise ModelError(
            f"there is no builtin model {name!r}",
            code="model-unknown-builtin",
            where="model",
            fix=f"did you mean {BUILTIN_PREFIX}{nearest[0]}? Known: {', '.join(sorted(BUILTIN))}",
        )
    if not folder.is_dir():
        _build_once(name, folder)
    return ModelSource(id=model_id, path=folder, revision=recipe_hash(name), kind="builtin")


def _build_once(name: str, folder: Path) -> None:
    """Build beside the final place and rename; when two processes race, the first wins, and both have equal bytes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".tmp-{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        build_builtin(name, temporary)
        for path in temporary.iterdir():
            path.chmod(0o644)
        if not folder.is_dir():
            rename_folder(temporary, folder)
    except OSError:
        if not folder.is_dir():  # otherwise the other process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unknown_folder(model_id: str, root: DataRoot) -> NoReturn:
    known = sorted(path.name for path in root.models.iterdir()) if root.models.is_dir() else []
    nearest = difflib.get_close_matches(model_id, [*known, *(BUILTIN_PREFIX + name for name in BUILTIN)], n=1)
    raise ModelError(
        f"the model {model_id!r} was not found",
        code="model-unknown",
        where="model",
        why=f"it is neither a folder under {root.models} nor a hub id (those look like org/name)",
        fix=f"did you mean {nearest[0]}?"
        if nearest
        else "write org/name, a folder under models/, or builtin:tiny-llama",
    )


def _from_hub(model: ModelSpec, *, root: DataRoot, offline: bool) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    patterns = [*HUB_FILES, "*.py"] if model.remote_code else list(HUB_FILES)
    where = model.id + (f"@{model.revision}" if model.revision else "")
    try:
        path = snapshot_download(
            model.id, revision=model.revision, cache_dir=root.cache / "hub", token=_token(root),
            allow_patterns=patterns, ignore_patterns=list(HUB_IGNORED), local_files_only=offline,
        )  # fmt: skip
    except GatedRepoError as error:
        raise _auth(where, "its owner asks everybody to accept terms first") from error
    except RepositoryNotFoundError as error:
        raise _auth(where, "the hub says there is no such model, or this token may not see it") from error
    except HFValidationError as error:
        raise ModelError(
            f"{model.id!r} is not a hub id", code="model-unknown", where="model", why=str(error), fix="write org/name"
        ) from error
    except HfHubHTTPError as error:
        raise _hub_answer(error, where) from error
    except OSError as error:  # LocalEntryNotFoundError, connection errors
        raise _unreachable(where, root, str(error)) from error
    folder = Path(path)
    return ModelSource(id=model.id, path=folder, revision=folder.name, kind="hub")


def _token(root: DataRoot) -> str | None:
    """secrets/HF_TOKEN; without it huggingface_hub looks at its own variables."""
    path = root.secrets / TOKEN_NAME
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _auth(where: str, why: str) -> ModelError:
    return ModelError(
        f"the hub does not give out {where}",
        code="model-auth",
        where="model",
        why=why,
        fix=f"check the spelling, accept the model's terms on its page, and put a token into secrets/{TOKEN_NAME}",
        reason=Reason.AUTH,
    )


def _hub_answer(error: Exception, where: str) -> ModelError | EnvironmentFault:
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    if isinstance(error, RevisionNotFoundError):
        return ModelError(
            f"{where}: there is no such revision", code="model-unknown", where="model.revision", why=str(error),
            fix="use a branch, tag or commit of the model's page",
        )  # fmt: skip
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
    if status in (401, 403):
        return _auth(where, f"the hub answered {status}")
    return EnvironmentFault(
        f"the hub could not deliver {where}", code="model-offline", where="model", why=str(error),
        fix="try again later; what was fetched so far is kept", reason=Reason.OFFLINE,
    )  # fmt: skip


def _unreachable(where: str, root: DataRoot, why: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"{where} is not on this machine and the hub cannot be reached",
        code="model-offline",
        where="model",
        why=why.splitlines()[0] if why else "",
        fix=f"connect the machine, or copy the model's files to {root.models / where.partition('@')[0]}",
        reason=Reason.OFFLINE,
    )


def check_model_files(source: ModelSource, *, remote_code: bool) -> None:
    """Refuse what cannot be loaded safely, before anything is loaded."""
    folder = source.path
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise _incomplete(folder, "config.json is missing")
    try:
        config = read_config(folder)
    except ValueError as error:
        raise _incomplete(folder, f"config.json is not JSON: {error}") from error
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        if pickles or source.kind == "hub":
            raise ModelError(
                f"{source.id} has no safetensors weights",
                code="model-pickle-only",
                where=str(folder),
                why=f"pickle files can run code when they are opened; found {', '.join(pickles[:3]) or 'none'}",
                fix="use a version of the model with *.safetensors, or put such files into its folder, then `release`",
                reason=Reason.REMOTE_CODE,
            )
        raise _incomplete(folder, "there is no *.safetensors file")
    _check_shards(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise _incomplete(folder, f"there is no tokenizer (one of {', '.join(TOKENIZER_FILES)})")
    if not remote_code and needs_code(config):
        raise _needs_code(source, config.get("model_type"))
    kernel = foreign_kernel(config)
    if kernel and not remote_code:
        raise ModelError(
            f"{source.id} wants a kernel from the hub, which is code", code="model-foreign-kernel",
            where=f"config.json: {kernel}", reason=Reason.REMOTE_CODE,
            fix="in a copy of the model under models/, take this line out of config.json",
        )  # fmt: skip


def _check_shards(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        strange = sorted(name for name in shards if Path(name).name != name or not name.endswith(".safetensors"))
        if strange:
            raise _incomplete(
                folder, f"its index names files that are no safetensors beside it: {', '.join(strange[:3])}"
            )
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            raise _incomplete(folder, f"{len(missing)} weight files of the index are missing: {', '.join(missing[:3])}")


def _needs_code(source: ModelSource, model_type: object) -> ModelError:
    commit = " and model.revision: FULL_COMMIT" if source.kind == "hub" else ""
    return ModelError(
        f"{source.id} can only be loaded by running Python code that comes with it",
        code="model-remote-code",
        where="model.remote_code",
        why=f"the installed transformers cannot train the model type {model_type!r} by itself",
        fix="cancel this job; use a model of a type that transformers knows, or, if you trust its code, drop a spec "
        f"with model.remote_code: true{commit}, which is then held until the code is approved",
        reason=Reason.REMOTE_CODE,
    )


def _incomplete(folder: Path, why: str) -> ModelError:
    return ModelError(
        "the model folder is not complete", code="model-incomplete", where=str(folder), why=why,
        fix="copy all files of the model: config.json, *.safetensors, the tokenizer's files",
    )  # fmt: skip
