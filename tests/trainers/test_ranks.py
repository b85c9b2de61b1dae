"""The same parameters after an update, however its trees are dealt to ranks and rows."""

from __future__ import annotations

import multiprocessing

import pytest
import rank_program
import torch
from token_trees import save_tiny_model

from trainers.learner import Learner
from trainers.worker import free_port


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return save_tiny_model(folder, "qwen3", tie_word_embeddings=True)


def run_ranks(world_size, model_path, cases, folder, policy_loss, lora=None):
    context = multiprocessing.get_context("spawn")
    address = f"tcp://127.0.0.1:{free_port('127.0.0.1')}"
    ranks = [
        context.Process(
            target=rank_program.run,
            args=(rank, world_size, address, model_path, cases, str(folder), policy_loss, lora),
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=200)
    for process in ranks:
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in ranks] == [0] * world_size


def check_ranks(world_size, model_path, cases, folder, policy_loss, lora=None):
    """Every rank of every case against one rank with one row, ZeRO 0."""
    reference = Learner(model_path, rank_program.learner_settings(policy_loss, lora=lora))
    start = {name: tensor.clone() for name, tensor in reference.state_tensors().items()}
    rows = rank_program.dealt_rows(0, 1, 1)
    metrics = reference.update(rows, policy_version=rank_program.NEWEST)
    if policy_loss is rank_program.SEQUENCE_LOSS:
        for mask in ("old", "correction", "mpt"):
            assert 0.005 < metrics[f"actor/{mask}_masked_frac"] < 0.9, mask
    expected = reference.state_tensors()
    assert max((expected[n] - start[n]).abs().max() for n in expected) > 0.01
    run_ranks(world_size, model_path, cases, folder, policy_loss, lora)
    for zero_stage, accumulation in cases:
        case = f"zero{zero_stage}_accumulation{accumulation}"
        ranks = [torch.load(folder / case / f"rank{rank}.pt") for rank in range(world_size)]
        assert len({rank["digest"] for rank in ranks}) == 1
        for rank in ranks:
            assert rank["metrics"] == pytest.approx(metrics, rel=1e-4, abs=1e-6), case
            for name, tensor in expected.items():
                torch.testing.assert_close(
                    rank["tensors"][name],
                    tensor,
                    rtol=1e-4,
                    atol=2e-6,
                    msg=lambda text, where=f"{case} {name}": f"{where}: {text}",
                )


def test_two_ranks_with_three_unequal_rows_and_zero_3_equal_one_rank_with_one_row(
    model_path, tmp_path
):
    check_ranks(2, model_path, [(3, 3)], tmp_path, rank_program.SEQUENCE_LOSS)


@pytest.mark.long
@pytest.mark.parametrize("policy_loss", [rank_program.TOKEN_LOSS, rank_program.SEQUENCE_LOSS])
@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_do_not_depend_on_ranks_accumulation_and_zero_stage(
    world_size, policy_loss, model_path, tmp_path
):
    cases = [(stage, accumulation) for stage in (0, 1, 2, 3) for accumulation in (1, 3)]
    check_ranks(world_size, model_path, cases, tmp_path, policy_loss)


@pytest.mark.long
@pytest.mark.parametrize("world_size", [1, 2])
def test_adapters_do_not_depend_on_ranks_accumulation_and_zero_stage(
    world_size, model_path, tmp_path
):
    cases = [(stage, accumulation) for stage in (0, 1, 2, 3) for accumulation in (1, 3)]
    loss = rank_program.SEQUENCE_LOSS
    check_ranks(world_size, model_path, cases, tmp_path, loss, rank_program.LORA)
