"""Settings of segmented rollout that are wrong, or would not be used, are named."""

from __future__ import annotations

import pytest

from treepo.cli import compose
from treepo.config import TrainConfig
from treepo.segment_settings import SegmentSettings
from treepo.sizes import derived_sizes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segment_length": -1}, "segment_length=-1: it must be >= 0"),
        ({"segment_length": 1.5}, "segment_length=1.5: it must be an integer"),
        (
            {"submit": "longest"},
            "submit='longest' is unknown.*in_order, longest_first",
        ),
        ({"refill": "all"}, "refill='all' is unknown; choose one of constant, keep_in_flight"),
        ({"train_on": "full"}, "train_on='full' is unknown.*full_batch"),
        ({"group_policy": "wait"}, "group_policy='wait' is unknown.*finished_part"),
        ({"on_stale": "wait"}, "on_stale='wait' is unknown.*finish, drop"),
        (
            {"segment_length": 0, "train_on": "full_batch"},
            "train_on='full_batch' is not used with .*segment_length=0.*segment_length > 0",
        ),
        ({"prompts_in_flight": 9}, "prompts_in_flight=9 is not used with .*refill='constant'"),
        ({"stop_when_finished": -2}, "stop_when_finished=-2: it must be >= 0"),
        ({"min_finished": 2}, "min_finished=2 is not used with .*group_policy='wait_all'"),
        ({"on_stale": "drop"}, "on_stale='drop' is not used with .*max_staleness=0"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(settings, message):
    with pytest.raises(ValueError, match=f"trainer.segments.{message}"):
        SegmentSettings(**{"segment_length": 16, **settings})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.segments.segment_length=65"], "segment_length=65 .*max_response_length=64"),
        (
            [
                "trainer.segments.segment_length=16",
                "trainer.segments.group_policy=finished_part",
                "trainer.segments.min_finished=17",
            ],
            "min_finished=17 is more than rollout.n=16",
        ),
        (
            ["trainer.segments.segment_length=16", "trainer.segments.stop_when_finished=23"],
            "stop_when_finished=23 ends fewer .*train_batch_size=24.*refill=keep_in_flight, or",
        ),
        (
            [
                "trainer.segments.segment_length=16",
                "trainer.segments.refill=to_target",
                "trainer.segments.stop_when_finished=9",
            ],
            "stop_when_finished=9 ends fewer .*refill='to_target' begins .*refill=keep_in_flight",
        ),
        (
            [
                "trainer.segments.segment_length=16",
                "trainer.segments.submit=longest_first",
                "trainer.segments.stop_when_finished=24",
            ],
            "stop_when_finished=24 with .*longest_first.*set .*max_staleness, .*or submit=in_order",
        ),
        (
            [
                "trainer.segments.segment_length=16",
                "trainer.segments.refill=keep_in_flight",
                "trainer.segments.stop_when_finished=48",
            ],
            "stop_when_finished=48 leaves nothing to cut, as 48 trees are in flight",
        ),
        (
            ["trainer.segments.segment_length=16", "algorithm=dynamic"],
            "max_num_gen_batches=3 .*max_num_gen_batches=1 and .*train_on=full_batch",
        ),
    ],
)
def test_segments_that_do_not_fit_the_rest_are_refused_with_what_does(overrides, message):
    with pytest.raises(ValueError, match=message):
        compose("train", TrainConfig, ["+experiment=quickstart", *overrides])


def test_the_sizes_say_how_many_segments_there_are_and_how_old_tokens_get():
    words = ["+experiment=quickstart", "trainer.segments.segment_length=10"]
    config = compose("train", TrainConfig, words)
    assert config.trainer.segments.num_segments(64) == 7
    assert derived_sizes(config)["segments"].startswith("up to 7 of 10 tokens")
    assert "oldest token is up to 6 versions of the weights" in derived_sizes(config)["segments"]
    assert derived_sizes(config)["updates a step"].endswith("more or fewer as they end")
    assert derived_sizes(config)["updates in all"] == "about 120"
    words += ["trainer.segments.train_on=full_batch", "trainer.segments.refill=keep_in_flight"]
    words += ["trainer.segments.stop_when_finished=24"]
    april = derived_sizes(compose("train", TrainConfig, words))
    assert "ends with 24 trees that are done, so its tokens may be of any age" in april["segments"]
    assert april["updates in all"] == "at most 120"
    whole = derived_sizes(compose("train", TrainConfig, ["+experiment=quickstart"]))
    assert "segments" not in whole and whole["updates in all"] == "120"
