import subprocess
import sys

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError

from rollout.strategies.base import STRATEGIES
from rollout.strategies.settings import FlatSettings, TreePOSettings
from rollout.strategies.treepo import TreePO

SHORT = dict(segment_length=8, max_depth=4, max_response_length=32)
LOW = dict(branching="low_logprob")


def test_the_defaults_are_the_papers():
    settings = TreePOSettings()
    assert (settings.segment_length, settings.max_depth, settings.n) == (512, 14, 16)
    assert settings.max_response_length == 7 * 1024
    assert (settings.initial_divergence_min, settings.initial_divergence_max) == (2, 2)
    assert (settings.temperature, settings.top_p, settings.top_k) == (1.0, 1.0, 0)
    assert (settings.branching, settings.budget) == ("even", "width")
    assert (settings.fallback, settings.fallback_cut) == ("random", "segment")


@pytest.mark.parametrize("settings", [FlatSettings, TreePOSettings])
def test_settings_survive_omegaconf(settings):
    node = OmegaConf.structured(settings)
    changed = OmegaConf.merge(node, {"temperature": 0.5, "stop_token_ids": [3, 4]})
    built = OmegaConf.to_object(changed)
    assert isinstance(built, settings)
    assert (built.temperature, built.stop_token_ids) == (0.5, [3, 4])


def test_nested_token_lists_survive_omegaconf():
    node = OmegaConf.merge(
        OmegaConf.structured(TreePOSettings),
        {"answer_token_ids": [[5, 6], [7]], "finish": "boxed_as_eos"},
    )
    assert OmegaConf.to_object(node).answer_token_ids == [[5, 6], [7]]


def test_stops_survive_omegaconf():
    changes = {"stop_token_sequences": [[5, 6], [7]], "stop_strings": ["</answer>", "\n\n"]}
    node = OmegaConf.merge(OmegaConf.structured(FlatSettings), changes)
    built = OmegaConf.to_object(node)
    assert built.stop_token_sequences == [[5, 6], [7]]
    assert built.stop_strings == ["</answer>", "\n\n"]


def test_an_unknown_key_is_an_error_and_not_ignored():
    with pytest.raises(TypeError, match="initial_divergence"):
        TreePOSettings(initial_divergence=8)
    with pytest.raises(ConfigKeyError):
        OmegaConf.merge(OmegaConf.structured(TreePOSettings), {"initial_divergence": 8})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(temperature=-1.0), "^rollout.temperature=-1.0"),
        (dict(temperature=1e-6), "temperature=1e-06: it must be 0 .greedy. or >= 1e-05"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_k=-1), "top_k=-1"),
        (dict(min_p=1.0), "min_p=1.0"),
        (dict(n=0), "n=0"),
        (dict(max_response_length=0), "max_response_length=0"),
        (dict(stop_token_ids=[-1]), "stop_token_ids"),
        (dict(repetition_penalty=0.0), "repetition_penalty=0.0.*no penalty"),
        (dict(repetition_penalty=5000.0), "repetition_penalty=5000.0: it must be in"),
        (dict(ban_token_ids=[3, -1]), "ban_token_ids"),
        (dict(stop_token_sequences=[[]]), "stop_token_sequences.*at least one"),
        (dict(stop_token_sequences=[[4, -4]]), "stop_token_sequences"),
        (dict(stop_strings=["a", ""]), "stop_strings.*at least one character"),
        (dict(stop_strings=["a\ufffd"]), "U.FFFD"),
        (dict(ban_token_ids=[8], stop_token_sequences=[[7, 8]]), "token 8 is part of the stop"),
        (dict(max_depth=0), "max_depth=0"),
        (dict(segment_length=0), "segment_length=0"),
        (dict(segment_length=64), "segment_length=64.*max_response_length=32"),
        (dict(max_depth=3), r"at 24 tokens.*max_depth=4.*max_response_length=24"),
        (dict(initial_divergence_min=3), "lower initial_divergence_max|min=3"),
        (dict(initial_divergence_max=17), "initial_divergence_max=17.*n=16"),
        (dict(branching="evn"), "unknown branching rule 'evn'. Did you mean 'even'"),
        (dict(fallback="radom"), "unknown fallback chooser 'radom'. Did you mean 'random'"),
        (dict(fallback="random_segment"), "unknown fallback chooser 'random_segment'.*random"),
        (
            dict(fallback="nune"),
            "'nune'. Did you mean 'none'. Known: finished_first, .*, none, ran",
        ),
        (dict(branching_score="median"), "unknown branching score 'median'.*cumulative"),
        (dict(branching_score="mean"), "branching_score='mean'.*not be used.*=low_logprob or high"),
        (
            dict(branching="entropy", branching_score="mean"),
            "not be used with rollout.branching='entropy'",
        ),
        (
            dict(branching_schedule="linear"),
            "branching_schedule.*not be used.*rollout.branching='even'",
        ),
        (
            dict(branching_temperature=[2.0]),
            "branching_temperature.*not be used.*rollout.branching='even'",
        ),
        (dict(LOW, branching_schedule="cosine"), "unknown branching schedule.*sinusoidal"),
        (dict(LOW, branching_temperature=[0.0]), "branching_temperature=.0.0.*> 0"),
        (dict(LOW, branching_temperature=[1.0, 2.0]), "must be 1 numbers for .*'constant'"),
        (
            dict(LOW, branching_schedule="linear", branching_temperature=[1.0]),
            "must be 2 numbers for .*'linear'.*first, last",
        ),
        (dict(budget="tokens"), "unknown budget rule 'tokens'.*level_tokens.*response_tokens"),
        (dict(budget_tokens=99), "budget_tokens=99.*not be used with rollout.budget='width'"),
        (dict(budget_min_n=2), "budget_min_n=2.*not be used with rollout.budget='width'"),
        (dict(budget_min_n=17), "budget_min_n=17.*1..rollout.n=16"),
        (dict(budget="level_tokens"), "budget_tokens=0.*>= 16.*initial_divergence_max=2"),
        (
            dict(budget="level_tokens", budget_tokens=64, budget_min_n=2),
            "budget_min_n=2.*not be used.*choose rollout.budget=",
        ),
        (dict(budget="response_tokens"), "budget_tokens=0.*>= 1"),
        (dict(fallback_cut="box"), "unknown fallback cut 'box'.*block_softmax"),
        (
            dict(fallback="none", fallback_cut="from_start"),
            "fallback_cut='from_start' would not be used with rollout.fallback='none': choose "
            "rollout.fallback=finished_first, longer_first, random",
        ),
        (
            dict(fallback_block_length=4),
            "not be used with rollout.fallback_cut='segment'.*misaligned",
        ),
        (dict(fallback_cut="misaligned", fallback_block_length=-1), "fallback_block_length=-1"),
        (
            dict(fallback_cut="misaligned", fallback_block_length=32),
            "fallback_block_length=32 is not less than rollout.max_response_length=32",
        ),
        (
            dict(fallback_cut="misaligned", fallback_block_length=16),
            "multiple of rollout.segment_length=8.*rollout.fallback_cut=segment",
        ),
        (dict(finish="box"), "finish='box'.*boxed_as_eos"),
        (dict(repetition_count=1), "repetition_count=1"),
        (dict(repetition_ngram=0), "repetition_ngram=0"),
        (dict(answer_token_ids=[[]], finish="boxed_as_eos"), "answer_token_ids"),
        (dict(answer_detector="f", finish="boxed_as_eos"), "rollout.answer_detector 'f'.*expected"),
        (dict(answer_detector="a.py:f", finish="boxed_as_eos"), "answer_detector file 'a.py' does"),
        (dict(branching="nofile.py:f"), "branching rule file 'nofile.py' does not exist"),
        (dict(answer_token_ids=[[5]]), "would not be used with rollout.finish='eos'"),
    ],
)
def test_a_setting_out_of_range_is_named_with_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        TreePOSettings(**{**SHORT, **changes})


def test_a_finish_policy_that_cannot_see_answers_is_refused():
    settings = TreePOSettings(**SHORT, finish="boxed_as_eos")
    assert settings.lacks_answer_source  # training gives it the model's own tokenizer
    with pytest.raises(ValueError, match="rollout.answer_tokenizer"):
        TreePO(settings)


def test_names_are_known_and_checked_without_torch():
    code = (
        "import sys\n"
        "from rollout.strategies.base import STRATEGIES\n"
        "assert STRATEGIES.names() == ['flat', 'treepo'], STRATEGIES.names()\n"
        "STRATEGIES.get('treepo')(STRATEGIES.get('treepo').Settings())\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names_are_found_where_they_are_promised():
    import rollout.strategies

    assert rollout.strategies.TreePO is STRATEGIES.get("treepo")
    assert all(hasattr(rollout.strategies, name) for name in rollout.strategies.__all__)
    with pytest.raises(AttributeError, match="no attribute 'TreeP'"):
        _ = rollout.strategies.TreeP


def test_a_wrong_strategy_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="Did you mean 'treepo'.*flat, treepo"):
        STRATEGIES.get("treeop")
