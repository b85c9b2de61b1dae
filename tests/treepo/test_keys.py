import hypothesis.strategies as st
import torch
from hypothesis import given

from treepo.base.keys import (
    Purpose,
    child_key,
    draw_word,
    mix64,
    root_key,
    to_signed,
    uniform,
    uniforms,
)

WORD = st.integers(0, 2**64 - 1)


def test_the_mixer_gives_the_published_splitmix_sequence():
    # SplitMix64 seeded with 0 steps its state by the golden gamma; its first outputs are well
    # known.
    gamma = 0x9E3779B97F4A7C15
    assert mix64(gamma) == 0xE220A8397B1DCDAF
    assert mix64(2 * gamma) == 0x6E789E6AA1B965F4


@given(WORD, st.integers(0, 2**40), st.sampled_from(Purpose))
def test_the_batch_of_draws_equals_the_scalar_draws_bit_for_bit(key, position, purpose):
    batch = uniforms(torch.tensor([to_signed(key)]), torch.tensor([position]), purpose)
    assert batch.item() == uniform(key, position, purpose)


@given(WORD, st.integers(0, 2**40))
def test_a_draw_lies_strictly_between_zero_and_one(key, position):
    assert 0.0 < uniform(key, position, Purpose.TOKEN) < 1.0


def test_the_extreme_words_stay_inside_the_open_interval():
    largest = (((2**64 - 1) >> 12) + 0.5) * 2.0**-52
    assert largest < 1.0 and (0 + 0.5) * 2.0**-52 > 0.0


def test_draws_differ_by_key_position_and_purpose():
    key = root_key(0, "problem")
    words = {
        draw_word(k, position, purpose)
        for k in (key, child_key(key, 0), child_key(key, 1))
        for position in range(50)
        for purpose in Purpose
    }
    assert len(words) == 3 * 50 * len(Purpose)


def test_draws_are_uniform_over_positions_and_over_keys():
    for keys, positions in (
        (torch.full((40_000,), 7), torch.arange(40_000)),
        (torch.tensor([to_signed(root_key(i)) for i in range(40_000)]), torch.zeros(40_000).long()),
    ):
        draws = uniforms(keys, positions, Purpose.TOKEN)
        counts = torch.histc(draws, bins=100, min=0, max=1)
        chi_square = ((counts - 400) ** 2 / 400).sum().item()
        assert chi_square < 160  # 99 degrees of freedom, p < 1e-4 beyond


def test_root_keys_tell_types_and_parts_apart():
    keys = [
        root_key(1),
        root_key("1"),
        root_key(1, 2),
        root_key(12),
        root_key("1", "2"),
        root_key(),
    ]
    assert len(set(keys)) == len(keys)


def test_root_keys_are_the_same_in_every_process():
    assert root_key(0, "train", 1) == 13580677370210794904
