"""docs/algorithms.md names every choice that the configuration knows."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import fields
from pathlib import Path

import pytest

from rollout.strategies import rule_settings as rules
from rollout.strategies.settings import FINISH_POLICIES, NO_FALLBACK, TreePOSettings
from trainers.mpt_settings import GATES, MPTSettings
from trainers.off_policy_settings import CORRECTIONS, AlarmSettings, OffPolicySettings
from trainers.settings import KL_LOSS_TYPES, POLICY_LOSSES, PolicyLossSettings
from treepo import segment_settings as segments
from treepo.algorithm_settings import (
    ADVANTAGES,
    ESTIMATOR_TRAITS,
    FILTER_METRICS,
    LOSS_WEIGHTINGS,
    NORMALISATIONS,
    OVERLONG_RULES,
    AdvantageSettings,
)

PAGE = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
TABLES = [
    [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in block.splitlines()
        if set(line) - set("|-")
    ]
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)
]
# Kinds whose names have a row each, and kinds that the text names.
IN_ROWS = {
    "estimators": ADVANTAGES.names(),
    "losses": POLICY_LOSSES.names(),
    "normalisations": [name for name in NORMALISATIONS if name != "auto"],
    "loss weightings": LOSS_WEIGHTINGS,
    "branchings": rules.BRANCHINGS.names(),
    "schedules": rules.BRANCHING_SCHEDULES.names(),
    "budgets": rules.BUDGETS.names(),
    "fallbacks": [*rules.FALLBACKS.names(), NO_FALLBACK],
    "cuts": rules.FALLBACK_CUTS.names(),
    "finish policies": FINISH_POLICIES,
    "overlong rules": OVERLONG_RULES,
}
IN_TEXT = {
    "corrections": [f"correction={name}" for name in CORRECTIONS],
    "gates of MPT masks": GATES,
    "orders of submission": segments.SUBMIT,
    "refill rules": segments.REFILLS,
    "group policies": segments.GROUP_POLICIES,
    "batches": segments.TRAIN_ON,
    "rules of staleness": segments.ON_STALE,
    "branching scores": rules.BRANCHING_SCORES.names(),
    "filter metrics": [f"algorithm.filter_groups_metric={FILTER_METRICS[1]}", FILTER_METRICS[0]],
}
KEYS = [
    *(field.name for field in fields(AdvantageSettings)),
    *(field.name for field in fields(PolicyLossSettings)),
    *(field.name for field in fields(OffPolicySettings)),
    *(field.name for field in fields(AlarmSettings)),
    *(field.name for field in fields(MPTSettings)),
    *(field.name for field in fields(segments.SegmentSettings)),
    # those of TreePO itself; how single tokens are drawn is no part of the page
    *(f.name for f in fields(TreePOSettings) if f.name in TreePOSettings.__annotations__),
]


def first_cells() -> set[str]:
    return {row[0] for table in TABLES for row in table}


@pytest.mark.parametrize(("kind", "names"), IN_ROWS.items(), ids=IN_ROWS)
def test_every_registered_name_has_a_row(kind, names):
    missing = [name for name in names if f"`{name}`" not in first_cells()]
    assert not missing, f"{kind} without a row in docs/algorithms.md: {missing}"


@pytest.mark.parametrize(("kind", "names"), IN_TEXT.items(), ids=IN_TEXT)
def test_every_other_name_stands_in_the_text(kind, names):
    missing = [name for name in names if f"`{name}`" not in PAGE]
    assert not missing, f"{kind} missing in docs/algorithms.md: {missing}"


def test_every_estimator_s_row_ends_with_its_auto_normalisation():
    rows = [row for table in TABLES if table[0][-1] == "`auto`" for row in table[1:]]
    found = {row[0].strip("`"): row[-1].strip("`") for row in rows}
    assert found == {name: traits.auto for name, traits in ESTIMATOR_TRAITS.items()}


def test_the_normalisations_rows_name_the_estimators_that_cannot_use_them():
    (table,) = (t for t in TABLES if t[0] == ["Name", "Divides by", "Used by"])
    assert [row[0].strip("`") for row in table[1:]] == [n for n in NORMALISATIONS if n != "auto"]
    used_by = {row[0].strip("`"): row[2] for row in table[1:]}
    used_by["release"] = used_by["tokens"]  # the page says "the same"
    assert used_by["leaves"].startswith("one a response")
    for normalisation, text in used_by.items():
        users = {name for name, t in ESTIMATOR_TRAITS.items() if normalisation in t.uses}
        excluded = {
            name
            for pattern in re.findall(r"`([\w*]+)`", text)
            for name in fnmatch.filter(ESTIMATOR_TRAITS, pattern)
        }
        if normalisation == "leaves":
            excluded |= {name for name, t in ESTIMATOR_TRAITS.items() if t.is_node_level}
        assert users == set(ESTIMATOR_TRAITS) - excluded, normalisation


@pytest.mark.parametrize("key", sorted({*KEYS} - {"name"}))
def test_every_setting_of_an_algorithm_is_named(key):
    assert re.search(rf"\b{key}\b", PAGE), f"{key} is not in docs/algorithms.md"


@pytest.mark.parametrize("kind", KL_LOSS_TYPES)
def test_every_kl_estimator_has_a_formula(kind):
    assert re.search(rf"\b{kind} = ", PAGE)
