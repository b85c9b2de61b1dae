"""What one step's trees and verdicts amount to, under the names of ``docs/metrics.md``. Pure
functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewards.pool import count_outcomes
from rewards.records import RewardResult
from rollout.metrics import CostLedger
from rollout.tree import TRUNCATED, Tree
from treepo.advantages import ScoredTree, leaf_num_tokens


def rollout_metrics(trees: Sequence[Tree], ledger: CostLedger) -> dict[str, float]:
    """What sampling the trees took."""
    return {
        "rollout/trajectory_tokens": float(
            sum(len(t.path_token_ids(leaf, with_prompt=False)) for t in trees for leaf in t.leaves)
        ),
        "rollout/generated_tokens": float(ledger.generated_tokens),
        "rollout/query_tokens": float(ledger.query_tokens),
        "rollout/unique_tokens": float(ledger.unique_tokens),
        "rollout/sequential_steps": float(ledger.sequential_steps),
        "rollout/preempted": float(ledger.preempted),
        "rollout/peak_kv_bytes": float(ledger.peak_kv_bytes),
        "rollout/hit_rate": ledger.hit_rate,
        "rollout/shared_token_ratio": ledger.shared_token_ratio,
        "rollout/tokens_per_second": ledger.tokens_per_second,
    }


def tree_metrics(trees: Sequence[Tree]) -> dict[str, float]:
    """Shape of the sampled trees.

    ``tree/shared_token_ratio`` is the share of trajectory tokens that another trajectory of the
    same tree has already paid for: 1 - (tokens sampled) / (sum of the leaves' lengths).
    """
    lengths = [int(length) for tree in trees for length in leaf_num_tokens(tree)]
    sampled = sum(s.num_tokens for tree in trees for s in tree.segments if s.sampled)
    total = sum(lengths)
    truncated = sum(
        tree.segments[leaf].finish_reason == TRUNCATED for tree in trees for leaf in tree.leaves
    )
    return {
        "response_length/mean": float(np.mean(lengths)),
        "response_length/max": float(max(lengths)),
        "response_length/clip_ratio": truncated / len(lengths),
        "tree/shared_token_ratio": 1 - sampled / total if total else 0.0,
        "tree/width": float(np.mean([tree.num_leaves for tree in trees])),
        "tree/depth": float(
            np.mean([max(tree.segments[leaf].level for leaf in tree.leaves) for tree in trees])
        ),
        "tree/branches": float(sum(tree.counters.branches for tree in trees)),
        "tree/fallbacks": float(sum(tree.counters.fallbacks for tree in trees)),
        "tree/restarts": float(sum(tree.counters.restarts for tree in trees)),
    }


def reward_metrics(verdicts: Sequence[Sequence[RewardResult]]) -> dict[str, float]:
    """Scores of the leaves that have a verdict, and counts of every outcome.

    Args:
        verdicts: by tree, then by leaf.
    """
    every = [verdict for of_tree in verdicts for verdict in of_tree]
    judged = [verdict for verdict in every if verdict.has_verdict]
    scores = [verdict.score for verdict in judged]
    groups = [[v.score for v in of_tree if v.has_verdict] for of_tree in verdicts]
    without_spread = sum(len(set(group)) < 2 for group in groups)
    metrics = {
        "critic/score/mean": float(np.mean(scores)) if scores else float("nan"),
        "critic/score/max": float(np.max(scores)) if scores else float("nan"),
        "critic/score/min": float(np.min(scores)) if scores else float("nan"),
        "critic/rewards/mean": float(np.mean(scores)) if scores else float("nan"),
        "critic/accuracy": float(np.mean([v.correct for v in judged])) if judged else float("nan"),
        "frac_reward_zero_std": without_spread / len(groups),
    }
    metrics |= {f"reward/outcome/{k}": float(n) for k, n in count_outcomes(every).items()}
    for part in sorted({name for verdict in judged for name in verdict.parts}):
        values = [verdict.parts[part] for verdict in judged if part in verdict.parts]
        metrics[f"reward/part/{part}"] = float(np.mean(values))
    return metrics


def version_metrics(groups: Sequence[ScoredTree]) -> dict[str, float]:
    """How many policy versions the tokens of a response are of, over the responses that an update
    trains on. (How old the tokens are is measured in the learner.)
    """
    counts = []
    for group in groups:
        tree = group.tree
        for leaf in np.array(tree.leaves)[group.trains]:
            path = [tree.segments[index] for index in tree.path(leaf)]
            of_path = [segment.policy_versions for segment in path if segment.sampled]
            counts.append(len(np.unique(np.concatenate(of_path))))
    if not counts:
        return {}
    return {
        "training/versions_per_response/mean": float(np.mean(counts)),
        "training/versions_per_response/max": float(max(counts)),
    }
