"""Loss and every adapter gradient of a two-layer slice against plain transformers in fp32.

Passed when the loss is within 2e-3 of fp32 (relative), every gradient has a cosine of at least 0.999, and no gradient
is further from fp32 than twice what plain transformers + PEFT in bf16 is (plus 1e-3, for gradients that bf16 hits by
luck). NF4: the fp32 model holds the same codes and multiplies in fp32.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from steps import adapters
from steps.engines import load
from steps.measure import Clock, batch_of
from steps.models import PARITY_SHAPE, BatchShape, parse_shapes, truth_name

SHAPE = parse_shapes(PARITY_SHAPE)[0]
TINY_SHAPE = BatchShape(2, 48)
LOSS_TOLERANCE = 2e-3
LEAST_COSINE = 0.999
"""Of transformers + PEFT in bf16 the worst is about 0.9992 at this length (an error of 4% on an H200)."""
MOST_TIMES, SLACK = 2.0, 1e-3


def one_step(engine: str, path: Path, *, weights: str, device: str) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradients) of one seeded batch, a third of it not learnt. fp32 weights: without autocast and TF32."""
    exact = weights.endswith("fp32")
    loaded = load(engine, path, weights=weights, device=device, longest=4096)
    try:
        vocabulary = min(int(loaded.model.config.vocab_size), 128000)
        shape = SHAPE if device == "cuda" else TINY_SHAPE
        loaded.prepare(shape)
        batch = batch_of(shape, vocabulary, device, 7)
        labels = batch["input_ids"].clone()
        labels[:, : shape.length // 3] = -100
        with torch.autocast(device, dtype=torch.bfloat16, enabled=not exact):
            loss = loaded.model(input_ids=batch["input_ids"], labels=labels).loss
        loss.backward()
        return float(loss.detach()), adapters.gradients(loaded.model)
    finally:
        loaded.close()
        del loaded
        Clock(device).clear()


def write_truth(path: Path, target: Path, *, weights: str, device: str) -> None:
    """The fp32 answer and how far plain bf16 is from it, into ``target``."""
    torch.backends.cuda.matmul.allow_tf32 = False
    loss, grads = one_step("hf", path, weights="nf4-fp32" if weights == "nf4" else "fp32", device=device)
    bf16_loss, bf16_grads = one_step("hf", path, weights=weights, device=device)
    errors = {key: distance(bf16_grads[key], grads[key]) for key in grads}
    torch.save({"loss": loss, "grads": grads, "errors": errors, "bf16_loss": bf16_loss}, target)


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((found - truth).norm() / truth.norm())


def compare(engine: str, path: Path, truth_file: Path, *, weights: str, device: str) -> dict[str, object]:
    """The verdict on one engine: ``passed``, ``text`` for the CSV, and the numbers behind it."""
    truth = torch.load(truth_file, weights_only=True)
    loss, grads = one_step(engine, path, weights=weights, device=device)
    loss_error = abs(loss - truth["loss"]) / abs(truth["loss"])
    cosines, times = {}, {}
    for key, exact in truth["grads"].items():
        assert exact.norm() > 0, f"the reference gradient of {key} is zero"
        cosines[key] = float(torch.nn.functional.cosine_similarity(grads[key].flatten(), exact.flatten(), dim=0))
        times[key] = (distance(grads[key], exact) - SLACK) / truth["errors"][key]
    worst_cosine, worst = min(cosines, key=cosines.__getitem__), max(times, key=times.__getitem__)
    finite = all(torch.isfinite(g).all() for g in grads.values()) and loss == loss
    passed = finite and loss_error <= LOSS_TOLERANCE and cosines[worst_cosine] >= LEAST_COSINE
    passed = bool(passed and times[worst] <= MOST_TIMES)
    text = (
        f"{'ok' if passed else 'FAILED'}: loss {loss_error:.1e}, cosine {cosines[worst_cosine]:.5f} ({worst_cosine}), "
        f"error {times[worst]:.2f} x bf16's ({worst})"
    )
    return {"passed": passed, "text": text, "loss": loss, "truth": truth["loss"], "bf16_loss": truth["bf16_loss"]}


def verdict(engine: str, folder: Path, path: Path, *, weights: str, device: str) -> dict[str, object]:
    """``compare``, remembered in ``folder`` for the later processes of one session."""
    file = _verdict_file(engine, folder, weights)
    truth = folder / truth_name(weights)
    if not truth.exists():
        write_truth(path, truth, weights=weights, device=device)
    found = compare(engine, path, truth, weights=weights, device=device)
    file.write_text(json.dumps(found))
    return found


def remembered(engine: str, folder: Path, *, weights: str) -> dict[str, object] | None:
    """The verdict of an earlier process, or None."""
    file = _verdict_file(engine, folder, weights)
    return json.loads(file.read_text()) if file.exists() else None


def _verdict_file(engine: str, folder: Path, weights: str) -> Path:
    return folder / f"parity-{engine.replace(':', '-')}-{weights}-{PARITY_SHAPE}.json"
