"""The model families that can be patched. Listed by hand: nothing is found by scanning folders."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable

from dropforge_kernels.patch.spec import PatchError, PatchSpec

FAMILIES: dict[str, str] = {
    "llama": "dropforge_kernels.patch.families.llama",
    "mistral": "dropforge_kernels.patch.families.mistral",
    "qwen2": "dropforge_kernels.patch.families.qwen2",
    "qwen3": "dropforge_kernels.patch.families.qwen3",
    "gemma2": "dropforge_kernels.patch.families.gemma2",
    "gemma3_text": "dropforge_kernels.patch.families.gemma3_text",
    "phi3": "dropforge_kernels.patch.families.phi3",
    "granite": "dropforge_kernels.patch.families.granite",
}
"""transformers' model type -> module with a tuple ``SPECS``."""


def specs_of(family: str) -> tuple[PatchSpec, ...]:
    """The patches of a family; empty when it is not known."""
    if family not in FAMILIES:
        return ()
    module = importlib.import_module(FAMILIES[family])
    specs: tuple[PatchSpec, ...] = module.SPECS
    by_name: dict[str, PatchSpec] = {}
    for spec in specs:
        if spec.name in by_name:
            raise PatchError(f"family {family}: two patches are called {spec.name}")
        by_name[spec.name] = spec
    return specs


def select(specs: tuple[PatchSpec, ...], names: Iterable[str] | None) -> tuple[PatchSpec, ...]:
    """Those with the given names ("llama.rope" or "rope"), or every exact one for None.

    Raises PatchError for a name that no patch has, with the nearest.
    """
    if names is None:
        return tuple(spec for spec in specs if spec.exact)
    if isinstance(names, str):
        raise PatchError(f"names must be a list of patch names; received the text {names!r}")
    known = {key: spec for spec in specs for key in (spec.operation, spec.name)}
    chosen: dict[str, PatchSpec] = {}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise PatchError(f"there is no patch {name!r}; {hint}known: {', '.join(sorted(known)) or 'none'}")
        chosen[known[name].name] = known[name]
    return tuple(chosen.values())
