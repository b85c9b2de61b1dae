"""The load probe: decode small trees and compare with plain attention of the same weights.

Some models cannot be served from a token tree and do not say so: recurrent layers read the rows of
a forward as one sequence, chunked attention ignores our context. They give wrong log-probs without
an error, so every model is tried before it serves, in two parts:

1. a small random model of the same class (``rollout.shrink``) in float64: every kind of layer,
   paths longer than its windows, to rounding. Where the engine's back end does not take float64,
   once more in the engine's own dtype.
2. the real weights on a short tree, within the rounding of their dtype.

Both drive an engine as its users do: a prompt in chunks, forks, segments sampled token by token.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedModel

from rollout.attention.choose import choose_back_end
from rollout.extend import ExtendSpec
from rollout.settings import EngineSettings
from rollout.shrink import WINDOW, shrunk_model
from rollout.support import refusal, refuse_unsupported

if TYPE_CHECKING:
    from rollout.engine import Engine

# Largest difference of log-probs allowed, as a share of their spread over the vocabulary. What
# rounds in float64 is the families' own fp32 casts (norms, rotary angles, eager attention's
# softmax) and the float32 record.
_TOLERANCE = {
    torch.float64: 1e-4,
    torch.float32: 2e-3,
    torch.float16: 0.05,
    torch.bfloat16: 0.25,
}
_PROMPT = 2 * WINDOW + 5
_SMALL_SLOTS = 192
_SHORTEST_POOL = 64


def probe(engine: Engine) -> None:
    """Refuse a model that the engine cannot serve.

    Raises:
        ValueError: by its structure, by its numbers, or because its forward fails.
    """
    refuse_unsupported(engine.model)
    if engine.pool.num_slots < _SHORTEST_POOL:
        raise ValueError(
            f"num_kv_slots={engine.pool.num_slots} is too small for the load probe: give at least "
            f"{_SHORTEST_POOL}"
        )
    was_tried = [_try_small(engine, dtype, settings) for dtype, settings in _small_runs(engine)]
    config = engine.model.config.get_text_config()
    length = 12
    window = getattr(config, "sliding_window", None)
    if not all(was_tried) and window and window + 2 * length <= min(engine.pool.num_slots, 512):
        length += window
    error = tree_error(engine, config.vocab_size, length)
    _check(engine.model, error, engine.model.dtype, "with its own weights")


def _small_runs(engine: Engine) -> Iterator[tuple[torch.dtype, EngineSettings]]:
    """Dtype and settings of each run of the small model."""
    device, dtype = engine.pool.device, engine.model.dtype
    small = replace(
        engine.settings,
        num_kv_slots=_SMALL_SLOTS,
        max_running_requests=8,
        max_tokens_per_step=_PROMPT - WINDOW,  # prompts come in chunks
        pack_weights=False,
        cuda_graphs=False,  # the real weights try them
    )
    back_end = choose_back_end(small.attention, device, dtype)
    takes_float64 = back_end in ("cpu", "reference")
    exact = small.attention if takes_float64 else "cpu"
    yield torch.float64, replace(small, dtype="float64", attention=exact)
    if not takes_float64:
        yield dtype, replace(small, attention=back_end)


def _try_small(engine: Engine, dtype: torch.dtype, settings: EngineSettings) -> bool:
    """Try a small model of the class; False if none can be made."""
    from rollout.engine import Engine as SmallEngine

    try:
        small = shrunk_model(engine.model, dtype)
    except ValueError as reason:
        warnings.warn(
            f"the load probe tries {type(engine.model).__name__} with its own weights on short "
            f"paths alone: no small model of its class can be made ({reason})",
            stacklevel=4,
        )
        return False
    tried = SmallEngine(small, settings, load_probe=False)
    error = tree_error(tried, small.config.vocab_size, _PROMPT)
    _check(engine.model, error, dtype, "in a small model of its class")
    return True


def _check(model: PreTrainedModel, error: float, dtype: torch.dtype, where: str) -> None:
    allowed = _TOLERANCE[dtype]
    if not error <= allowed:
        raise refusal(
            model,
            f"log-probs of a small tree differ from plain attention by {error:.2g} of their spread "
            f"{where} (allowed {allowed:g})",
        )


def tree_error(engine: Engine, vocabulary: int, prompt_length: int) -> float:
    """Largest difference between the log-probs of a sampled tree and plain attention's, as a share
    of their spread over the vocabulary. The engine must be idle, and is left as it was.

    Raises:
        ValueError: the model's forward fails with tree attention.
    """
    prompt = np.random.default_rng(0).integers(0, vocabulary, prompt_length).astype(np.int32)
    model, spec = engine.model, ExtendSpec(max_tokens=5)
    root = engine.prefill(prompt)
    nodes = [root]
    try:
        scored = [(prompt, engine.score_path(prompt)[1:])]
        forks = list(engine.extend([(root, spec, key) for key in (1, 2)]))
        nodes += [fork.node for fork in forks]
        tips = list(engine.extend([(forks[0].node, spec, key) for key in (3, 4)]))
        nodes += [tip.node for tip in tips]
        scored += [(c.node.path_token_ids(), c.logprobs) for c in (*forks, *tips)]
    except NotImplementedError as error:
        raise refusal(model, str(error)) from error
    except (TypeError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        what = f"its forward failed with tree attention ({type(error).__name__}: {error})"
        raise refusal(model, what) from error
    finally:
        for node in reversed(nodes):
            engine.free(node, drop=True)
    return max(_difference(model, path, found) for path, found in scored)


def _difference(model: PreTrainedModel, token_ids: np.ndarray, found: np.ndarray) -> float:
    """Of the log-probs ``found`` of a path's last tokens, see ``tree_error``."""
    table = plain_logprobs(model, token_ids)[-len(found) - 1 : -1]
    expected = table[np.arange(len(found)), token_ids[-len(found) :]]
    return float(np.abs(expected - found).max() / max(table.std(axis=1).mean(), 1e-12))


@torch.inference_mode()
def plain_logprobs(model: PreTrainedModel, token_ids: np.ndarray) -> np.ndarray:
    """float64 [n, V] after each token, by transformers' own attention over the whole path."""
    before = model.config._attn_implementation
    model.set_attn_implementation(plain_attention(model))
    try:
        ids = torch.from_numpy(token_ids.astype(np.int64)).to(model.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    finally:
        model.set_attn_implementation(before)
    return torch.log_softmax(logits.double(), dim=-1).cpu().numpy()


def plain_attention(model: PreTrainedModel) -> str:
    """``sdpa`` where it computes the same (it is exact in float64), ``eager`` where there is a soft
    cap or a sink, which sdpa leaves out.
    """
    config = model.config.get_text_config()
    has_softcap = getattr(config, "attn_logit_softcapping", None) is not None
    has_sinks = any("sinks" in name for name, _ in model.named_parameters())
    return "eager" if has_softcap or has_sinks or not model._supports_sdpa else "sdpa"
