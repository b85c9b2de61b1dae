"""Weights of every kind between samples: nothing is drawn from unproved or older ones.

The oracle: every sampled token's log-probability equals that of a fresh forward of its whole path,
in float64, under the weights whose version its segment records. Keys or values of other weights
anywhere on the path would change it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from tiny_models import path_logprobs, tiny_model

from rollout.radix_tree import RadixTree
from rollout.settings import EngineSettings
from rollout.store import TreeStore
from rollout.strategies.base import Prompt
from rollout.strategies.settings import FlatSettings, TreePOSettings
from rollout.weights import Part, TornWeights, stored_state
from rollout.worker import RolloutWorker
from treepo.base.digest import WeightManifest, manifest_of, tensor_digests

NUM_SETS = 4  # weight sets; versions draw from them, so that one comes back under another number
PROMPTS = [[5, 6, 7], [5, 6, 7, 8, 9, 3], [5, 9], [8] * 12, [5, 6, 2, 2, 4]]
FLAT = FlatSettings(n=3, max_response_length=7, stop_token_ids=[1])
TREE = TreePOSettings(
    n=4, max_response_length=9, segment_length=3, max_depth=3, stop_token_ids=[1],
    repetition_count=0,
)  # fmt: skip


@dataclass
class Life:
    """A worker, what it should be doing, and how often each thing happened."""

    worker: RolloutWorker
    models: list
    rng: random.Random
    set_of_version: dict[int, int] = field(default_factory=lambda: {0: 0})
    held: int = 0  # version of the engine's weights
    proved: bool = True
    counts: dict[str, int] = field(default_factory=dict)

    def weight_set(self):
        """A version never used before, its set's number, manifest and tensors."""
        version = max(self.set_of_version) + 1
        number = self.rng.randrange(NUM_SETS)
        self.set_of_version[version] = number
        state = stored_state(self.models[number])
        return version, manifest_of(state), {name: t.clone() for name, t in state.items()}

    def sent(self, tensors):
        """All at once, as arrays or in parts."""
        way = self.rng.randrange(3)
        if way == 0:
            return tensors
        if way == 1:
            return {name: tensor.numpy() for name, tensor in tensors.items()}
        return self.parts(tensors)

    def parts(self, tensors):
        tied = {"lm_head.weight"}
        return (
            Part(name, start, tensor.reshape(-1)[start : start + 300])
            for name, tensor in tensors.items()
            if name not in tied
            for start in range(0, tensor.numel(), 300)
        )

    def load_and_confirm(self):
        self.load_unconfirmed()
        if self.rng.random() < 0.3:
            self.sample_refused(self.held)
        with pytest.raises(ValueError, match="holds weights of version"):
            self.worker.confirm(self.held + 1)
        self.worker.confirm(self.held)
        self.proved = True

    def load_unconfirmed(self):
        version, manifest, tensors = self.weight_set()
        found = self.worker.load_weights(version, manifest, self.sent(tensors))
        assert found == tensor_digests(tensors)
        self.held, self.proved = version, False

    def load_corrupted(self):
        version, manifest, tensors = self.weight_set()
        expected = tensor_digests(tensors)
        name = self.rng.choice([n for n in tensors if "wte" not in n and n != "lm_head.weight"])
        tensors[name].view(torch.uint8).view(-1)[self.rng.randrange(8)] ^= 1
        found = self.worker.load_weights(version, manifest, self.sent(tensors))
        assert [n for n in expected if found[n] != expected[n]] == [name]
        self.held, self.proved = version, False  # whoever compares does not confirm

    def load_misfit(self):
        version, manifest, tensors = self.weight_set()
        wrong = WeightManifest(tensors=manifest.tensors[::-1], tied=manifest.tied)
        with pytest.raises(ValueError, match="another order"):
            self.worker.load_weights(version, wrong, self.sent(tensors))
        self.proved = False

    def load_torn(self):
        version, manifest, tensors = self.weight_set()
        parts = list(self.parts(tensors))
        with pytest.raises(TornWeights):
            self.worker.load_weights(
                version, manifest, iter(parts[: self.rng.randrange(1, len(parts))])
            )
        self.proved = False

    def sample_right(self):
        if self.proved:
            self.sample()
        else:
            self.sample_refused(self.held)

    def sample_other_version(self):
        self.sample_refused(self.rng.choice([self.held - 1, self.held + 1, self.held + 7]))

    def sample_refused(self, version):
        with pytest.raises(ValueError, match="refuses work"):
            self.worker.sample(self.prompts(), "flat", FLAT, version)

    def prompts(self):
        return [
            Prompt(
                problem_id=f"p{i}",
                token_ids=np.array(self.rng.choice(PROMPTS), np.int32),
                root_key=self.rng.getrandbits(60),
            )
            for i in range(self.rng.randint(1, 3))
        ]

    def sample(self):
        name, settings = self.rng.choice([("flat", FLAT), ("treepo", TREE)])
        trees, ledger = self.worker.sample(self.prompts(), name, settings, self.held)
        model = self.models[self.set_of_version[self.held]]
        for tree in trees:
            for index, segment in enumerate(tree.segments):
                if segment.sampled:
                    assert (segment.policy_versions == self.held).all()
                    fresh = path_logprobs(model, tree.path_token_ids(index))
                    own = fresh[len(fresh) - segment.num_tokens :]
                    gap = np.abs(own - segment.logprobs).max(initial=0.0)
                    assert gap < 2e-6, f"drawn from other weights: log-probs {gap} apart"
        engine = self.worker._engine
        engine.check_integrity()
        gauges = self.worker.gauges()
        assert (gauges.num_running, gauges.num_waiting) == (0, 0)
        assert gauges.slots_free + gauges.slots_held == engine.settings.num_kv_slots
        self.count("cached_tokens", ledger.cached_tokens)

    def count(self, what, amount=1):
        self.counts[what] = self.counts.get(what, 0) + amount


WEIGHTED = {
    Life.sample_right: 6,
    Life.load_and_confirm: 4,
    Life.load_unconfirmed: 1,
    Life.load_corrupted: 1,
    Life.load_misfit: 1,
    Life.load_torn: 1,
    Life.sample_other_version: 1,
}


def live(folder, models, seed, num_actions, num_kv_slots=512) -> Life:
    threads = torch.get_num_threads()
    worker = RolloutWorker(0)
    worker.setup(str(folder), EngineSettings(dtype="float64", num_kv_slots=num_kv_slots))
    torch.set_num_threads(threads)
    life = Life(worker, models, random.Random(seed))
    actions = list(WEIGHTED)
    for _ in range(num_actions):
        (action,) = life.rng.choices(actions, [WEIGHTED[a] for a in actions])
        life.count("sampled" if action is Life.sample_right and life.proved else action.__name__)
        action(life)
        # A torn set is a mixture: its version is the old one, and it never comes in force.
        assert worker.policy_version() == life.held
    return life


@pytest.fixture(scope="module")
def models():
    return [tiny_model("gpt2", torch.float64, seed=seed) for seed in range(NUM_SETS)]


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("gpt2")
    models[0].save_pretrained(path)
    return path


@pytest.mark.parametrize("num_kv_slots", [80, 512])  # with and without evictions
@pytest.mark.parametrize("seed", range(3))
def test_whatever_weights_come_every_token_is_drawn_from_the_proved_ones_it_names(
    folder, models, seed, num_kv_slots
):
    life = live(folder, models, seed, 250, num_kv_slots)
    assert life.counts["sampled"] >= 25 and life.counts["cached_tokens"] > 0
    assert {action.__name__ for action in WEIGHTED} - {"sample_right"} <= set(life.counts)


@pytest.mark.long
def test_the_same_for_long(folder, models):
    for seed in range(100, 120):
        live(folder, models, seed, 400, random.Random(seed).choice([64, 80, 200, 512]))


def test_the_oracle_notices_an_engine_that_keeps_the_cache_of_older_weights(
    folder, models, monkeypatch
):
    def keep_all(store, policy_version, keep=(), resting=()):
        store.policy_version = policy_version

    root = RadixTree.root
    monkeypatch.setattr(TreeStore, "retire", keep_all)
    monkeypatch.setattr(RadixTree, "root", lambda tree, policy_version: root(tree, 0))
    with pytest.raises(AssertionError, match="drawn from other weights"):
        live(folder, models, 0, 250)
