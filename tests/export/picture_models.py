"""Tiny random models that read text and pictures, one per family, as folders like those of the hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEED = 20_261_201
TEXT = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048,
}  # fmt: skip


@dataclass(frozen=True)
class PictureFamily:
    """One family: its classes in transformers, its vocabulary, and what its tower and processor are like."""

    config: str
    text: str
    vision: str
    model: str
    processor: str
    image_processor: str
    tokenizer: str
    template: str
    eos: str
    markers: dict[str, str]
    text_changes: dict[str, Any] = field(default_factory=dict)
    vision_fields: dict[str, Any] = field(default_factory=dict)
    top: Callable[[Any], dict[str, Any]] = lambda tokenizer: {}
    processing: dict[str, Any] = field(default_factory=dict)
    processor_fields: dict[str, Any] = field(default_factory=dict)
    hub_names: dict[str, str] = field(default_factory=dict)
    """Starts of names that published checkpoints write otherwise than this transformers does."""


def _id(tokenizer: Any, text: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(text))


FAMILIES = {
    "gemma3": PictureFamily(
        config="Gemma3Config", text="Gemma3TextConfig", vision="SiglipVisionConfig",
        model="Gemma3ForConditionalGeneration", processor="Gemma3Processor", image_processor="Gemma3ImageProcessorPil",
        tokenizer="llama", template="gemma", eos="<end_of_turn>",
        markers={"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        # llama.cpp scales attention by 1 / sqrt(head_dim); the GGUF has no place for another factor.
        text_changes={"query_pre_attn_scalar": 64, "tie_word_embeddings": True, "sliding_window": 512},
        vision_fields={
            "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 112, "patch_size": 14, "vision_use_head": False,
        },
        top=lambda tokenizer: {
            "mm_tokens_per_image": 16, "image_token_index": _id(tokenizer, "<image_soft_token>"),
            "boi_token_index": _id(tokenizer, "<start_of_image>"), "eoi_token_index": _id(tokenizer, "<end_of_image>"),
        },
        processing={"size": {"height": 112, "width": 112}, "image_seq_length": 16},
        processor_fields={"image_seq_length": 16}, hub_names={"vision_tower.": "vision_tower.vision_model."},
    ),
    "qwen2_5_vl": PictureFamily(
        config="Qwen2_5_VLConfig", text="Qwen2_5_VLTextConfig", vision="Qwen2_5_VLVisionConfig",
        model="Qwen2_5_VLForConditionalGeneration", processor="Qwen2_5_VLProcessor",
        image_processor="Qwen2VLImageProcessorPil", tokenizer="qwen", template="chatml", eos="<|im_end|>",
        markers={
            "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>",
            "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
        },
        text_changes={
            "tie_word_embeddings": False, "use_sliding_window": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        },
        vision_fields={
            "hidden_size": 128, "out_hidden_size": 256, "intermediate_size": 256, "depth": 3, "num_heads": 4,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        top=lambda tokenizer: {
            "image_token_id": _id(tokenizer, "<|image_pad|>"), "video_token_id": _id(tokenizer, "<|video_pad|>"),
            "vision_start_token_id": _id(tokenizer, "<|vision_start|>"),
            "vision_end_token_id": _id(tokenizer, "<|vision_end|>"),
        },
        processing={
            "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 3136, "max_pixels": 1003520,
        },
    ),
    "mistral3": PictureFamily(
        config="Mistral3Config", text="MistralConfig", vision="PixtralVisionConfig",
        model="Mistral3ForConditionalGeneration", processor="PixtralProcessor",
        image_processor="PixtralImageProcessorPil", tokenizer="llama", template="chatml-bos", eos="<|im_end|>",
        markers={"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
        text_changes={"tie_word_embeddings": False, "sliding_window": None},
        vision_fields={
            "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": 448, "patch_size": 14, "head_dim": 32, "hidden_act": "silu",
        },
        top=lambda tokenizer: {
            "image_token_index": _id(tokenizer, "[IMG]"), "spatial_merge_size": 2, "vision_feature_layer": -1,
            "projector_hidden_act": "gelu", "multimodal_projector_bias": False,
        },
        processing={"patch_size": {"height": 28, "width": 28}, "size": {"longest_edge": 448}},
        processor_fields={"patch_size": 14, "spatial_merge_size": 2},
    ),
    "llava": PictureFamily(
        config="LlavaConfig", text="LlamaConfig", vision="CLIPVisionConfig",
        model="LlavaForConditionalGeneration", processor="LlavaProcessor", image_processor="CLIPImageProcessorPil",
        tokenizer="llama", template="chatml-bos", eos="<|im_end|>", markers={"image_token": "<image>"},
        text_changes={"tie_word_embeddings": False},
        vision_fields={
            "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": 112, "patch_size": 14, "projection_dim": 64,
        },
        top=lambda tokenizer: {
            "image_token_index": _id(tokenizer, "<image>"), "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default", "image_seq_length": 64,
        },
        processing={"size": {"shortest_edge": 112}, "crop_size": {"height": 112, "width": 112}},
        processor_fields={
            "patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
        },
    ),
}  # fmt: skip


def write_model(name: str, folder: Path, *, seed: int = SEED) -> None:
    """Configuration, weights, tokenizer and processor files of one family into the existing empty folder."""
    import torch
    import transformers

    family = FAMILIES[name]
    tokenizer = _tokenizer(family)
    tokenizer.save_pretrained(folder)
    end = _id(tokenizer, family.eos)
    text = getattr(transformers, family.text)(
        **{**TEXT, **family.text_changes}, vocab_size=len(tokenizer), eos_token_id=end,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = getattr(transformers, family.vision)(**family.vision_fields)
    config = getattr(transformers, family.config)(
        text_config=text.to_dict(), vision_config=vision.to_dict(), **family.top(tokenizer),
        tie_word_embeddings=family.text_changes.get("tie_word_embeddings", False),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = getattr(transformers, family.model)(config)
    _spread(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    _rename(folder / "model.safetensors", family.hub_names)
    image_processor = getattr(transformers, family.image_processor)(**family.processing)
    image_processor.save_pretrained(folder)
    _write_processor(family, folder, tokenizer, image_processor)


def _write_processor(family: PictureFamily, folder: Path, tokenizer: Any, image_processor: Any) -> None:
    """processor_config.json; those of some families need torchvision, and older checkpoints have none."""
    import transformers

    try:
        processor = getattr(transformers, family.processor)(
            image_processor=image_processor, tokenizer=tokenizer, **family.processor_fields
        )
    except (ImportError, TypeError):
        return
    processor.chat_template = tokenizer.chat_template
    processor.save_pretrained(folder)


def _tokenizer(family: PictureFamily) -> Any:
    from dropforge.models.builtin_tokenizers import llama_tokenizer, qwen_tokenizer
    from dropforge.models.templates import TEMPLATES

    tokenizer: Any = {"llama": llama_tokenizer, "qwen": qwen_tokenizer}[family.tokenizer]()
    if family.tokenizer == "llama":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.markers.values())})
    tokenizer.eos_token = family.eos
    tokenizer._set_model_specific_special_tokens(family.markers)
    tokenizer.chat_template = TEMPLATES[family.template].text
    return tokenizer


def _spread(model: Any) -> None:
    """Random numbers of a size that keeps every part audible: with the default 0.02 the tower hardly says anything."""
    import torch

    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel() if "embed" not in name or "patch" in name else 2500
                parameter.normal_(0.0, fan_in**-0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def _rename(path: Path, names: dict[str, str]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    for old, new in names.items():
        tensors = {new + name[len(old) :] if name.startswith(old) else name: value for name, value in tensors.items()}
    save_file({name: value.clone() for name, value in tensors.items()}, path, metadata={"format": "pt"})


def picture_bench(name: str, folder: Path, *, spec: Any = None, seed: int = SEED) -> Any:
    """An export bench of a family: its base, the adapter that a training on text attaches, with random numbers."""
    import torch
    from dropforge.models.load import attach_adapter
    from dropforge.models.pictures import auto_class
    from dropforge.models.tokenizer import load_tokenizer
    from dropforge.spec import AdapterSpec
    from export_harness import Bench

    bench = Bench(name=name, folder=folder)
    bench.base.mkdir(parents=True)
    write_model(name, bench.base, seed=seed)
    load_tokenizer(bench.base)[0].save_pretrained(bench.tokenizer)
    model = auto_class(bench.base).from_pretrained(bench.base, dtype=torch.float32)
    model = attach_adapter(model, spec or AdapterSpec(r=8, lora_alpha=16), seed=0, checkpointing=False)
    generator = torch.Generator().manual_seed(0)
    for weight, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in weight:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(bench.adapter)
    bench.result.path.mkdir()
    return bench


def load(folder: Path) -> Any:
    """The whole model in a folder, in its stored type."""
    from dropforge.models.pictures import auto_class

    return auto_class(folder).from_pretrained(folder)
