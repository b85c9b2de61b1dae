"""The load probe: decode a small tree and compare it with plain attention of the same weights.

Some models cannot be served from a token tree and do not say so: recurrent and linear-attention
layers read the rows of a forward as one sequence, chunked attention ignores our context. They give
wrong log-probs without an error, so every model is tried before it serves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from rollout.attention.base import NAME, Block

if TYPE_CHECKING:
    from rollout.engine import Engine

# Largest difference of logits allowed, as a share of their own spread over the vocabulary.
_TOLERANCE = {
    torch.float64: 1e-3,  # plain attention takes its softmax in fp32
    torch.float32: 1e-3,
    torch.float16: 0.05,
    torch.bfloat16: 0.25,
}


def probe(engine: Engine) -> None:
    """Compare tree decoding with plain attention.

    Raises:
        ValueError: they differ, or the model cannot run on tree attention at all.
    """
    name = type(engine.model).__name__
    paths, found = _tree_logits(engine)
    for path, logits in zip(paths, found, strict=True):
        plain = _plain_logits(engine, path)
        spread = plain.std(dim=-1).mean().clamp_min(1e-12)
        error = float((logits.double() - plain.double()).abs().max() / spread)
        allowed = _TOLERANCE[engine.model.dtype]
        if not error <= allowed:
            raise ValueError(
                f"model {name} cannot be served by the tree engine: decoding a small tree differs "
                f"from plain attention by {error:.2g} of the logits' spread (allowed {allowed:g}). "
                "Recurrent, linear-attention and chunked-attention layers are not supported"
            )


def _tree_logits(engine: Engine) -> tuple[list[np.ndarray], list[torch.Tensor]]:
    """Decode a trunk, two forks and a grandchild; logits of every token on the paths to the two
    tips.
    """
    tree, vocabulary = engine.tree, engine.model.config.get_text_config().vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, 64).astype(np.int32)
    trunk_length = _trunk_length(engine)
    trunk = tree.insert_private(tree.root(engine.policy_version), np.resize(ids, trunk_length))
    left = tree.insert_private(trunk, ids[20:25])
    right = tree.insert_private(trunk, ids[30:37])
    tip = tree.insert_private(left, ids[40:44])
    nodes = [trunk, left, right, tip]
    for node in nodes:
        slots = engine.pool.allocate(len(node.token_ids))
        if slots is None:
            raise ValueError(
                f"num_kv_slots={engine.pool.num_slots} is too small for the load probe: give at "
                "least 64"
            )
        tree.set_slots(node, slots)
    half = trunk_length // 2
    try:
        first = engine.block_logits([Block(trunk, 0, half, trunk.token_ids[:half])])
        second = engine.block_logits([Block(trunk, half, trunk_length, trunk.token_ids[half:])])
        third = engine.block_logits([_whole(node) for node in (left, right, tip)])
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"model {type(engine.model).__name__} cannot be served by the tree engine: its forward "
            f"failed with tree attention ({type(error).__name__}: {error})"
        ) from error
    finally:
        for node in reversed(nodes):
            tree.remove(node)
    trunk_logits = torch.cat([first, second])
    of_left, of_right, of_tip = third.split([5, 7, 4])
    paths = [
        np.concatenate([trunk.token_ids, left.token_ids, tip.token_ids]),
        np.concatenate([trunk.token_ids, right.token_ids]),
    ]
    return paths, [
        torch.cat([trunk_logits, of_left, of_tip]),
        torch.cat([trunk_logits, of_right]),
    ]


def _trunk_length(engine: Engine) -> int:
    """Longer than the model's window where that is short."""
    window = getattr(engine.model.config.get_text_config(), "sliding_window", None)
    return window + 4 if window and window <= 32 else 12


def _whole(node) -> Block:
    return Block(node, 0, len(node.token_ids), node.token_ids)


@torch.inference_mode()
def _plain_logits(engine: Engine, path: np.ndarray) -> torch.Tensor:
    model = engine.model
    model.set_attn_implementation("eager")
    try:
        ids = torch.from_numpy(path.astype(np.int64)).to(engine.pool.device)
        return model(input_ids=ids[None], use_cache=False).logits[0]
    finally:
        model.set_attn_implementation(NAME)
