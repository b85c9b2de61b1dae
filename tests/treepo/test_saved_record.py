"""Records in a checkpoint are those that were saved, or are refused with what is wrong."""

from __future__ import annotations

from dataclasses import fields

import pytest

from treepo.dynamic_sampling import GenBatch, StepBatch
from treepo.one_step import dump_ahead, load_ahead
from treepo.pools import Group, Pools, Unfinished, dump_pools, load_pools
from treepo.saved_record import Layout
from treepo.segmented import SegmentBatch

NUMBERS = Layout(name="numbers", version=3, kinds=(list,))


def test_what_is_dumped_is_loaded_and_nothing_else():
    data = NUMBERS.dump([1, 2])
    assert NUMBERS.load(data) == [1, 2]
    newer = Layout(name="numbers", version=4, kinds=(list,))
    with pytest.raises(ValueError, match="the numbers have format 3, and this version reads 4"):
        newer.load(data)
    with pytest.raises(ValueError, match="the numbers are damaged"):
        NUMBERS.load(data[:-1] + b"x")
    with pytest.raises(ValueError, match="this is no file of numbers"):
        NUMBERS.load(b"")
    words = Layout(name="numbers", version=3, kinds=(dict,)).dump({})
    with pytest.raises(ValueError, match="holds a dict and no numbers"):
        NUMBERS.load(words)
    with pytest.raises(ValueError, match="this is no file of pools"):
        load_pools(data)


def test_pools_and_batches_are_files_of_their_own():
    with pytest.raises(ValueError, match="this is no file of batches ahead"):
        load_ahead(dump_pools(Pools()))
    with pytest.raises(AssertionError):
        dump_ahead(Pools())


# Slotted records are restored by position: with other fields the version in ``treepo/pools.py``
# (2) or ``treepo/one_step.py`` (1) must become another, and then this list.
FIELDS = {
    Unfinished: "problem work begun oldest_version num_segments verdicts handed_on",
    Group: "problem tree verdicts begun oldest_version num_segments handed_on is_whole",
    Pools: "unfinished experience num_grown num_finished lengths",
    GenBatch: "problems trees verdicts ledger",
    StepBatch: "sampled kept counts returned num_gen_batches after",
    SegmentBatch: "sampled settled kept counts pools after num_new num_dropped spans",
}


@pytest.mark.parametrize("kind", FIELDS)
def test_the_records_of_a_version_have_its_fields(kind):
    assert " ".join(field.name for field in fields(kind)) == FIELDS[kind]
