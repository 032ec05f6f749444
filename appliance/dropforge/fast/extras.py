"""Further arguments that scripts give to from_pretrained and get_peft_model: what each one means here.

An argument with nothing to do is accepted, and a log line says why it has no effect; one whose effect is missing is
refused with what to do instead. Values that ask for nothing pass in silence.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dropforge.errors import CommandError

LOG = logging.getLogger("dropforge")
_OFF = (None, False)


@dataclass(frozen=True)
class Extra:
    """One accepted argument. `refuse`: what to do instead when it asks for something; `note`: why nothing is done;
    `meaning`: what the caller of ``check_extras`` makes of it.
    """

    refuse: str = ""
    note: str = ""
    meaning: str = ""
    nothing: tuple[Any, ...] = _OFF
    """Values that ask for nothing."""


_NO_VLLM = "it belongs to fast_inference, and generate() runs in transformers"
LOADING: dict[str, Extra] = {
    "use_exact_model_name": Extra(note="names are never redirected, so the exact one is used anyway"),
    "disable_log_stats": Extra(note=_NO_VLLM),
    "random_state": Extra(note="loading draws no random numbers; get_peft_model and the trainer's seed do"),
    "max_lora_rank": Extra(note=_NO_VLLM),
    "gpu_memory_utilization": Extra(note=_NO_VLLM),
    "conservativeness": Extra(note=_NO_VLLM),
    "fullgraph": Extra(note="nothing is compiled at loading"),
    "return_logits": Extra(note="logits are returned whenever a call has no labels, and in evaluation mode"),
    "unsloth_tiled_mlp": Extra(meaning="as tiled_mlp=True"),
    "unsloth_force_compile": Extra(note="nothing is compiled at loading"),
    "fast_inference": Extra(refuse="leave fast_inference out: generate() runs in transformers, without vLLM"),
    "float8_kv_cache": Extra(refuse="leave float8_kv_cache out: it needs fast_inference, which is not built in yet"),
    "load_in_fp8": Extra(refuse="use load_in_4bit=True or load_in_16bit=True; fp8 is an export of a finished model"),
    "float8_training": Extra(refuse="leave it out: training computes in bf16"),
    "qat_scheme": Extra(refuse="leave qat_scheme out: train in 16 bits and quantise the result at export"),
    "offload_layers": Extra(refuse="leave offload_layers out, or hold the weights with load_in_4bit=True"),
    "auto_model": Extra(refuse="load it with FastModel.from_pretrained, which takes auto_model"),
    "text_only": Extra(refuse="leave text_only out: FastLanguageModel loads the class that the config names"),
    "whisper_language": Extra(refuse="leave it out, and set model.generation_config.language after loading"),
    "whisper_task": Extra(refuse="leave it out, and set model.generation_config.task after loading"),
    "prefetch_depth": Extra(note="it belongs to offload_layers; the memory planner chooses how early it fetches"),
}
ADAPTER: dict[str, Extra] = {
    "temporary_location": Extra(note="nothing is written while the adapter is made"),
    "max_lora_rank": LOADING["max_lora_rank"],
    "qat_scheme": LOADING["qat_scheme"],
    "checkpoint_skip_layers": Extra(note="the memory planner decides which layers are recomputed"),
}

_DISK = "exports run in a scratch folder beside the target, which is removed"
SAVING: dict[str, Extra] = {
    "push_to_hub": Extra(refuse="call model.push_to_hub_merged or model.push_to_hub_gguf with the repository's name"),
    "maximum_memory_usage": Extra(note="exports read and write tensor by tensor"),
    "temporary_location": Extra(note=_DISK),
    "use_temp_dir": Extra(note=_DISK),
    "max_shard_size": Extra(note="the parts are those of the base model's own files"),
    "safe_serialization": Extra(note="weights are always saved as safetensors", nothing=(None, True)),
    "save_function": Extra(note="weights are always saved as safetensors"),
    "save_peft_format": Extra(note="save_method='lora' writes the adapter in PEFT's form", nothing=(None, True)),
    "is_main_process": Extra(note="call it in one process", nothing=(None, True)),
    "first_conversion": Extra(note="the GGUF is quantised from the type of the merged model"),
    "state_dict": Extra(refuse="leave state_dict out: the weights of the model are exported"),
    "variant": Extra(refuse="leave variant out, and rename the files afterwards"),
    "tags": Extra(note="the tag dropforge is written"),
    "datasets": Extra(note="add them to the card on the hub"),
    "commit_message": Extra(note="each commit says what was exported"),
    "commit_description": Extra(note="each commit says what was exported"),
    "create_pr": Extra(refuse="leave create_pr out: pushes go to the main branch"),
    "revision": Extra(refuse="leave revision out: pushes go to the main branch"),
}
SAVING_LOCALLY = SAVING | {
    "token": Extra(note="nothing is pushed"), "private": Extra(note="nothing is pushed"),
    "repo_id": Extra(note="nothing is pushed"),
}  # fmt: skip


def check_extras(given: Mapping[str, Any], known: Mapping[str, Extra], *, function: str, names: Iterable[str]) -> None:
    """Accept or refuse the arguments in `given` by the table `known`. `names`: the function's own arguments.

    Raises CommandError: api-argument for a name nobody knows, api-not-built for an effect that is missing.
    """
    for name, value in given.items():
        extra = known.get(name)
        if extra is None:
            near = difflib.get_close_matches(name, [*names, *known], n=1)
            raise CommandError(
                f"{function} has no argument {name!r}", code="api-argument", where=name,
                fix=f"did you mean {near[0]!r}?" if near else "see docs/guides/porting.md for the arguments",
            )  # fmt: skip
        if any(value is nothing for nothing in extra.nothing):
            continue
        if extra.refuse:
            raise CommandError(
                f"{name}={value!r} asks for something this release does not do", code="api-not-built", where=name,
                fix=extra.refuse,
            )  # fmt: skip
        if extra.note:
            LOG.warning("%s has no effect: %s", name, extra.note)
