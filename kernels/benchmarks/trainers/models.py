"""Random checkpoints of true architectures, with a small tokenizer: speed needs no trained weights.

PYTHONPATH=appliance:kernels python3 -m benchmarks.trainers.models DIR qwen3-0.6b qwen3-4b llama-3.1-8b
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

LLAMA_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
QWEN: dict[str, Any] = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
                        "max_position_embeddings": 40960}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-0.6b": ("qwen3", {**QWEN, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                             "num_attention_heads": 16}),
    "qwen3-4b": ("qwen3", {**QWEN, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                           "num_attention_heads": 32}),
    "llama-3.1-8b": ("llama", {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
                               "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                               "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_parameters": LLAMA_ROPE,
                               "tie_word_embeddings": False}),
    "tiny": ("qwen3", {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                       "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                       "max_position_embeddings": 8192, "tie_word_embeddings": True}),
}  # fmt: skip
"""Name -> transformers' model type and configuration."""


def write(name: str, folder: Path) -> Path:
    """The checkpoint in ``folder / name``, in bf16; made once."""
    out = folder / name
    if (out / "tokenizer.json").exists():
        return out
    from transformers import AutoConfig, AutoModelForCausalLM

    family, fields = MODELS[name]
    config = AutoConfig.for_model(family, **fields, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(out, max_shard_size="5GB")
    _tokenizer().save_pretrained(out)
    return out


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def main() -> None:
    """Write the named checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+", choices=sorted(MODELS))
    args = parser.parse_args()
    for name in args.names:
        print(write(name, args.folder), flush=True)


if __name__ == "__main__":
    main()
