"""Training and inference mode of a loaded model: kernels in or out, recomputation, cache, padding side."""

from __future__ import annotations

import logging
from typing import Any

from dropforge.errors import ModelError
from dropforge.fast.state import ModelState, needed_state

LOG = logging.getLogger("dropforge")


def to_training(model: Any, use_gradient_checkpointing: bool | str | None = None) -> Any:
    """Training mode: layers recomputed as asked, no cache, kernels swapped in. Returns the model itself."""
    state = needed_state(model)
    if use_gradient_checkpointing is not None:
        state.checkpointing = bool(use_gradient_checkpointing)
    model.train()
    model.config.use_cache = False
    state.tokenizer.padding_side = "right"
    if state.checkpointing and model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    elif model.supports_gradient_checkpointing:
        model.gradient_checkpointing_disable()
    _open_session(model, state)
    return model


def to_inference(model: Any) -> Any:
    """Evaluation mode: cache on, nothing recomputed, left padding, transformers' own code. Returns the model."""
    state = needed_state(model)
    if state.session is not None:
        # Not closed: a trainer may have wrapped a forward meanwhile, and then it could not be swapped again.
        state.session.pause()
    model.eval()
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_disable()
    model.config.use_cache = True
    state.tokenizer.padding_side = "left"
    return model


def _open_session(model: Any, state: ModelState) -> None:
    from dropforge_kernels.patch.host_embedding import OffloadError
    from dropforge_kernels.patch.session import open_session
    from dropforge_kernels.patch.spec import PatchError

    if state.session is not None and state.session.resume():
        return
    on_gpu = next(model.parameters()).is_cuda
    # On a CPU the operations are plain PyTorch too, so swapping gains nothing; "required" is for tests and the curious.
    policy = state.kernels if on_gpu or state.kernels == "required" else "off"
    try:
        state.session = open_session(
            model, policy=policy, offload_embedding=state.offload_embedding, tiled_mlp=state.tiled_mlp
        )
    except OffloadError as error:
        raise ModelError(
            "this model's embedding cannot be held in host memory", code="api-offload-embedding",
            where="offload_embedding", why=str(error), fix="leave offload_embedding out",
        ) from error  # fmt: skip
    except PatchError as error:
        raise ModelError(
            "this model cannot run on the kernels alone", code="api-kernels-required", where="kernels", why=str(error),
            fix="kernels='auto' uses them where they fit",
        ) from error  # fmt: skip
    for line in state.session.report.lines():
        LOG.info("%s", line)
