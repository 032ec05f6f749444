"""Export `ollama`: a Modelfile beside the GGUF, so that `ollama create` makes the model that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dropforge.errors import ExportError
from dropforge.export.modelfile import Modelfile, read_modelfile, write_modelfile
from dropforge.export.ollama_push import push_to_ollama
from dropforge.export.request import ExportRequest, Made
from dropforge.export.stage import Stage
from dropforge.export_kinds import split_detail
from dropforge.files import read_json, write_text
from dropforge.gguf_names import finished_projector, gguf_name, is_projector
from dropforge.models.pictures import reads_pictures
from dropforge.settings import settings

PREFERRED = ("q4_k_m", "q8_0")
MAKES = "q8_0"
LARGEST_CONTEXT = 8192


def finished_gguf(request: ExportRequest) -> Path | None:
    """The result's GGUF that Ollama gets: q4_k_m, then q8_0, then the first asked, then any; None without one."""
    asked = [split_detail(kind[5:])[0] for kind in request.kinds if kind.startswith("gguf:")]
    names = [gguf_name(request.slug, gguf_type) for gguf_type in (*PREFERRED, *asked)]
    there = {path.name: path for path in sorted(request.result.gguf.glob("*.gguf")) if not is_projector(path)}
    return next((there[name] for name in names if name in there), next(iter(there.values()), None))


def export_ollama(stage: Stage, folder: Path) -> Made:
    """Write Modelfile into `folder` for a finished GGUF of the result. Raises ExportError (ollama-no-gguf).

    An Ollama that is configured (DROPFORGE_OLLAMA_URL) gets the model too; ollama_push's errors.
    """
    request = stage.request
    gguf = finished_gguf(request)
    if gguf is None:
        raise ExportError("there is no GGUF for Ollama", code="ollama-no-gguf", where="export", why="making it failed")
    projector = finished_projector(request.result.gguf)
    if projector is None and reads_pictures(read_json(stage.merged.folder / "config.json")):
        raise ExportError(
            "there is no projector for Ollama", code="ollama-no-gguf", where="export",
            why="making it failed, and without it the model would not read pictures any more",
        )  # fmt: skip
    found = stage.ollama_template
    wanted = Modelfile(
        gguf=f"./{gguf.relative_to(request.result.path).as_posix()}",
        projector=f"./{projector.relative_to(request.result.path).as_posix()}" if projector else "",
        template=found.text, system=request.system, stops=tuple(stage.stops), context=_context(stage),
        license=request.license,
    )  # fmt: skip
    text, said = write_modelfile(wanted)
    path = folder / "Modelfile"
    write_text(path, text)
    checks = verify_modelfile(path, said=said, stage=stage)
    create = f"ollama create {request.slug} -f Modelfile"
    stage.log(f"for Ollama: {create}")
    url = settings().ollama_url
    if url:
        files = (gguf, projector) if projector else (gguf,)
        checks["pushed"] = push_to_ollama(said, files, name=request.slug, url=url, log=stage.log)
    return Made(path=path, checks={**checks, "create": create})


def verify_modelfile(path: Path, *, said: Modelfile, stage: Stage) -> dict[str, Any]:
    """Reads back as meant, names an existing GGUF, and stops where the training ended its turns."""
    try:
        found = read_modelfile(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _wrong("the Modelfile cannot be read back", why=str(error)) from error
    if found != said:
        raise _wrong("the Modelfile does not say what it should", why=f"{found} instead of {said}")
    for name in filter(None, (found.gguf, found.projector)):
        if not (stage.request.result.path / name).is_file():
            raise _wrong("the Modelfile names a GGUF that does not exist", why=name)
    if stage.end_token and stage.end_token not in found.stops:
        raise _wrong("the Modelfile has no stop for the end of a turn", why=f"{stage.end_token!r} is missing")
    template = stage.ollama_template
    return {
        "gguf": found.gguf,
        **({"projector": found.projector} if found.projector else {}),
        "template": "proven equal" if found.template else "the GGUF's own (Ollama 0.30 or newer)",
        "template_reason": template.reason,
        "conversations_equal": template.conversations if found.template else 0,
        "stops": list(found.stops),
        "left_out": list(said.left_out),
    }


def _context(stage: Stage) -> int | None:
    """num_ctx: what the model was made for, but not more than a laptop's memory likes."""
    config = read_json(stage.merged.folder / "config.json")
    positions = {**config, **(config.get("text_config") or {})}.get("max_position_embeddings")
    return min(int(positions), LARGEST_CONTEXT) if positions else None


def _wrong(what: str, *, why: str) -> ExportError:
    return ExportError(what, code="ollama-modelfile", where="Modelfile", why=why)
