"""Of several workers whose calls fail the one is named whose failure made the others fail."""

from __future__ import annotations

import os
import time

import pytest
import ray

from treepo.calls import Call, WorkerLost, begin, next_answers

pytestmark = pytest.mark.long  # starts Ray


@ray.remote(num_cpus=0)
class Reference:
    def logprobs(self) -> int:
        os._exit(1)


@ray.remote(num_cpus=0)
class Learner:
    def update(self, logprobs: int) -> int:
        return logprobs


@pytest.fixture
def running_ray():
    ray.init(address="local", include_dashboard=False, num_cpus=1, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_dead_reference_is_named_and_not_the_learner_that_waits_for_it(running_ray):
    (asked,) = begin([Reference.remote()], "logprobs")
    (waiting,) = begin([Learner.remote()], "update", asked)
    deadline = time.monotonic() + 60
    calls = [
        Call(name="learner rank 0 of 1", ref=waiting, deadline=deadline),
        Call(name="reference worker 0 of 1", ref=asked, deadline=deadline),
    ]
    with pytest.raises(WorkerLost, match="^reference worker 0 of 1 died"):
        next_answers(calls, 60)
    with pytest.raises(WorkerLost, match="^learner rank 0 of 1 could not begin"):
        next_answers(calls[:1], 60)
