"""What users import stays where the documentation says it is."""

import importlib

import pytest

NAMES = {
    "rollout": [
        "Completion",
        "CostLedger",
        "Draft",
        "DraftTree",
        "Engine",
        "EngineSettings",
        "ExtendSpec",
        "Growth",
        "GrowthLimits",
        "Node",
        "Scorer",
        "Segment",
        "Tree",
        "generate",
        "grow",
    ],
    "rollout.strategies": ["Flat", "TreePO", "FlatSettings", "TreePOSettings", "STRATEGIES"],
    "trainers": ["PackedBatch", "TokenTree", "Learner", "LearnerSettings", "pack"],
    "trainers.losses": ["POLICY_LOSSES", "ppo_clip", "gspo", "cispo", "reinforce", "nll"],
    "treepo.advantages": [
        *("ADVANTAGES", "estimate", "filter_groups", "spread_over_leaves", "spread_over_segments"),
        *("treepo", "treepo_size_weighted", "treepo_drop_degenerate", "treepo_no_root"),
        *("treepo_loo", "tree_grpo", "treerl", "spo", "treerpo", "sibling", "child_minus_parent"),
        *("grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"),
    ],
    "rewards": ["RewardPool", "RewardSettings", "RewardItem", "RewardResult"],
    "rewards.registry": ["REWARDS"],
}


@pytest.mark.parametrize("module", NAMES)
def test_public_names_can_be_imported_and_are_documented(module):
    loaded = importlib.import_module(module)
    for name in NAMES[module]:
        thing = getattr(loaded, name)
        assert thing is not None
        if callable(thing) and not name.isupper():
            assert thing.__doc__, f"{module}.{name}"


@pytest.mark.parametrize("package", ["rollout", "rollout.strategies", "trainers", "rewards"])
def test_a_name_that_is_not_there_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        importlib.import_module(package).nothing  # noqa: B018
