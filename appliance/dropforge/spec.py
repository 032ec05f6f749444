"""The job spec, version 1: what a user may write, checked field by field, frozen.

Names follow transformers' TrainingArguments, TRL's configs and PEFT's LoraConfig wherever one exists there. Unknown
keys are refused. Nothing here can name code, an absolute path, an environment variable or a secret's value.

Parsing of files is in spec_file.py, filling of defaults in spec_defaults.py, what this release can run in releases.py.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dropforge.export_kinds import check_export, normalise_exports

Method = Literal[
    "sft", "cpt", "dpo", "orpo", "kto", "simpo", "reward", "grpo", "dr_grpo", "dapo", "bnpo", "gspo", "rloo", "ppo",
    "embedding", "reranker", "classifier", "vision", "tts", "stt",
]  # fmt: skip
Quantization = Literal["none", "nf4", "int8", "fp8", "mxfp4"]
DataFormat = Literal[
    "auto", "messages", "sharegpt", "alpaca", "text", "prompt_completion", "preference", "unpaired_preference",
    "prompt",
]  # fmt: skip
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "warmup_stable_decay",
]  # fmt: skip
Optimizer = Literal[
    "adamw_8bit", "paged_adamw_8bit", "adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "lion_8bit",
    "adafactor", "sgd",
]  # fmt: skip


def relative_path(text: str) -> str:
    """Accept `a/b.jsonl`; refuse absolute paths, `..`, backslashes, `~` and control characters."""
    if text.startswith(("/", "~")) or re.match(r"^[A-Za-z]:", text):
        raise ValueError("must be relative to the job folder or to datasets/, not absolute")
    if "\\" in text or any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise ValueError("must not hold backslashes or control characters")
    if ".." in text.split("/"):
        raise ValueError("must not contain '..'")
    return text


def _model_id(text: str) -> str:
    if text.startswith(("/", "~", ".")) or ".." in text.split("/"):
        raise ValueError("must be a hub id, a folder under models/ or builtin:NAME, never an absolute path or '..'")
    if not re.fullmatch(r"(builtin:)?[A-Za-z0-9][\w.-]*(/[\w.-]+)*", text):
        raise ValueError("must look like org/name, a folder name under models/, or builtin:NAME")
    return text.removeprefix("models/")  # as the folder is written everywhere; no account of the hub is called so


def _seconds(value: Any) -> Any:
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", value.strip())
        if not match:
            raise ValueError("must be a number of seconds or a text such as 90m, 12h, 2d")
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
    return value


class Section(BaseModel):
    """Base of every part of the spec: unknown keys refused, no silent conversion, no NaN, frozen."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


class ModelSpec(Section):
    """The base model."""

    id: Annotated[str, AfterValidator(_model_id)] = Field(max_length=200)
    """Hub id, folder under models/, or builtin:tiny-llama, builtin:tiny-qwen3."""
    revision: str | None = Field(default=None, pattern=r"^[\w./-]{1,100}$")
    """Branch, tag or commit of a hub model; a full commit makes the run repeatable."""
    quantization: Quantization = "none"
    """How the frozen weights are held while training: nf4 is QLoRA."""
    max_seq_length: int = Field(default=2048, ge=8, le=4_194_304)
    """Longest training row, in tokens; longer rows are truncated and counted."""
    remote_code: bool = False
    """Ask to run Python code that comes with the model; a hub model needs its full commit. Held until approved."""


class AdapterSpec(Section):
    """What is trained: LoRA matrices (`type: lora`) or every weight (`type: full`)."""

    type: Literal["lora", "full"] = "lora"
    """lora trains small matrices beside frozen weights, full trains every weight."""
    r: int = Field(default=16, ge=1, le=4096)
    """Rank of the LoRA matrices."""
    lora_alpha: int | None = Field(default=None, ge=1, le=65536)
    """Scale; default: equal to r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the LoRA matrices; 0 is fastest."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which linear layers get LoRA: all-linear (all but the head), or their names."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full beside LoRA, such as embed_tokens and lm_head."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023)."""
    use_dora: bool = False
    """Train magnitude and direction apart (DoRA, Liu et al. 2024)."""
    init_lora_weights: Literal["default", "gaussian", "pissa", "loftq", "olora"] = "default"
    """How the LoRA matrices start; loftq goes with nf4 weights, pissa and olora with weights that are not quantised."""
    layers_to_transform: tuple[int, ...] | None = None
    """Indices of the decoder layers that get LoRA; default: all."""


class ColumnsFormat(Section):
    """Build prompt and response from columns; `[[...]]` is dropped when its first column is empty."""

    class Columns(Section):
        prompt: str
        """Text with {Column} names; [[...]] is left out when its first column is empty."""
        response: str
        """Name of the column that holds the answer."""

    columns: Columns
    """Prompt and response."""


class SourceSpec(Section):
    """One data source: a file or folder beside the spec or under datasets/, or a hub id."""

    path: Annotated[str, AfterValidator(relative_path)] = Field(min_length=1, max_length=1000)
    """File, folder or hub id."""
    weight: float = Field(default=1, gt=0, le=1000)
    """Rows are repeated (or thinned out) by this factor."""
    split: str | None = Field(default=None, max_length=200)
    """Split expression of a hub data set, such as train[:2000]."""
    revision: str | None = Field(default=None, pattern=r"^[\w./-]{1,100}$")
    """Branch, tag or commit of a hub data set."""


class EvalSpec(Section):
    """Evaluation data: a share of the training rows, or sources of their own."""

    fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the training rows kept for evaluation."""
    sources: tuple[SourceSpec, ...] = ()
    """Files or hub ids of their own."""

    @model_validator(mode="after")
    def _one_of_two(self) -> EvalSpec:
        if (self.fraction is None) == (not self.sources):
            raise ValueError("give either fraction or sources")
        return self


def _sources(value: Any) -> Any:
    if isinstance(value, (str, dict)):
        value = [value]
    if isinstance(value, (list, tuple)):
        return tuple({"path": item} if isinstance(item, str) else item for item in value)
    return value


def _data(value: Any) -> Any:
    return value if isinstance(value, dict) else {"train": value}


def _evaluation(value: Any) -> Any:
    if isinstance(value, dict) and {"fraction", "sources"} & set(value):
        return {**value, "sources": _sources(value.get("sources", ()))}
    return {"sources": _sources(value)} if isinstance(value, (str, list, dict)) else value


def _template(text: str) -> str:
    """A known name, or an example that can be read."""
    from dropforge.models.templates import ALIASES, TEMPLATES, find_template, is_custom, parse_custom

    if is_custom(text):
        parse_custom(text)
    elif text != "auto" and find_template(text) is None:
        names = [*TEMPLATES, *ALIASES]
        nearest = difflib.get_close_matches(text, names, n=1)
        raise ValueError(
            f"is not the name of a chat template{f'; did you mean {nearest[0]}?' if nearest else ''} "
            "(docs/guides/chat-templates.md lists them)"
        )
    return text


class DataSpec(Section):
    """What is learnt from."""

    train: Annotated[
        tuple[SourceSpec, ...],
        BeforeValidator(_sources, json_schema_input_type=str | SourceSpec | list[str | SourceSpec]),
    ] = Field(min_length=1)
    """Training data: a path, or several with weights."""
    eval: Annotated[
        EvalSpec | None,
        BeforeValidator(
            _evaluation, json_schema_input_type=EvalSpec | str | SourceSpec | list[str | SourceSpec] | None
        ),
    ] = None
    """Evaluation data: {fraction: 0.02}, or a path."""
    format: DataFormat | ColumnsFormat = "auto"
    """How rows are laid out; auto looks and says why."""
    template: Annotated[str, AfterValidator(_template)] = Field(default="auto", min_length=1, max_length=20_000)
    """Chat template: auto (the model's own, else chatml), a name, or an example with {INPUT} and {OUTPUT}."""
    system: str | None = Field(default=None, max_length=20_000)
    """System message for conversations that have none; also written to the Modelfile."""
    train_on: Literal["responses", "everything"] = "responses"
    """responses counts only the assistant's turns in the loss (cpt: everything)."""
    packing: Literal["auto"] | bool = "auto"
    """Join short rows into long ones; auto decides and says why."""
    mixing: Literal["repeat", "proportional"] = "repeat"
    """What the weight of a source means: how often its rows are seen per epoch, or its share of all rows."""
    deduplicate: Literal["none", "exact", "near"] = "none"
    """Drop repeated training rows: equal ones, or also those that say nearly the same."""
    contamination: Literal["warn", "remove", "fail"] = "warn"
    """What happens with training rows that stand in the evaluation data too."""
    chunk_overlap: int = Field(default=0, ge=0, le=1_000_000)
    """Tokens that consecutive pieces of a long text share; they are learnt once."""


class EarlyStopping(Section):
    """Stop when the evaluation loss has not improved for `patience` evaluations; the best weights are kept."""

    patience: int = Field(ge=1, le=1000)
    """Evaluations without improvement before it stops."""
    threshold: float = Field(default=0.0, ge=0)
    """What counts as an improvement."""


class TrainSpec(Section):
    """How it is learnt. Fields without a default are filled in by spec_defaults.py from method and adapter."""

    num_train_epochs: float | None = Field(default=None, gt=0, le=100_000)
    """Passes over the data; default 1."""
    max_steps: int | None = Field(default=None, ge=1, le=100_000_000)
    """Ends the training after so many optimizer steps; wins over num_train_epochs."""
    learning_rate: float | None = Field(default=None, gt=0, le=10)
    """Peak learning rate; default by method and adapter (LoRA sft 2e-4, full 2e-5, cpt 5e-5)."""
    embedding_learning_rate: float | None = Field(default=None, gt=0, le=10)
    """Rate of embeddings and head where they are trained; default with method cpt: a tenth of learning_rate."""
    effective_batch_size: int | None = Field(default=None, ge=1, le=1_000_000)
    """Rows per optimizer step over all devices: per_device_train_batch_size x gradient_accumulation_steps x devices."""
    per_device_train_batch_size: int | None = Field(default=None, ge=1, le=65536)
    """Rows per device and micro-batch; default: the largest of 8, 4, 2, 1 that fits the effective batch."""
    gradient_accumulation_steps: int | None = Field(default=None, ge=1, le=65536)
    """Micro-batches per optimizer step."""
    lr_scheduler_type: Scheduler = "linear"
    """Shape of the learning rate over time."""
    warmup_ratio: float | None = Field(default=None, ge=0, le=1)
    """Share of the steps in which the rate rises; default 0.05."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """The same in steps."""
    weight_decay: float = Field(default=0.001, ge=0, le=1)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are clipped to this norm; 0 switches it off."""
    optim: Optimizer = "adamw_8bit"
    """Optimizer, by transformers' names."""
    seed: int = Field(default=3407, ge=0, le=2**32 - 1)
    """Of initialisation, data order and dropout."""
    logging_steps: int = Field(default=1, ge=1)
    """Steps between two lines of metrics.jsonl."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Steps between evaluations; default: once per epoch."""
    early_stopping: EarlyStopping | None = None
    """When to stop early; needs data.eval."""
    save_minutes: float = Field(default=10, gt=0, le=10_000)
    """Minutes between checkpoints."""
    save_steps: int | None = Field(default=None, ge=1)
    """Also save every so many steps."""
    neftune_noise_alpha: float | None = Field(default=None, gt=0, le=1000)
    """Noise on the embeddings while training (NEFTune, Jain et al. 2023)."""
    on_oom: Literal["fail", "shrink"] = "fail"
    """fail, or shrink the micro-batch and go on."""
    beta: float | None = Field(default=None, ge=0, le=1000)
    """Strength of the reference in preference and RL methods."""
    loss_type: str | None = Field(default=None, pattern=r"^[a-z0-9_]{1,40}$")
    """Variant of the method's loss, by TRL's names."""
    num_generations: int | None = Field(default=None, ge=2, le=4096)
    """RL: answers sampled per prompt."""
    max_prompt_length: int | None = Field(default=None, ge=1)
    """RL: longest prompt, in tokens."""
    max_completion_length: int | None = Field(default=None, ge=1)
    """RL: longest answer, in tokens."""
    temperature: float | None = Field(default=None, gt=0, le=10)
    """RL: sampling temperature."""
    epsilon: float | None = Field(default=None, gt=0, lt=10)
    """RL: clipping range."""

    @model_validator(mode="after")
    def _no_contradiction(self) -> TrainSpec:
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError("give either warmup_ratio or warmup_steps, not both")
        batch, micro, steps = (
            self.effective_batch_size,
            self.per_device_train_batch_size,
            self.gradient_accumulation_steps,
        )
        if batch is not None and micro is not None and steps is not None and batch != micro * steps:
            raise ValueError(
                "effective_batch_size is not per_device_train_batch_size x gradient_accumulation_steps; give only two"
            )
        if batch is not None and batch % (micro or steps or 1):
            raise ValueError("effective_batch_size must be a multiple of the other batch setting")
        return self


class ResourcesSpec(Section):
    """What the job may use."""

    gpus: Annotated[int, Field(ge=1, le=1024)] | Literal["all"] = 1
    """GPUs for this job; on a machine without GPUs it runs on the CPU."""
    priority: int = Field(default=50, ge=0, le=100)
    """0 to 100; higher runs first."""
    time_limit: Annotated[float | None, BeforeValidator(_seconds, json_schema_input_type=float | str | None)] = Field(
        default=None, gt=0
    )
    """Seconds, or a text such as 90m, 12h, 2d."""


class HubSpec(Section):
    """Push the result to the hub; `secret` names the token, it never holds it."""

    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """Name of the repository."""
    private: bool = True
    """Whether others can see it."""
    secret: str = Field(default="HF_TOKEN", pattern=r"^[A-Z][A-Z0-9_]{0,63}$")
    """Name of the token in secrets/ or the environment."""
    dry_run: bool = False
    """Push nothing; `hub.json` in the result says what would be pushed where."""


class PublishSpec(Section):
    hub: HubSpec | None = None
    """Push to the Hugging Face hub."""


def _model(value: Any) -> Any:
    if isinstance(value, str):
        name, _, revision = value.partition("@")
        return {"id": name, "revision": revision} if revision else {"id": name}
    return value


class Spec(Section):
    """One job. `export` is required and belongs last, so that a half-copied file does not validate."""

    version: Literal[1]
    """Version of the spec format."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,79}$")
    """What the job and its result are called."""
    model: Annotated[ModelSpec, BeforeValidator(_model, json_schema_input_type=str | ModelSpec)]
    """The base model; a text is its id, with an optional @revision."""
    method: Method = "sft"
    """Training method: sft learns from answers, cpt from all text, the others arrive with later releases."""
    adapter: AdapterSpec = AdapterSpec()
    """What is trained."""
    data: Annotated[DataSpec, BeforeValidator(_data, json_schema_input_type=str | list[str | SourceSpec] | DataSpec)]
    """What it learns from; a text is the path of the training data."""
    train: TrainSpec = TrainSpec()
    """How it learns."""
    resources: ResourcesSpec = ResourcesSpec()
    """What the job may use, and its place in the queue."""
    publish: PublishSpec = PublishSpec()
    """Where the result is sent."""
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics go beside metrics.jsonl."""
    rerun: bool = False
    """Run although the same file is queued or running already."""
    imatrix: Annotated[str, AfterValidator(relative_path)] | None = Field(default=None, min_length=1, max_length=1000)
    """An importance matrix (llama.cpp's) for GGUF exports, named like data; default: made where a type needs it."""
    export: Annotated[
        tuple[Annotated[str, AfterValidator(check_export)], ...],
        BeforeValidator(normalise_exports, json_schema_input_type=str | list[str]),
    ] = Field(min_length=1)
    """Formats to make: adapter, merged, gguf:TYPE (several types with commas), ollama."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Spec:
        if self.train.early_stopping and self.data.eval is None:
            raise ValueError("train.early_stopping needs data.eval, for instance `eval: {fraction: 0.05}`")
        if self.imatrix is not None and not any(entry.startswith(("gguf:", "ollama")) for entry in self.export):
            raise ValueError("imatrix is for GGUF files, and none is asked for; leave it out, or export gguf:q4_k_m")
        if self.adapter.type == "full" and "adapter" in self.export:
            raise ValueError("export `adapter` needs adapter.type: lora; full fine-tuning exports `merged`")
        if self.adapter.type == "full" and self.model.quantization != "none":
            raise ValueError(
                f"adapter.type full trains every weight, which {self.model.quantization} weights cannot take; "
                "choose adapter.type: lora, or model.quantization: none"
            )
        if self.adapter.init_lora_weights == "loftq" and self.model.quantization != "nf4":
            raise ValueError(
                "adapter.init_lora_weights: loftq starts from what 4 bits lost, so it needs model.quantization: nf4"
            )
        if self.train.embedding_learning_rate is not None and not self.trains_embeddings:
            raise ValueError(
                "train.embedding_learning_rate needs trained embeddings: "
                "adapter.modules_to_save: [embed_tokens, lm_head], or adapter.type: full"
            )
        return self

    @property
    def trains_embeddings(self) -> bool:
        """Whether the embedding or the head is trained in full."""
        targets = self.adapter.target_modules
        named = {*self.adapter.modules_to_save, *(() if isinstance(targets, str) else targets)}
        return self.adapter.type == "full" or not named.isdisjoint({"embed_tokens", "lm_head"})

    @property
    def slug(self) -> str:
        """The name as it appears in ids and folders: lower-case letters, digits and dashes, at most 40."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:40].rstrip("-") or "job"

    @property
    def gguf_types(self) -> tuple[str, ...]:
        return tuple(entry.split(":")[1] for entry in self.export if entry.startswith("gguf:"))
