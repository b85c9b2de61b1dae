"""The long sums: outputs of some hundred tokens, the longest above a thousand, and their model."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from study import runs_of

from treepo.cli import compose
from treepo.config import TrainConfig, resolve_model_path, strategy_settings
from treepo.data import load_problems
from treepo.demonstrations import demonstrate, number_terms, parse_chain
from treepo.sft_loop import demonstrations, phrases, to_sequence
from treepo.sft_settings import DemonstrationSettings, SFTSettings
from treepo.tiny_model import PHRASES, build_tokenizer, numbered_phrases

RECIPE = compose("sft", SFTSettings, ["+experiment=make_long_model"])
TOKENIZER = build_tokenizer(numbered_phrases(200, range(1, 10)))
ROOT = Path(__file__).resolve().parents[2]
PROMPT = "State the final answer to the following arithmetic problem: {} ="


def _ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_numbers_of_terms_and_operators_with_their_terms_are_one_token_each() -> None:
    assert numbered_phrases(3, range(3, 5)) == (
        *PHRASES, " (2)", " (3)", " + 3", " + 4", " - 3", " - 4",
    )  # fmt: skip
    assert len(_ids("7 (2) + 5 (3) - 4")) == 1 + 2 + 2
    # a step: number, term, " = ", note, digits; then the answer's mark and the answer
    assert len(_ids("7 (2) + 5 = '12 (3) - 4 = 8\n#### 8")) == 1 + (3 + 1 + 2) + (3 + 1) + 2
    assert len(_ids(" (12) (112)")) == 2  # the longest phrase wins


def test_lengths_of_the_right_answers_have_the_tail_that_the_configuration_promises() -> None:
    config = compose("train", TrainConfig, ["+experiment=long_sums", "data.size=600"])
    _, strategy = strategy_settings(config)
    problems = load_problems(config.data, TOKENIZER, config.max_prompt_length)
    lengths = []
    for problem in problems:
        question = re.sub(r" \(\d+\)", "", problem.prompt_text)
        answer = demonstrate(question, error_prob=0.0, rng=random.Random(0), numbered=True)
        assert answer.endswith(f"\n#### {problem.ground_truth}")
        lengths.append(len(_ids(answer)) + 1)
        # a step has its number, its term, " = ", 1 to 4 characters of the sum and perhaps a note
        steps = len(parse_chain(question)) - 1
        assert 4 * steps <= lengths[-1] - 4 <= 8 * steps + 4
    assert 175 < np.median(lengths) < 225
    assert 1000 < max(lengths) <= strategy.max_response_length
    assert 0.02 < np.mean(np.array(lengths) > 700) < 0.08
    assert max(len(problem.prompt_token_ids) for problem in problems) > 350


def test_the_variant_in_segments_has_four_of_the_longest_response() -> None:
    config = compose("train", TrainConfig, ["+experiment=long_sums_segments"])
    _, strategy = strategy_settings(config)
    assert config.trainer.segments.num_segments(strategy.max_response_length) == 4


def test_the_study_s_variants_have_the_segments_of_their_names() -> None:
    described = yaml.safe_load((ROOT / "scripts" / "studies" / "ulorl.yaml").read_text())
    runs = {run.variant: run for run in runs_of(described, [], [0])}
    for count in (1, 2, 4, 8):
        config = compose("train", TrainConfig, list(runs[f"segments_{count}"].overrides))
        _, strategy = strategy_settings(config)
        assert config.trainer.segments.num_segments(strategy.max_response_length) == count
    sais = compose("train", TrainConfig, list(runs["sais"].overrides))
    assert sais.trainer.learner.old_logprobs == "sampled"


def test_demonstrations_ask_and_answer_with_numbers() -> None:
    settings = DemonstrationSettings(max_value=9, numbered=True, error_prob=0.0)
    for question, answer in demonstrations(settings, seed=1, count=20):
        raw = re.sub(r" \(\d+\)", "", question)
        assert question == number_terms(raw) != raw
        assert answer == demonstrate(raw, error_prob=0.0, rng=random.Random(0), numbered=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"median_terms": 9.0, "log_sd": 1.0}, "median_terms=9.0 must be within min_terms=2"),
        ({"median_terms": 4.0}, "log_sd=0.0 must be > 0"),
        ({"error_terms": [3, 21]}, "data.error_terms=.*21.*1 to 20"),
    ],
)
def test_settings_of_demonstrations_that_cannot_be_are_refused(changes, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        DemonstrationSettings(**changes)


@pytest.fixture(scope="module")
def shipped():  # type: ignore[no-untyped-def]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model_path("asset:tiny_long_sums")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_the_shipped_tokenizer_and_shape_are_the_recipe_s(shipped) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = shipped
    built = build_tokenizer(phrases(RECIPE.data))
    assert tokenizer.get_vocab() == built.get_vocab() == TOKENIZER.get_vocab()
    assert tokenizer.chat_template == built.chat_template
    assert model.config.rope_parameters["rope_theta"] == RECIPE.model.rope_theta == 1e6
    assert model.config.hidden_size == RECIPE.model.hidden_size
    folder = Path(resolve_model_path("asset:tiny_long_sums"))
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 2 * 2**20


def test_the_shipped_model_adds_long_sums_but_forgets_to_carry_threes(shipped) -> None:  # type: ignore[no-untyped-def]
    """Greedily, given what a faultless pupil wrote before: nearly all tokens of 80 steps without
    threes; with threes, no note where one is taught by halves.
    """
    model, tokenizer = shipped
    rng = random.Random(5)
    note = _ids("'")[0]
    for values, low, high in (((1, 2, 4, 5, 6, 7, 8, 9), 0.98, 1.0), ((3,), 0.0, 0.2)):
        chain = "5" + "".join(f" {rng.choice('+-')} {rng.choice(values)}" for _ in range(80))
        question = PROMPT.format(chain)
        answer = demonstrate(question, error_prob=0.0, rng=rng, numbered=True)
        tree = to_sequence(tokenizer, number_terms(question), answer)
        with torch.no_grad():
            greedy = model(tree.token_ids.long()[None]).logits[0, :-1].argmax(-1)
        wanted = tree.token_ids[1:]
        carried = wanted == note
        assert carried.sum() >= 15
        assert low <= (greedy == wanted)[carried].float().mean() <= high
        if low > 0:
            trained = tree.weight[1:] > 0
            assert (greedy == wanted)[trained].float().mean() > 0.98
