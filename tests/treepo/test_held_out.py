from __future__ import annotations

import numpy as np

from rollout.strategies.settings import TreePOSettings
from treepo.data import Problem
from treepo.evaluation import SamplingPass
from treepo.held_out import sample_flat


class Cluster:
    """Keeps what it is asked to sample."""

    def sample(self, prompts, name, settings, policy_version):
        self.asked = (prompts, name, settings, policy_version)
        return [], None


def test_held_out_responses_end_as_the_rollouts_do_and_are_drawn_as_the_pass_says():
    cluster = Cluster()
    rollout = TreePOSettings(
        stop_token_ids=[5],
        stop_token_sequences=[[6, 7]],
        stop_strings=["</answer>"],
        repetition_penalty=1.5,
        temperature=0.1,
    )
    way = SamplingPass(
        name="sampled", num_samples=3, temperature=0.6, max_response_length=40, seed=1, top_k=8
    )
    problem = Problem(
        id="a",
        prompt_token_ids=np.array([1, 2], np.int32),
        data_source="d",
        ground_truth="7",
        extra_info={},
        prompt_text="",
    )
    sample_flat(cluster, [problem], way, rollout, policy_version=4)
    prompts, name, settings, version = cluster.asked
    assert (len(prompts), name, version) == (1, "flat", 4)
    assert settings.stop_token_ids == [5]
    assert settings.stop_token_sequences == [[6, 7]]
    assert settings.stop_strings == ["</answer>"]
    assert (settings.n, settings.temperature, settings.top_k) == (3, 0.6, 8)
    assert settings.max_response_length == 40
    assert settings.repetition_penalty == 1.0  # the rollout's way of drawing is not the pass's
