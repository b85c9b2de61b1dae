"""Weights from the learner to every engine, and the proof that they arrived.

Two proofs at every publication: each engine's checksums of its stored tensors equal those of what
was sent, and the log-probabilities of a few golden token sequences computed by the engines through
their KV trees equal the learner's own. The first catches corruption, the second what a checksum
cannot see: right bytes used wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainers.weight_sync import check_digests, check_probes
from treepo.base.digest import WeightManifest
from treepo.cluster import Cluster


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Weights:
    """A published set, for engines that load it when they can.

    Attributes:
        digests: that an engine must find.
        arrays: where the object store has them.
        golden_logprobs: the learner's, of the golden sequences, each without its first token.
    """

    version: int
    manifest: WeightManifest
    digests: Mapping[str, int]
    arrays: Any
    golden_logprobs: Sequence[np.ndarray]


def prove_arrival(
    name: str,
    weights: Weights,
    digests: Mapping[str, int],
    scores: Sequence[np.ndarray],
    dtypes: Sequence[str],
) -> float:
    """Both proofs for one engine.

    Args:
        name: of the engine.
        digests: that it found.
        scores: log-probabilities that it computed of the golden sequences, float32 [n] each.
        dtypes: of the engine and of the learner.

    Returns:
        the largest difference of a golden log-probability.

    Raises:
        trainers.weight_sync.WeightSyncError: a proof failed.
    """
    check_digests(weights.digests, {name: digests})
    return check_probes(weights.golden_logprobs, {name: [row[1:] for row in scores]}, dtypes)


def publish_weights(
    cluster: Cluster,
    version: int,
    engine_dtype: str,
    golden: Sequence[np.ndarray],
    *,
    learner_dtype: str = "float32",
) -> dict[str, float]:
    """Send the learner's weights to every engine as ``version``, prove it, and put it in force.

    Args:
        golden: token sequences (int32 [n], n >= 2) that both sides score.

    Returns:
        Metrics: the largest difference of a golden log-probability.

    Raises:
        trainers.weight_sync.WeightSyncError: a proof failed; the message names engine and tensors.
    """
    expected, answers = cluster.transfer_weights(version, engine_dtype)
    names = [f"rollout worker {rank}" for rank in range(len(answers))]
    check_digests(expected, dict(zip(names, answers, strict=True)))
    reference = cluster.on_learners("score_paths", golden)[0]
    scored = cluster.on_rollout("score_paths", golden)
    probes = {name: [row[1:] for row in rows] for name, rows in zip(names, scored, strict=True)}
    difference = check_probes(reference, probes, (engine_dtype, learner_dtype))
    cluster.on_rollout("confirm", version)
    return {"sync/golden_logprob_diff_max": difference}
