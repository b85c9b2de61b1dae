"""Supervised training of the tiny model on demonstrations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from treepo.demonstrations import demonstrate
from treepo.sft_loop import demonstrations, to_sequence, train_sft
from treepo.sft_settings import DemonstrationSettings, SFTSettings, TinyModelSettings
from treepo.tiny_model import build_tokenizer

SMALL = TinyModelSettings(
    num_layers=1, hidden_size=32, intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=16
)


def _settings(output: Path, **changes: object) -> SFTSettings:
    settings = SFTSettings(output=str(output), steps=12, batch_size=8, model=SMALL)
    settings.learner.optimizer.lr_warmup_steps = 2
    return replace(settings, **changes)  # type: ignore[arg-type]


def _train(settings: SFTSettings):  # type: ignore[no-untyped-def]
    losses: list[float] = []
    result = train_sft(settings, lambda step, loss: losses.append(loss))
    return result, losses


def test_the_loss_falls_and_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result, losses = _train(_settings(tmp_path / "a"))
    again, _ = _train(_settings(tmp_path / "b"))
    other, _ = _train(_settings(tmp_path / "c", seed=1))
    assert losses[-1] < losses[0] - 0.5
    assert result.digest == again.digest != other.digest
    weights = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("a", "b")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "a")) == len(build_tokenizer())


def test_a_second_run_goes_on_from_the_first_one_s_model(tmp_path: Path) -> None:
    _, losses = _train(_settings(tmp_path / "first"))
    again = _settings(
        tmp_path / "second", start_from=str(tmp_path / "first"), model=TinyModelSettings(), seed=1
    )
    _, more = _train(again)
    assert more[0] < losses[0] - 0.5  # the demonstrations are others
    with pytest.raises(ValueError, match="model=.*not used with start_from"):
        _settings(tmp_path / "third", start_from=str(tmp_path / "first"))


def test_an_output_folder_with_content_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="output=.*not empty"):
        _train(_settings(tmp_path))
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_demonstration_trains_on_its_answer_and_on_the_end_of_the_turn_alone() -> None:
    tokenizer = build_tokenizer()
    tree = to_sequence(tokenizer, "1 + 2 =", "1 + 2 = 3\n#### 3")
    trained = tree.token_ids[tree.weight > 0].tolist()
    assert tokenizer.decode(trained) == "1 + 2 = 3\n#### 3<|end|>"
    untrained = tree.token_ids[tree.weight == 0].tolist()
    assert tokenizer.decode(untrained) == "<|user|>1 + 2 =<|assistant|>"
    assert tree.predictor.tolist() == list(range(-1, tree.num_tokens - 1))
    assert set(tree.visible_until.tolist()) == {tree.num_tokens}
    assert tree.leaf_num_tokens.tolist() == [len(trained)]


def test_demonstrations_follow_the_seed_and_the_settings() -> None:
    settings = DemonstrationSettings(min_terms=3, max_terms=3, max_value=9, error_prob=0.0)
    pairs = list(demonstrations(settings, seed=1, count=40))
    assert pairs == list(demonstrations(settings, seed=1, count=40))
    assert not {q for q, _ in pairs} & {q for q, _ in demonstrations(settings, seed=2, count=40)}
    import random

    for question, answer in pairs:
        assert answer == demonstrate(question, error_prob=0.0, rng=random.Random(0))
        numbers = [int(word) for word in question.split() if word.isdigit()]
        assert len(numbers) == 3 and max(numbers) <= 9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SFTSettings(steps=0), "steps=0"),
        (lambda: DemonstrationSettings(error_prob=1.5), "data.error_prob=1.5"),
        (lambda: DemonstrationSettings(min_terms=5, max_terms=3), "data.max_terms=3"),
        (lambda: TinyModelSettings(num_heads=4, num_kv_heads=3), "model.num_kv_heads=3"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()
