"""Export an 8B-shaped random model to q4_k_m and FP8: wall time per stage, memory peak, and FP8 generating in vLLM.

    python tests/export/gpu_export_8b.py --shape 8b --folder /tmp/export-8b --out results.json

Needs the built llama.cpp (DROPFORGE_LLAMA_CPP) and about 90 GB of disk for 8b. vLLM is asked when it can be imported;
without it (or without a GPU) the result says so. Memory is sampled over the whole process tree five times a second:
*anonymous* is what cannot be given back; *resident* also counts pages of mapped files, which the kernel takes back when
memory is short.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import sys
import threading
import time
import warnings
from pathlib import Path

SHAPES = {
    # Llama 3.1 8B, Llama 3.2 1B, and one small enough to try the script itself.
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048},
}  # fmt: skip
PROJECTIONS = {
    "self_attn.q_proj": ("hidden", "hidden"), "self_attn.k_proj": ("kv", "hidden"), "self_attn.v_proj": ("kv", "hidden"),
    "self_attn.o_proj": ("hidden", "hidden"), "mlp.gate_proj": ("inner", "hidden"), "mlp.up_proj": ("inner", "hidden"),
    "mlp.down_proj": ("hidden", "inner"),
}  # fmt: skip


class Memory:
    """Peaks of the process tree's memory while it is watched."""

    def __init__(self) -> None:
        self.peaks = {"anonymous": 0, "resident": 0}
        self._stop = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def reset(self) -> dict[str, float]:
        """The peaks since the last call, in GiB."""
        found = {name: round(value / 2**30, 3) for name, value in self.peaks.items()}
        self.peaks = {"anonymous": 0, "resident": 0}
        return found

    def _watch(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._stop.wait(0.2):
            anonymous = resident = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    status = Path(f"/proc/{process.pid}/status").read_text()
                except OSError:
                    continue
                values = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith("Rss")}
                anonymous += 1024 * (int(values.get("RssAnon", 0)) + int(values.get("RssShmem", 0)))
                resident += 1024 * sum(map(int, values.values()))
            self.peaks["anonymous"] = max(self.peaks["anonymous"], anonymous)
            self.peaks["resident"] = max(self.peaks["resident"], resident)


def make_base(folder: Path, shape: dict) -> int:
    """Random bfloat16 weights in shards of at most 4 GB, written one tensor at a time; returns the parameters."""
    import torch
    from dropforge.export.safetensors_stream import write_file
    from dropforge.models.builtin import build_builtin
    from transformers import LlamaConfig, LlamaForCausalLM

    build_builtin("tiny-llama", folder)
    (folder / "model.safetensors").unlink()
    config = LlamaConfig(**shape, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if shape.get("tie_word_embeddings"):
        shapes.pop("lm_head.weight")
    groups: list[dict] = [{}]
    size = 0
    for name, extent in sorted(shapes.items()):
        count = 2 * torch.Size(extent).numel()
        if groups[-1] and size + count > 4e9:
            groups.append({})
            size = 0
        groups[-1][name] = extent
        size += count

    def tensor(name: str):
        if "norm" in name:
            return torch.ones(shapes[name])
        # Random tables repeated: normal numbers for 8 billion weights would take longer than the export.
        table = torch.randn(1_000_003, generator=torch.Generator().manual_seed(hash(name) % 2**31)) * 0.02
        count = torch.Size(shapes[name]).numel()
        return table.to(torch.bfloat16).repeat(count // len(table) + 1)[:count].reshape(shapes[name])

    weight_map = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_file(folder / file, group, dtype=torch.bfloat16, tensor=tensor)
        weight_map.update(dict.fromkeys(group, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(torch.Size(extent).numel() for extent in shapes.values())


def make_adapter(folder: Path, shape: dict) -> None:
    """A random rank-16 adapter on every projection."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    sides = {
        "hidden": shape["hidden_size"], "inner": shape["intermediate_size"],
        "kv": shape["hidden_size"] // shape["num_attention_heads"] * shape["num_key_value_heads"],
    }  # fmt: skip
    names = [name.rpartition(".")[2] for name in PROJECTIONS]
    LoraConfig(r=16, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM").save_pretrained(folder)
    tensors = {}
    for layer in range(shape["num_hidden_layers"]):
        for name, (out, inside) in PROJECTIONS.items():
            start = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{start}.lora_A.weight"] = torch.randn(16, sides[inside]) * 0.02
            tensors[f"{start}.lora_B.weight"] = torch.randn(sides[out], 16) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def run(folder: Path, *, shape_name: str, kinds: tuple[str, ...], whole_bytes: int | None) -> dict:
    from dropforge.export import ExportRequest, export_one, reference
    from dropforge.export.stage import Stage
    from dropforge.paths import ResultFolder
    from transformers import AutoTokenizer

    if whole_bytes is not None:
        reference.WHOLE_BYTES = whole_bytes
    shape = SHAPES[shape_name]
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    started = time.monotonic()
    parameters = make_base(base, shape)
    make_adapter(adapter, shape)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "tokenizer")
    found = {
        "shape": shape_name,
        "parameters": parameters,
        "made_in_s": round(time.monotonic() - started, 1),
        "stages": [],
    }
    memory = Memory()
    last = ["start", time.monotonic()]

    def log(text: str) -> None:
        found["stages"].append({"stage": last[0], "s": round(time.monotonic() - last[1], 1), **memory.reset()})
        last[:] = [text, time.monotonic()]
        print(f"{time.monotonic() - started:8.1f} s  {text}", flush=True)

    request = ExportRequest(
        base_path=base, adapter=adapter, tokenizer=folder / "tokenizer", result=ResultFolder(folder / "result"),
        work=folder / "work", kinds=kinds, name="Random", slug="random", model_id=f"random:{shape_name}",
    )  # fmt: skip
    request.result.path.mkdir()
    stage = Stage(request, log=log)
    found["exports"] = [export_one(stage, kind).as_dict() for kind in kinds]
    log("end")
    found["peak"] = {name: max(stage[name] for stage in found["stages"]) for name in ("anonymous", "resident")}
    return found


def generate_in_vllm(folder: Path) -> dict:
    """A few tokens out of the FP8 folder; not for answers (the weights are random) but for loading and kernels."""
    if importlib.util.find_spec("vllm") is None:
        return {"ran": False, "why": "vllm is not installed"}
    from vllm import LLM, SamplingParams

    started = time.monotonic()
    model = LLM(str(folder), enforce_eager=True, max_model_len=512, gpu_memory_utilization=0.5)
    loaded = time.monotonic() - started
    outputs = model.generate([{"prompt_token_ids": [1, 20, 30, 40]}] * 4, SamplingParams(max_tokens=16, temperature=0))
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return {
        "ran": True,
        "load_s": round(loaded, 1),
        "tokens": tokens[0],
        "all_equal": all(t == tokens[0] for t in tokens),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder, made anew")
    parser.add_argument("--out", type=Path, required=True, help="where the numbers go, as JSON")
    parser.add_argument("--kinds", default="merged,gguf:q4_k_m,fp8")
    parser.add_argument("--whole-bytes", type=int, help="float32 bytes up to which a model is held in memory")
    parser.add_argument("--keep", action="store_true", help="leave the folder")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    found = run(
        options.folder, shape_name=options.shape, kinds=tuple(options.kinds.split(",")), whole_bytes=options.whole_bytes
    )
    fp8 = options.folder / "result" / "fp8"
    found["vllm"] = generate_in_vllm(fp8) if fp8.exists() else {"ran": False, "why": "no fp8 folder"}
    found["machine"] = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    options.out.write_text(json.dumps(found, indent=1))
    print(json.dumps({key: found[key] for key in ("parameters", "peak", "vllm")}))
    if not options.keep:
        shutil.rmtree(options.folder)
    return 0 if all(entry["ok"] for entry in found["exports"]) else 1


if __name__ == "__main__":
    sys.exit(main())
