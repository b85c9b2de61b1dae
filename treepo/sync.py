"""Weights from the learner to every engine, and the proof that they arrived.

Two proofs at every publication: each engine's checksums of its stored tensors equal those of what
was sent, and the log-probabilities of a few golden token sequences computed by the engines through
their KV trees equal the learner's own. The first catches corruption, the second what a checksum
cannot see: right bytes used wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainers.weight_sync import check_digests, check_probes
from treepo.cluster import Cluster


def publish_weights(
    cluster: Cluster, version: int, engine_dtype: str, golden: Sequence[np.ndarray]
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
    difference = check_probes(reference, probes, engine_dtype)
    cluster.on_rollout("confirm", version)
    return {"sync/golden_logprob_diff_max": difference}
