"""vLLM on a GPU is asked what an FP8 folder predicts; run by gpu_export_8b.py with vLLM's own PYTHONPATH.

    python ask_vllm.py FOLDER PROMPTS.json ANSWERS

PROMPTS is a list of lists of token ids. ANSWERS.npy gets the log-probabilities of the token after each, float32
[prompts, vocabulary], NaN where vLLM listed none; ANSWERS.json eight greedy continuations of the first, and the times.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

# One process, and no kernels that are compiled at first use: neither changes what is predicted.
SETTINGS = {
    "HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_DEEP_GEMM": "0",
}  # fmt: skip
STEPS = 64


def main(arguments: list[str]) -> int:
    folder, prompts, answers = map(Path, arguments)
    os.environ.update(SETTINGS)
    import numpy as np
    import torch
    import vllm

    asked = json.loads(prompts.read_text())
    started = time.monotonic()
    # The tokenizer is not what is tried: the vocabulary of a random model is larger than any tokenizer at hand.
    model = vllm.LLM(
        str(folder), enforce_eager=True, max_model_len=1024, gpu_memory_utilization=0.5, max_logprobs=-1, seed=0,
        skip_tokenizer_init=True,
    )  # fmt: skip
    loaded = time.monotonic() - started
    one = vllm.SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": ids} for ids in asked], one)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    rows = np.full((len(asked), vocabulary), np.nan, dtype=np.float32)
    for row, output in zip(rows, outputs, strict=True):
        for token, value in output.outputs[0].logprobs[0].items():
            row[token] = value.logprob
    np.save(answers.with_suffix(".npy"), rows)
    started = time.monotonic()
    long = vllm.SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": asked[0]}] * 8, long)
    found = {
        "vllm": vllm.__version__, "torch": torch.__version__, "gpu": torch.cuda.get_device_name(0),
        "quantization": str(model.llm_engine.model_config.quantization), "load_s": round(loaded, 1),
        "generate_8x64_s": round(time.monotonic() - started, 2),
        "greedy": [list(output.outputs[0].token_ids) for output in outputs],
    }  # fmt: skip
    answers.with_suffix(".json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
