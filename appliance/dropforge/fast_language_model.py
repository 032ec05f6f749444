"""FastLanguageModel: load a causal language model, put an adapter on it, train it with any Hugging Face trainer.

The call shapes are those that fine-tuning scripts already use; what stands behind them is transformers, PEFT and this
library's kernels (``dropforge_kernels.patch``), swapped into that one model and reported.
"""

from __future__ import annotations

import json
import logging
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from dropforge.errors import CommandError, ModelError
from dropforge.fast_checks import check_dtype, check_length, check_modules, check_precision, check_same_architecture
from dropforge.models.builtin import BUILTIN_PREFIX
from dropforge.models.source import HUB_FILES, HUB_IGNORED, ModelSource, resolve_model
from dropforge.paths import DataRoot
from dropforge.settings import settings
from dropforge.spec import ModelSpec

if TYPE_CHECKING:
    import torch
    from dropforge_kernels.patch.report import PatchReport
    from dropforge_kernels.patch.session import Session
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOG = logging.getLogger("dropforge")
ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STATE = "dropforge_state"
KERNEL_POLICIES = ("auto", "required", "off")


@dataclass
class ModelState:
    """What a loaded model remembers about itself; reached with ``state_of``."""

    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    max_seq_length: int
    full_finetuning: bool
    kernels: str
    checkpointing: bool = False
    session: Session | None = None

    @property
    def report(self) -> PatchReport | None:
        """Which kernels run in this model, and which do not and why; None before the first ``for_training``."""
        return self.session.report if self.session else None


def state_of(model: Any) -> ModelState | None:
    """The state of a model that FastLanguageModel loaded, also through PEFT's wrapper; None for any other model."""
    state = getattr(model, STATE, None)
    return state if isinstance(state, ModelState) else None


class FastLanguageModel:
    """Loads and prepares causal language models. Static methods only; there are no instances."""

    @staticmethod
    def from_pretrained(
        model_name: str = "builtin:tiny-llama",
        max_seq_length: int = 2048,
        dtype: str | torch.dtype | None = None,
        load_in_4bit: bool | None = None,
        load_in_8bit: bool = False,
        full_finetuning: bool = False,
        *,
        load_in_16bit: bool = False,
        token: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        local_files_only: bool = False,
        rope_scaling: Mapping[str, Any] | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        attn_implementation: str | None = None,
        kernels: str = "auto",
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """(model, tokenizer), with the tokenizer repaired (pad apart from eos, a chat template) and right padding.

        Args:
            model_name: hub id, folder of a model or of a PEFT adapter (its base is loaded and training goes on from
                it), a folder under models/ of the data root, or builtin:tiny-llama, builtin:tiny-qwen3.
            max_seq_length: longest training row in tokens; more than the model knows needs `rope_scaling`.
            dtype: None chooses by the hardware: bf16, else fp16, and fp32 on a CPU.
            load_in_4bit, load_in_8bit, load_in_16bit, full_finetuning: how the weights are held, at most one of them.
                load_in_4bit=None means True unless another is set.
            token: for gated hub models; default: the one huggingface_hub finds.
            kernels: "auto" swaps this library's kernels in on a GPU and reports what it could not swap; "required"
                swaps everywhere and raises instead; "off" trains with transformers' own code.

        Raises:
            CommandError: api-two-precisions, api-dtype, api-length, api-kernels: before any weight is loaded.
            ModelError, EnvironmentFault: unknown, incomplete, pickled or gated model; no network.
        """
        from transformers import AutoConfig

        from dropforge.models.tokenizer import load_tokenizer

        check_precision(
            {
                "load_in_4bit": bool(load_in_4bit), "load_in_8bit": load_in_8bit, "load_in_16bit": load_in_16bit,
                "full_finetuning": full_finetuning,
            }
        )  # fmt: skip
        if load_in_4bit is None:
            load_in_4bit = not (load_in_8bit or load_in_16bit or full_finetuning)
        compute = check_dtype(dtype)
        _check_kernels(kernels)
        adapter = _adapter_folder(model_name)
        base = _adapter_config(adapter)["base_model_name_or_path"] if adapter else model_name
        source = _source(base, revision=revision, remote_code=trust_remote_code, offline=local_files_only, token=token)
        config = AutoConfig.from_pretrained(source.path, local_files_only=True, trust_remote_code=trust_remote_code)
        check_length(config, max_seq_length=max_seq_length, rope_scaling=rope_scaling)
        if rope_scaling is not None:
            config.rope_parameters = {**(config.rope_parameters or {}), **rope_scaling}
            config.max_position_embeddings = max(config.max_position_embeddings, max_seq_length)
        tokenizer, template = load_tokenizer(adapter if adapter and _has_tokenizer(adapter) else source.path)
        for repair in template.repairs:
            LOG.info("tokenizer: %s", repair)
        model = _load(
            source, config=config, dtype=compute, four_bit=load_in_4bit, eight_bit=load_in_8bit,
            device_map=device_map, attention=attn_implementation, remote_code=trust_remote_code,
            rows=len(tokenizer), full=full_finetuning,
        )  # fmt: skip
        state = ModelState(source, tokenizer, max_seq_length, full_finetuning, kernels)
        setattr(model, STATE, state)
        if adapter:
            model = _continue_from(adapter, model)
        _give_methods(model)
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: PreTrainedModel,
        r: int = 16,
        target_modules: str | Iterable[str] = ALL_PROJECTIONS,
        lora_alpha: int = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: int | list[int] | None = None,
        layers_pattern: str | list[str] | None = None,
        use_gradient_checkpointing: bool | str = True,
        random_state: int = 3407,
        max_seq_length: int | None = None,
        use_rslora: bool = False,
        modules_to_save: list[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: Mapping[str, Any] | None = None,
        use_dora: bool = False,
        task_type: str = "CAUSAL_LM",
    ) -> PreTrainedModel:
        """The model with LoRA matrices as its trained weights, ready to train. Arguments as in PEFT's LoraConfig.

        use_gradient_checkpointing: True, False, or a text such as "unsloth" or "dropforge", which means True: layers
        are recomputed by torch's non-reentrant checkpointing (nothing is offloaded yet). random_state: seed of the
        matrices. max_seq_length: may lower the limit given at loading. A model loaded with full_finetuning=True is
        returned without an adapter.

        Raises ModelError adapter-target-unknown; CommandError api-not-loaded (not made by from_pretrained),
        api-adapter-twice.
        """
        from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
        from transformers import set_seed

        state = needed_state(model)
        if max_seq_length is not None:
            state.max_seq_length = min(state.max_seq_length, max_seq_length)
        state.checkpointing = bool(use_gradient_checkpointing)
        if state.full_finetuning:
            LOG.warning("get_peft_model changes nothing: the model was loaded with full_finetuning=True")
            return FastLanguageModel.for_training(model)
        if isinstance(model, PeftModel):
            raise CommandError(
                "this model has an adapter already", code="api-adapter-twice", where="model",
                fix="train it as it is, or load the base model again",
            )  # fmt: skip
        targets = target_modules if isinstance(target_modules, str) else list(target_modules)
        check_modules(model, argument="target_modules", names=targets)
        check_modules(model, argument="modules_to_save", names=modules_to_save)
        if _is_quantised(model):
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        set_seed(random_state)
        config = LoraConfig(
            r=r, target_modules=targets, lora_alpha=lora_alpha, lora_dropout=lora_dropout, bias=bias,  # type: ignore[arg-type]
            layers_to_transform=layers_to_transform, layers_pattern=layers_pattern, use_rslora=use_rslora,
            modules_to_save=modules_to_save, init_lora_weights=init_lora_weights,  # type: ignore[arg-type]
            loftq_config=dict(loftq_config or {}), use_dora=use_dora, task_type=task_type,
        )  # fmt: skip
        wrapped: Any = get_peft_model(model, config)
        if state.source.kind == "hub":
            # PEFT would record the folder of the download, which is of no use on another machine.
            wrapped.peft_config["default"].base_model_name_or_path = state.source.id
        _give_methods(wrapped)
        return FastLanguageModel.for_training(wrapped)

    @staticmethod
    def for_training(model: PreTrainedModel, use_gradient_checkpointing: bool | str | None = None) -> PreTrainedModel:
        """Training mode: layers recomputed as asked, no cache, kernels swapped in. Returns the model itself."""
        state = needed_state(model)
        if use_gradient_checkpointing is not None:
            state.checkpointing = bool(use_gradient_checkpointing)
        model.train()
        model.config.use_cache = False
        state.tokenizer.padding_side = "right"
        if state.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        else:
            model.gradient_checkpointing_disable()
        _open_session(model, state)
        return model

    @staticmethod
    def for_inference(model: PreTrainedModel) -> PreTrainedModel:
        """Evaluation mode: cache on, nothing recomputed, left padding, transformers' own code. Returns the model."""
        state = needed_state(model)
        if state.session is not None:
            # Not closed: a trainer may have wrapped a forward meanwhile, and then it could not be swapped again.
            state.session.pause()
        model.eval()
        model.gradient_checkpointing_disable()
        model.config.use_cache = True
        state.tokenizer.padding_side = "left"
        return model


def _check_kernels(kernels: str) -> None:
    if kernels not in KERNEL_POLICIES:
        raise CommandError(
            f"kernels cannot be {kernels!r}", code="api-kernels", where="kernels",
            fix=f"one of {', '.join(KERNEL_POLICIES)}",
        )  # fmt: skip


def needed_state(model: Any) -> ModelState:
    state = state_of(model)
    if state is None:
        raise CommandError(
            "this model was not loaded by FastLanguageModel", code="api-not-loaded", where="model",
            fix="load it with FastLanguageModel.from_pretrained; for a model of your own use "
            "dropforge_kernels.patch.session.patched(model)",
        )  # fmt: skip
    return state


def _open_session(model: PreTrainedModel, state: ModelState) -> None:
    from dropforge_kernels.patch.session import open_session
    from dropforge_kernels.patch.spec import PatchError

    if state.session is not None and state.session.resume():
        return
    on_gpu = next(model.parameters()).is_cuda
    # On a CPU the operations are plain PyTorch too, so swapping gains nothing; "required" is for tests and the curious.
    policy = state.kernels if on_gpu or state.kernels == "required" else "off"
    try:
        state.session = open_session(model, policy=policy)
    except PatchError as error:
        raise ModelError(
            "this model cannot run on the kernels alone", code="api-kernels-required", where="kernels", why=str(error),
            fix="kernels='auto' uses them where they fit",
        ) from error  # fmt: skip
    for line in state.session.report.lines():
        LOG.info("%s", line)


def _source(name: str, *, revision: str | None, remote_code: bool, offline: bool, token: str | None) -> ModelSource:
    from dropforge.models.source import check_model_files

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
    if token is not None and not offline and not name.startswith(BUILTIN_PREFIX):
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


def _adapter_folder(name: str) -> Path | None:
    folder = Path(name)
    return folder.absolute() if (folder / "adapter_config.json").is_file() else None


def _adapter_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return config


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()


def _load(
    source: ModelSource, *, config: Any, dtype: torch.dtype | None, four_bit: bool, eight_bit: bool, device_map: Any,
    attention: str | None, remote_code: bool, rows: int, full: bool,
) -> PreTrainedModel:  # fmt: skip
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from dropforge.hardware_dtypes import default_dtype

    compute = dtype or default_dtype()
    arguments: dict[str, Any] = {"dtype": compute, "config": config, "use_safetensors": True}
    if four_bit:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        )
    elif eight_bit:
        arguments["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif full and dtype is None:
        arguments["dtype"] = torch.float32  # small updates vanish in 16-bit weights; the trainer computes in 16 bits
    if device_map is not None or torch.cuda.is_available():
        arguments["device_map"] = device_map or {"": torch.cuda.current_device()}
    if attention is not None:
        arguments["attn_implementation"] = attention
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        source.path, local_files_only=True, trust_remote_code=remote_code, **arguments
    )
    embedding: Any = model.get_input_embeddings()
    if rows > embedding.weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=True)
    return model


def _is_quantised(model: Any) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def _continue_from(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    from peft import PeftModel, prepare_model_for_kbit_training

    check_same_architecture(_adapter_config(folder), folder=folder, model=model)
    if _is_quantised(model):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    wrapped: Any = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    return wrapped  # type: ignore[no-any-return]


def _give_methods(model: Any) -> None:
    """save_pretrained_merged and save_pretrained_gguf on this one object."""
    from dropforge import fast_saving

    model.save_pretrained_merged = types.MethodType(fast_saving.save_pretrained_merged, model)
    model.save_pretrained_gguf = types.MethodType(fast_saving.save_pretrained_gguf, model)
