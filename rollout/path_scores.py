"""Log-probs of a given path under the weights in force, through the pool and the tree attention."""

from __future__ import annotations

import numpy as np
import torch

from rollout.attention.base import Block
from rollout.forward import TreeForward
from rollout.sampler import log_probabilities
from rollout.store import TreeStore

_CHUNK = 256  # query rows of one forward


def path_logprobs(
    store: TreeStore,
    forward: TreeForward,
    token_ids: np.ndarray,
    temperature: float,
    *,
    budget: int,
    may_break: bool,
) -> np.ndarray:
    """float32 [n]: log-prob of each token given the ones before it; 0 for the first. Reads no cache
    and leaves none.

    Args:
        token_ids: int32 [n], n >= 2.
        budget: most rows of one forward.
        may_break: soft handles may lose their keys and values for it.

    Raises:
        ValueError: slots are short.
    """
    count = len(token_ids)
    node = store.tree.insert_private(store.root, token_ids)
    store.tree.lock(node)
    if not store.give_slots(node, may_break=may_break):
        store.discard(node)
        raise ValueError(store.too_small(f"scoring {count} tokens"))
    targets = torch.from_numpy(token_ids.astype(np.int64)).to(store.pool.device)
    # At least two chunks, so that the pool is read.
    chunk = min(_CHUNK, budget, (count + 1) // 2)
    scores = [torch.zeros(1)]
    try:
        for lo in range(0, count - 1, chunk):
            hi = min(lo + chunk, count - 1)
            logits = forward.logits([Block(node, lo, hi, token_ids[lo:hi])])
            wanted = targets[lo + 1 : hi + 1]
            scores.append(log_probabilities(logits, wanted, temperature).cpu())
    finally:
        store.discard(node)
    return torch.cat(scores).numpy()
