"""Long prompts are computed in parts beside what is being decoded, under one budget of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, path_logprobs, tiny_model

from rollout.engine import Engine
from rollout.extend import ExtendSpec
from rollout.settings import EngineSettings


def make_engine(**settings) -> Engine:
    settings = {"num_kv_slots": 2048, "max_running_requests": 4, **settings}
    return Engine(tiny_model("gpt2", torch.float64), EngineSettings(**settings))


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).astype(np.int32)


def count_rows(engine, monkeypatch) -> list[int]:
    """Rows of each forward from now on."""
    rows: list[int] = []
    inner = engine.runner.forward

    def spy(token_ids, *rest):
        rows.append(len(token_ids))
        return inner(token_ids, *rest)

    monkeypatch.setattr(engine.runner, "forward", spy)
    return rows


@pytest.mark.parametrize("budget", [5, 7, 16, 64, 4096])
@pytest.mark.parametrize("attention", ["cpu", "reference"])
def test_the_budget_changes_no_token_and_is_never_exceeded(budget, attention, monkeypatch):
    engine = make_engine(max_tokens_per_step=budget, attention=attention)
    rows = count_rows(engine, monkeypatch)
    spec = ExtendSpec(max_tokens=6)
    nodes = [engine.prefill(prompt(length, length)) for length in (40, 3, 90, 17)]
    found = {c.request_id: c for c in engine.extend([(n, spec, 5) for n in nodes for _ in "ab"])}
    engine.check_integrity()
    assert max(rows) <= budget
    for completion in found.values():
        fresh = path_logprobs(engine.model, completion.node.path_token_ids())[-6:]
        assert np.abs(fresh - completion.logprobs).max() < 2e-6
    # each prompt token once, each drawn token but the last once; the second request of a node
    # reads the logits of its last token in the same forward or computes that one row again
    unique = 40 + 3 + 90 + 17 + 8 * 5
    assert unique <= sum(rows) <= unique + 4


def test_decoding_goes_on_while_a_long_prompt_is_computed(monkeypatch):
    engine = make_engine(max_tokens_per_step=10)
    rows = count_rows(engine, monkeypatch)
    short = engine.submit(engine.prefill(prompt(4)), ExtendSpec(max_tokens=30), 1)
    engine.step()
    engine.submit(engine.prefill(prompt(90, 1)), ExtendSpec(max_tokens=2), 2)
    before = len(rows)
    drawn = []
    for _ in range(9):
        assert engine.step() == []
        (request, *_) = engine._decoder.running
        assert request.request_id == short
        drawn.append(int(engine._decoder._table.count[request.row]))
    assert drawn == list(range(2, 11))  # one token a step, all the while
    assert rows[before:] == [10] * 9  # one decoded token and nine of the prompt
    while not engine.is_idle:
        engine.step()
    engine.check_integrity()


def test_a_path_put_back_half_way_is_computed_again_in_parts():
    engine = make_engine(max_tokens_per_step=8, num_kv_slots=155)
    large = make_engine(max_tokens_per_step=4096)
    spec = ExtendSpec(max_tokens=70)
    found = []
    for each in (engine, large):
        node = each.prefill(prompt(20))
        tokens = {}
        for completion in each.extend([(node, spec, key) for key in range(4)]):
            each.check_integrity()
            tokens[completion.request_id] = completion.token_ids.tolist()
            each.free(completion.node, drop=True)
        found.append(sorted(tokens.items()))
    assert found[0] == found[1]
    assert engine.metrics().preempted > 0


def test_a_budget_without_room_for_prompts_is_refused():
    with pytest.raises(ValueError, match="max_tokens_per_step=512 leaves no room"):
        EngineSettings(max_tokens_per_step=512)
    with pytest.raises(ValueError, match="max_tokens_per_step=0"):
        EngineSettings(max_tokens_per_step=0)
