"""The engine as a state machine: after any sequence of its verbs the logits of every position are
those of a fresh forward, to 1e-9 in float64, and every slot has one owner.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tiny_models import VOCABULARY, plain_logprobs, tiny_model

from rollout.drafts import DraftTree
from rollout.engine import Engine
from rollout.extend import ExtendSpec
from rollout.settings import EngineSettings
from rollout.weights import stored_state
from treepo.base.digest import manifest_of

LONGEST = 60  # tokens of a path
SLOTS = 240
tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9)
pick = st.integers(0, 1 << 30)


@cache
def models(family: str) -> list:
    """Two weight sets that take turns; they are only read."""
    return [tiny_model(family, torch.float64, seed=seed) for seed in (0, 1)]


class EngineMachine(RuleBasedStateMachine):
    family = "gpt2"
    num_compared = 0  # positions whose logits were compared, over all lives

    @initialize(
        prompt=tokens,
        budget=st.sampled_from([5, 9, 4096]),
        share=st.booleans(),
        attention=st.sampled_from(["cpu", "reference"]),
    )
    def begin(self, prompt, budget, share, attention):
        self.engine = Engine(
            tiny_model(self.family, torch.float64),
            EngineSettings(
                num_kv_slots=SLOTS,
                max_running_requests=4,
                max_tokens_per_step=budget,
                share_prefixes=share,
                attention=attention,
            ),
        )
        self.nodes = [self.engine.prefill(prompt)]
        self.waiting: dict[int, object] = {}  # request -> its node
        self.version = 0

    def node(self, choice):
        return self.nodes[choice % len(self.nodes)]

    def is_short(self, node) -> bool:
        return len(node.path_token_ids()) < LONGEST

    def keep(self, node):
        self.engine.soften(node)  # so that the pool never fills with what must stay
        self.nodes.append(node)

    @rule(choice=pick, count=st.integers(0, 70), key=pick, greedy=st.booleans())
    def submit(self, choice, count, key, greedy):
        node = self.node(choice)
        if self.is_short(node) and len(self.waiting) < 6:
            spec = ExtendSpec(
                max_tokens=count, stop_token_ids=(3,), temperature=0.0 if greedy else 1.0
            )
            self.waiting[self.engine.submit(node, spec, key)] = node

    @rule(count=st.integers(1, 12))
    def step(self, count):
        for _ in range(count):
            for completion in self.engine.step():
                del self.waiting[completion.request_id]
                self.keep(completion.node)

    @precondition(lambda self: self.waiting)
    @rule(choice=pick)
    def cancel(self, choice):
        request = sorted(self.waiting)[choice % len(self.waiting)]
        assert self.engine.cancel(request)
        del self.waiting[request]

    @rule(choice=pick, ids=tokens)
    def append(self, choice, ids):
        if self.is_short(self.node(choice)):
            self.keep(self.engine.append(self.node(choice), ids))

    @rule(choice=pick)
    def fork(self, choice):
        for node in self.engine.fork(self.node(choice), 2):
            self.keep(node)

    @rule(choice=pick, offset=pick)
    def split(self, choice, offset):
        node = self.node(choice)
        self.keep(self.engine.split(node, 1 + offset % len(node.path_token_ids())))

    @precondition(lambda self: len(self.nodes) > 1)
    @rule(choice=pick, drop=st.booleans())
    def free(self, choice, drop):
        node = self.node(choice)
        if not any(node is other for other in self.waiting.values()):
            self.nodes = [other for other in self.nodes if other is not node]
            self.engine.free(node, drop=drop)
        if not self.nodes:
            self.nodes = [self.engine.prefill([1, 2])]

    @rule(count=st.integers(1, SLOTS))
    def evict(self, count):
        self.engine.tree.evict(count)

    @rule(choice=pick, priority=st.integers(-2, 2))
    def value(self, choice, priority):
        self.engine.set_priority(self.node(choice), priority)

    @rule(how=st.sampled_from(["recompute", "keep"]))
    def load_weights(self, how):
        self.version += 1
        state = stored_state(models(self.family)[self.version % 2])
        self.engine.load_weights(self.version, manifest_of(state), state, in_flight=how)

    @rule(choice=pick, parents=st.lists(st.integers(-1, 6), max_size=7), ids=tokens, keep=pick)
    def draft(self, choice, parents, ids, keep):
        """Look at the logits of a position and of a few tokens below it; keep some of them."""
        node = self.node(choice)
        if not self.is_short(node) or self.engine.num_running > 2:
            return
        size = min(len(parents), len(ids))
        tree = DraftTree(
            parents=np.array([min(parents[i], i - 1) for i in range(size)], np.int64),
            token_ids=np.array(ids[:size], np.int32),
        )
        draft = self.engine.forward(node, tree)
        found = torch.log_softmax(draft.logits, dim=-1).numpy()
        above = node.path_token_ids()
        paths = [self.path(tree, index) for index in range(-1, size)]
        for path, row in zip(paths, found, strict=True):
            ids = np.concatenate([above, tree.token_ids[path]]).astype(np.int64)
            fresh = plain_logprobs(models(self.family)[self.version % 2], ids)[-1]
            assert np.abs(fresh - row).max() < 1e-9
            EngineMachine.num_compared += 1
        self.keep(self.engine.commit(draft, paths[keep % len(paths)]))

    @staticmethod
    def path(tree, index):
        path: list[int] = []
        while index >= 0:
            path.insert(0, index)
            index = int(tree.parents[index])
        return path

    @invariant()
    def holds_together(self):
        if hasattr(self, "engine"):
            self.engine.check_integrity()
            gauges = self.engine.gauges()
            assert gauges.slots_free + gauges.slots_live + gauges.slots_cached == SLOTS

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        while not self.engine.is_idle:
            for completion in self.engine.step():
                self.keep(completion.node)
        for node in self.nodes:
            self.engine.free(node)
        assert self.engine.tree.num_protected == 0
        self.engine.tree.evict(SLOTS)
        assert self.engine.pool.num_held == 0
        self.engine.check_integrity()


def run(family: str, examples: int, steps: int) -> None:
    machine = type(f"{family}Machine", (EngineMachine,), {"family": family}).TestCase
    machine.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],  # a life is short enough to read as it is
        suppress_health_check=list(HealthCheck),
    )
    before = EngineMachine.num_compared
    machine().runTest()
    assert EngineMachine.num_compared > before + examples


def test_a_few_random_lives_of_an_engine_are_exact():
    run("gpt2", examples=25, steps=40)


@pytest.mark.long
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_many_random_lives_of_an_engine_are_exact(family):
    run(family, examples=200, steps=80)
