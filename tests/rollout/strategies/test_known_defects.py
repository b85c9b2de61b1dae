"""The eight defects of TreePO's published code, each a test here that it would fail."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
import torch
from shipped_rollouts import ROLLOUTS, build
from tiny_models import VOCABULARY, tiny_model

from rewards.records import RewardResult
from rollout.engine import Engine
from rollout.scheduler import generate
from rollout.settings import EngineSettings
from rollout.strategies.base import Prompt
from rollout.strategies.rule_settings import FALLBACK_CUTS, FALLBACKS
from rollout.strategies.settings import TreePOSettings
from rollout.strategies.treepo import TreePO
from rollout.tree import ANSWER, EOS
from treepo.advantages import estimate, leaf_num_tokens, scored_tree
from treepo.algorithm_settings import AdvantageSettings
from treepo.base.keys import root_key
from treepo.cli import compose
from treepo.config import TrainConfig
from treepo.samples import flat_token_trees, token_tree
from treepo.tree_file import tree_record

SHORT = dict(
    n=12, segment_length=4, max_depth=5, max_response_length=20, stop_token_ids=[1],
    repetition_count=0,
)  # fmt: skip

WRONG_KEY = r"'initial_divergence' is not used|unknown key [a-z]*\.?initial_divergence_max"


def treepo(**changes):
    return TreePO(TreePOSettings(**{**SHORT, **changes}))


def cut_tree(drive, key=3, **changes):
    """A tree with fallbacks, and the engine that sampled it."""
    engine = drive.ScriptedEngine(drive.early_ends(0.7), by_token=True)
    tree = drive.grow(treepo(**changes), drive.prompt(key), engine)
    assert tree.counters.fallbacks > 0
    return tree, engine


@pytest.mark.parametrize(("chooser", "cut"), list(product(FALLBACKS, FALLBACK_CUTS)))
def test_defect_1_after_a_fallback_the_engine_is_shown_the_recorded_path_and_no_cut_tokens(
    drive, chooser, cut
):
    """Published: a cut of more than the last segment leaves the cut tokens in the prompt."""
    for key in range(4):
        tree, engine = cut_tree(drive, key, fallback=chooser, fallback_cut=cut)
        keys = {segment.path_key: segment for segment in reversed(tree.segments)}
        assert set(engine.prompts) == set(keys) - {tree.segments[0].path_key}
        for path_key, shown in engine.prompts.items():
            first_piece = keys[path_key]
            assert shown.tolist() == tree.path_token_ids(first_piece.parent).tolist()


@pytest.mark.parametrize("name", [n for n in ROLLOUTS if ROLLOUTS[n]["strategy"] == "treepo"])
def test_defect_2_the_first_fallback_of_every_shipped_configuration_runs(drive, name):
    """Published: it raises with the window that is shipped. Here every second path ends in its
    first segment, the others in their second.
    """
    strategy = build(ROLLOUTS[name])
    settings = strategy.settings

    def script(context, request):
        length = settings.segment_length // 2 if request.level == 1 else 1
        return [*range(2, 2 + length), 1]

    tree = drive.grow(strategy, drive.prompt(), drive.ScriptedEngine(script))
    assert tree.num_leaves == settings.n
    if settings.initial_divergence_min < settings.n:
        assert tree.counters.fallbacks > 0


@pytest.mark.parametrize(
    "misplaced",
    [
        "+rollout.initial_divergence=8",
        "+trainer.initial_divergence_max=8",
        "+initial_divergence_max=8",
        "+algorithm.initial_divergence_max=8",
    ],
)
def test_defect_3_an_initial_divergence_under_a_wrong_key_is_an_error(misplaced):
    """Published: the key of the range 2..8 stands in the wrong place and never takes effect."""
    with pytest.raises(ValueError, match=WRONG_KEY):
        compose("train", TrainConfig, ["+experiment=quickstart", misplaced])


def test_defect_3_the_initial_divergence_of_a_range_takes_effect(drive):
    strategy = treepo(initial_divergence_min=2, initial_divergence_max=8)
    found = {len(strategy.start(drive.prompt(key))[1]) for key in range(200)}
    assert found == {2, 3, 4, 5, 6, 7, 8}


@pytest.mark.parametrize("eos", [1, 8, 9])
@pytest.mark.parametrize("position", [0, 2, 3])
@pytest.mark.parametrize("level", [1, 3])
def test_defect_4_any_of_a_list_of_eos_ids_ends_a_path_even_as_the_only_token_of_a_segment(
    drive, eos, position, level
):
    """Published: an end of sequence alone in its segment is missed; ids in a list never match."""

    def script(context, request):
        return [20, 21, 22, 23][:position] + [eos] if request.level == level else [30, 31, 32, 33]

    strategy = treepo(n=4, stop_token_ids=[1, 8, 9], fallback="none")
    tree = drive.grow(strategy, drive.prompt(), drive.ScriptedEngine(script))
    for leaf in tree.leaves:
        segment = tree.segments[leaf]
        assert (segment.finish_reason, segment.level) == (EOS, level)
        assert segment.token_ids.tolist() == [20, 21, 22, 23][:position] + [eos]


@pytest.mark.parametrize("start", range(8))
def test_defect_5_a_boxed_answer_is_seen_wherever_segments_cut_it(drive, letters, start):
    """Published: a box that crosses a segment's border is missed."""
    folder, ids_of = letters
    text = "=" * start + r"\boxed{42}" + " 4 4 4 4 4 4"

    def script(context, request):
        done = len(context) - 3
        return [ids_of[character] for character in text[done : done + 4]]

    strategy = treepo(n=2, finish="boxed_as_eos", answer_tokenizer=folder)
    tree = drive.grow(strategy, drive.prompt(), drive.ScriptedEngine(script))
    complete = start + len(r"\boxed{42}")
    for leaf in tree.leaves:
        assert tree.segments[leaf].finish_reason == ANSWER
        # the end of the segment in which the box closes
        assert len(tree.path_token_ids(leaf, with_prompt=False)) == -(-complete // 4) * 4


def test_defect_6_depth_and_parents_are_integers_from_the_arena_to_the_file(drive):
    """Published: ids are strings such as "0/1/0", whose depth one of the trainers cannot parse."""
    tree, _ = cut_tree(drive, fallback_cut="misaligned")
    verdicts = [RewardResult(score=0.0, parts={}, outcome="scored") for _ in tree.leaves]

    class Decoder:
        def text(self, token_ids):
            return str(token_ids)

        def response_text(self, tree, leaf):
            return str(leaf)

    record = json.loads(json.dumps(tree_record(tree, verdicts, Decoder())))
    depth = [0] * len(tree.segments)
    for index, (segment, node) in enumerate(zip(tree.segments, record["nodes"], strict=True)):
        assert type(segment.parent) is int and type(segment.level) is int
        assert type(node["parent"]) is int and node["parent"] == segment.parent < index
        if index:
            depth[index] = depth[node["parent"]] + 1
        assert len(tree.path(index)) == depth[index] + 1
        assert node["level"] == segment.level <= depth[index]


def test_defect_7_no_prompt_waits_for_the_slowest_one():
    """Published: the whole batch decodes level by level, so that all wait for the slowest path.
    Here a tree may be two levels ahead of another, and is handed on while others grow.
    """
    levels: dict[str, int] = {}
    leads = []

    class Watching(TreePO):
        def start(self, prompt):
            levels[prompt.problem_id] = 1
            return super().start(prompt)

        def advance(self, state, results):
            state, requests = super().advance(state, results)
            if requests:
                levels[state.problem_id] = max(r.level for r in requests)
                leads.append(max(levels.values()) - min(levels.values()))
            return state, requests

    # Some trees end early by a stop token, and others begin beside those that go on.
    settings = TreePOSettings(
        n=2, segment_length=3, max_depth=12, max_response_length=36, fallback="none",
        stop_token_ids=[3, 4], initial_divergence_min=1, initial_divergence_max=1,
    )  # fmt: skip
    engine = Engine(
        tiny_model("gpt2", torch.float64),
        EngineSettings(num_kv_slots=4096, max_running_requests=5),
    )
    rng = np.random.default_rng(1)
    prompts = [
        Prompt(
            problem_id=str(i),
            token_ids=rng.integers(6, VOCABULARY, 5).astype(np.int32),
            root_key=root_key(i),
        )
        for i in range(8)
    ]
    growing_at_hand_over = []
    for tree in generate(engine, Watching(settings), prompts):
        levels.pop(tree.problem_id, None)
        growing_at_hand_over.append(len(levels))
    assert len(growing_at_hand_over) == 8
    assert max(leads) >= 2, "every tree was at the same level"
    assert growing_at_hand_over[0] > 0, "the first tree waited for all others"


def test_defect_8_a_shared_token_is_trained_once_for_all_of_its_leaves(drive):
    """Published: a shared prefix is trained once for each leaf. Here the tree holds it once, with
    the weight of its leaves; the bias of correlated leaves and of the fallback is in
    docs/algorithms.md, and a leave-one-out baseline is offered.
    """
    for cut in FALLBACK_CUTS:
        tree, _ = cut_tree(drive, fallback_cut=cut)
        rewards = np.arange(tree.num_leaves) % 2
        verdicts = [RewardResult(score=float(r), parts={}, outcome="scored") for r in rewards]
        group = scored_tree(tree, verdicts)
        (advantages,) = estimate([group], AdvantageSettings(adv_estimator="treepo"))
        once = token_tree(group, advantages)
        per_leaf = flat_token_trees(group, advantages)
        sampled = sum(s.num_tokens for s in tree.segments if s.sampled)
        totals = [len(tree.path_token_ids(leaf, with_prompt=False)) for leaf in tree.leaves]
        assert leaf_num_tokens(tree).tolist() == totals
        assert int((once.weight > 0).sum()) == sampled < sum(totals)
        assert sum(int((sequence.weight > 0).sum()) for sequence in per_leaf) == sum(totals)
        # the same weight in all
        assert float(once.weight.sum()) == pytest.approx(sum(totals))
