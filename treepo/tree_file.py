"""Sampled trees on disk, for people and tools: ``trees/step_N.jsonl``, one JSON object a tree.

A line has ``problem_id``, ``temperature``, ``counters`` (branches, fallbacks, restarts) and:

* ``nodes``, the tree's segments in topological order, the prompt first: ``parent`` (index in this
  list, -1 for the prompt), ``level``, ``path_key`` (16 hex digits; pieces of a
  segment that a fallback cut inside share it), ``text`` (of the segment alone,
  without special tokens; a character cut by its end shows as the replacement character),
  ``token_ids``, ``logprobs`` (under the temperature alone), ``sampling_logprobs`` (under the
  behaviour policy), ``sampled`` (false: prompt or forced), ``version`` (of the
  oldest weights that drew a token of it), ``version_runs`` (``[version, tokens]`` of each stretch
  drawn under one version, in order), ``finish_reason``, and what is trained: ``weight``,
  ``advantage_pos``, ``advantage_neg`` (sums over the leaves below, see ``treepo.advantages``) and
  ``advantage`` (their sum over the weight; null where nothing is trained).
* ``leaves``, one a trajectory: ``node`` (index of its last segment), ``text`` (of the whole
  response), ``num_tokens``, ``reward`` (null without a verdict), ``parts``, ``outcome``,
  ``correct``, ``answer``, ``detail``, ``advantage`` (where an estimator gives each segment its own:
  the mean over the response's tokens), ``weight``.

The advantages of a tree that was left out of training (all rewards equal) are null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rewards.records import RewardResult
from rollout.tree import Tree
from treepo.atomic import write_json_lines

if TYPE_CHECKING:
    from treepo.advantages import TreeAdvantages


class TextDecoder(Protocol):
    """Turns token ids to text, without special tokens."""

    def response_text(self, tree: Tree, leaf: int) -> str: ...

    def text(self, token_ids: list[int]) -> str: ...


def write_trees(
    file: Path,
    trees: Sequence[Tree],
    verdicts: Sequence[Sequence[RewardResult]],
    advantages: Mapping[str, TreeAdvantages],
    decoder: TextDecoder,
) -> None:
    """Write a step's trees, all or none; an earlier life's file of the step is replaced.

    Args:
        verdicts: by tree, then in the order of ``tree.leaves``.
        advantages: by problem id, of the trees that are trained on.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    records = [
        tree_record(tree, of_tree, decoder, advantages.get(tree.problem_id))
        for tree, of_tree in zip(trees, verdicts, strict=True)
    ]
    write_json_lines(file, records)


def tree_record(
    tree: Tree,
    verdicts: Sequence[RewardResult],
    decoder: TextDecoder,
    advantages: TreeAdvantages | None = None,
) -> dict[str, Any]:
    """A tree as one line of the file (see the module).

    Args:
        verdicts: in the order of ``tree.leaves``.
        advantages: None if the tree is not trained on.
    """
    nodes = [_node(tree, index, decoder, advantages) for index in range(len(tree.segments))]
    leaves = [
        _leaf(tree, order, verdict, decoder, advantages)
        for order, (_, verdict) in enumerate(zip(tree.leaves, verdicts, strict=True))
    ]
    return {
        "problem_id": tree.problem_id,
        "temperature": tree.temperature,
        "counters": asdict(tree.counters),
        "nodes": nodes,
        "leaves": leaves,
    }


def _node(
    tree: Tree, index: int, decoder: TextDecoder, advantages: TreeAdvantages | None
) -> dict[str, Any]:
    segment = tree.segments[index]
    token_ids = segment.token_ids.tolist()
    return {
        "parent": segment.parent,
        "level": segment.level,
        "path_key": f"{segment.path_key:016x}",
        "text": decoder.text(token_ids),
        "token_ids": token_ids,
        "logprobs": _rounded(segment.logprobs),
        "sampling_logprobs": _rounded(segment.sampling_logprobs),
        "sampled": segment.sampled,
        "version": min(segment.policy_versions.tolist(), default=0),
        "version_runs": _runs(segment.policy_versions),
        "finish_reason": segment.finish_reason,
        **_node_advantage(index, advantages),
    }


def _node_advantage(index: int, advantages: TreeAdvantages | None) -> dict[str, Any]:
    names = ("weight", "advantage_pos", "advantage_neg", "advantage")
    if advantages is None:
        return dict.fromkeys(names)
    weight = float(advantages.weight[index])
    positive = float(advantages.advantage_pos[index])
    negative = float(advantages.advantage_neg[index])
    mean = (positive + negative) / weight if weight else None
    return dict(zip(names, (weight, positive, negative, mean), strict=True))


def _leaf(
    tree: Tree,
    order: int,
    verdict: RewardResult,
    decoder: TextDecoder,
    advantages: TreeAdvantages | None,
) -> dict[str, Any]:
    leaf = tree.leaves[order]
    return {
        "node": leaf,
        "text": decoder.response_text(tree, leaf),
        "num_tokens": len(tree.path_token_ids(leaf, with_prompt=False)),
        "reward": verdict.score if verdict.has_verdict else None,
        "parts": dict(verdict.parts),
        "outcome": verdict.outcome,
        "correct": verdict.correct if verdict.has_verdict else None,
        "answer": verdict.answer,
        "detail": verdict.detail,
        "advantage": float(advantages.leaf_advantage[order]) if advantages else None,
        "weight": float(advantages.leaf_weight[order]) if advantages else None,
    }


def _runs(versions: np.ndarray) -> list[list[int]]:
    """[version, how many tokens] of each stretch of one version."""
    return [[int(version), len([*of_it])] for version, of_it in groupby(versions.tolist())]


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 6) for value in values]
