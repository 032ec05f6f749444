"""Push a result to the Hugging Face hub, through huggingface_hub; or only say what would be pushed.

Each repository gets its files in one commit, so that it never shows half an upload.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dropforge.errors import EnvironmentFault, ExportError, Reason
from dropforge.export.hub_plan import HubUpload

Card = Callable[[HubUpload], str]


@dataclass(frozen=True, kw_only=True)
class HubTarget:
    """Where to push and as whom."""

    private: bool = True
    token: str | None = None
    """Access token; None lets huggingface_hub look for its own."""
    endpoint: str | None = None
    """Address of the hub's API; None is huggingface_hub's own setting."""
    dry_run: bool = False
    """Push nothing; only say what would be."""


def push(
    uploads: tuple[HubUpload, ...], *, target: HubTarget, card: Card, log: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Push each upload with its card as README.md; returns what went where, with the commit of each repository.

    Afterwards the hub is asked which files it holds. Raises ExportError hub-incomplete; EnvironmentFault hub-auth when
    it refuses the token, hub-unreachable when it cannot be reached.
    """
    if not uploads:
        raise ExportError(
            "there is nothing to push to the hub", code="hub-nothing", where="publish.hub",
            why="no export of this result is finished and verified", fix="mend the failed exports, then retry",
        )  # fmt: skip
    done = []
    for upload in uploads:
        size = f"{len(upload.files) + 1} files, {upload.bytes / 1e6:.1f} MB"
        if target.dry_run:
            log(f"would push to {upload.repo}: {size}")
            done.append({**upload.as_dict(), "dry_run": True})
            continue
        log(f"pushing to {upload.repo}: {size}")
        done.append({**upload.as_dict(), **_push_one(upload, target=target, readme=card(upload))})
    return done


def _push_one(upload: HubUpload, *, target: HubTarget, readme: str) -> dict[str, Any]:
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi(endpoint=target.endpoint, token=target.token, library_name="dropforge")
    operations = [CommitOperationAdd("README.md", readme.encode())]
    operations += [CommitOperationAdd(name, _content(name, path)) for name, path in upload.files]
    try:
        repo = api.create_repo(upload.repo, private=target.private, exist_ok=True).repo_id
        commit = api.create_commit(repo, operations, commit_message=f"{upload.kind}, made by Dropforge")
        there = set(api.list_repo_files(repo, revision=commit.oid))
    except HfHubHTTPError as error:
        raise _answer(error, upload.repo) from error
    except (OSError, httpx.HTTPError, OfflineModeIsEnabled, RuntimeError, ValueError) as error:
        raise _unreachable(upload.repo, str(error)) from error
    missing = sorted({"README.md", *(name for name, _ in upload.files)} - there)
    if missing:
        raise ExportError(
            f"the hub does not hold every file of {upload.repo}", code="hub-incomplete", where=upload.repo,
            why=f"missing: {', '.join(missing[:5])}", fix="run `dropforge retry`",
        )  # fmt: skip
    return {"repo": repo, "commit": commit.oid, "url": str(commit.repo_url)}


def _content(name: str, path: Path) -> str | bytes:
    """The file; of a Modelfile its text with the GGUF beside it, as it is in the repository."""
    if name != "Modelfile":
        return str(path)
    return path.read_bytes().replace(b"FROM ./gguf/", b"FROM ./", 1)


def _answer(error: Any, repo: str) -> EnvironmentFault:
    status = error.response.status_code if error.response is not None else 0
    if status in (401, 403):
        return EnvironmentFault(
            f"the hub does not let us write to {repo}", code="hub-auth", where="publish.hub",
            why=f"it answered {status}", reason=Reason.AUTH,
            fix="put a token that may write there into secrets/ under the name of publish.hub.secret, then retry",
        )  # fmt: skip
    return _unreachable(repo, str(error).splitlines()[0] if str(error) else f"it answered {status}")


def _unreachable(repo: str, why: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"pushing to {repo} did not work", code="hub-unreachable", where="publish.hub", why=why[:500],
        reason=Reason.OFFLINE, fix="the result is whole here; check the network, then run `dropforge retry`",
    )  # fmt: skip
