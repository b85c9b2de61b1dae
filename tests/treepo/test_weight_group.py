"""A weight group delivers, agrees before it sends, and names who is missing: nobody hangs."""

from __future__ import annotations

import multiprocessing
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from weight_members import (
    BUCKET_BYTES,
    CPU,
    HOST,
    NUM_BUCKETS,
    names,
    receive_or_die,
    run_members,
    send_and_die,
)

from treepo.base.weight_group import (
    WeightGroup,
    WeightGroupError,
    _each_has_a_gpu,
    open_store,
    reach_store,
)

LIMIT = 1.5  # seconds: the time limit of groups in which somebody fails


def send(group, content=7, num_buckets=2):
    group.offer("seven")
    buffer = torch.full((1000,), content, dtype=torch.uint8)
    for _ in range(num_buckets):
        group.broadcast(buffer)
    group.confirm_received()


def receive(group, num_buckets=2):
    offered = group.next_offer()
    group.accept()
    buffer = torch.zeros(1000, dtype=torch.uint8)
    for _ in range(num_buckets):
        group.broadcast(buffer)
    group.confirm_received()
    return offered, buffer


def test_what_the_sender_offers_and_broadcasts_reaches_every_receiver_again_and_again():
    def send_twice(group):
        send(group, 7)
        send(group, 9)

    def receive_twice(group):
        return receive(group), receive(group)

    _, *received = run_members([send_twice, receive_twice, receive_twice, receive_twice])
    for first, second in received:
        assert first[0] == second[0] == "seven"
        assert (first[1] == 7).all() and (second[1] == 9).all()


def test_one_refusal_is_told_to_all_and_nothing_is_sent():
    def refuse(group):
        group.next_offer()
        group.refuse("too large for me")

    began = time.monotonic()
    sender, honest, _ = run_members([send, receive, refuse])
    assert time.monotonic() - began < 10
    for error in (sender, honest):
        assert isinstance(error, WeightGroupError)
        assert str(error) == "engine 1 refuses the weights: too large for me"


def test_a_member_that_never_comes_is_named():
    errors = run_members([send, receive, None], timeout_seconds=LIMIT)
    assert "engine 1 did not come to the weight group within 1.5 s" in str(errors[0])
    assert "engine 1 did not come" in str(errors[1])


def test_a_receiver_that_does_not_answer_the_offer_is_named_and_the_others_are_told():
    sender, honest, _ = run_members(
        [send, receive, lambda group: time.sleep(LIMIT + 2)], timeout_seconds=LIMIT
    )
    assert str(sender) == "engine 1 did not answer to the offer of weights within 1.5 s"
    assert "engine 1 did not answer to the offer" in str(honest)


def test_a_receiver_that_stops_half_way_is_named_and_the_others_do_not_wait_for_its_bytes():
    def stop_half_way(group):
        receive_one = torch.zeros(1000, dtype=torch.uint8)
        group.next_offer()
        group.accept()
        group.broadcast(receive_one)
        group.fail("no memory left")

    began = time.monotonic()
    sender, honest, _ = run_members([send, receive, stop_half_way], timeout_seconds=30.0)
    assert time.monotonic() - began < 15
    assert "engine 1: no memory left" in str(sender)
    # An honest one may have had everything before it heard of the failure.
    assert isinstance(honest, tuple) or "engine 1: no memory left" in str(honest)


def test_a_receiver_that_never_confirms_is_named():
    def keep_silent(group):
        group.next_offer()
        group.accept()
        for _ in range(2):
            group.broadcast(torch.zeros(1000, dtype=torch.uint8))
        time.sleep(LIMIT + 1)

    sender, _, _ = run_members([send, receive, keep_silent], timeout_seconds=LIMIT)
    assert str(sender) == "engine 1 did not confirm that the weights arrived within 1.5 s"


def test_a_store_that_nobody_keeps_is_an_error():
    port = open_store(HOST, 1.0).port  # closed at once
    with pytest.raises(WeightGroupError, match=f"nobody offers weights at {HOST}:{port}"):
        reach_store(HOST, port, 1.0)


def test_a_group_neither_needs_nor_makes_nor_replaces_the_default_group():
    before = dist.group.WORLD if dist.is_initialized() else None
    sender, received = run_members([send, receive])
    assert sender is None and (received[1] == 7).all()
    assert (dist.group.WORLD if dist.is_initialized() else None) is before


@pytest.mark.parametrize(
    ("fate", "victim"),
    [
        (signal.SIGKILL, 1),
        pytest.param(signal.SIGSTOP, 2, marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, 2, marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, 3, marks=pytest.mark.long),
        pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.long),
        pytest.param(signal.SIGSTOP, 3, marks=pytest.mark.long),
    ],
)
def test_a_receiver_killed_or_stopped_during_the_broadcast_is_named_to_all_within_the_limit(
    fate, victim
):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    store = open_store(HOST, 30.0)
    receivers = (1, 2, 3)
    processes = [
        context.Process(
            target=receive_or_die,
            args=(rank, store.port, 4, fate if rank == victim else None, LIMIT, answers),
        )
        for rank in receivers
    ]
    try:
        for process in processes:
            process.start()
        store.wait([f"ready/{rank}" for rank in receivers])
        group = WeightGroup(store, 0, names(3), device=CPU, timeout_seconds=LIMIT)
        group.offer("bytes")
        began = time.monotonic()
        with pytest.raises(WeightGroupError, match=f"; no answer from engine {victim - 1}$"):
            for _ in range(NUM_BUCKETS):
                group.broadcast(torch.zeros(BUCKET_BYTES, dtype=torch.uint8))
            group.confirm_received()
        assert time.monotonic() - began < LIMIT + 5
        for _ in range(2):
            rank, outcome, seconds = answers.get(timeout=20)
            assert rank != victim and seconds < LIMIT + 5
            assert outcome.endswith(f"; no answer from engine {victim - 1}")
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
def test_a_sender_killed_or_frozen_during_the_broadcast_is_named_to_every_receiver(fate):
    context = multiprocessing.get_context("spawn")
    ports = context.Queue()
    sender = context.Process(target=send_and_die, args=(fate, LIMIT, ports))

    def play(rank):
        store = reach_store(HOST, port, 20.0)
        group = WeightGroup(store, rank, names(2), device=CPU, timeout_seconds=LIMIT)
        group.next_offer()
        group.accept()
        began = time.monotonic()
        with pytest.raises(WeightGroupError, match="no answer from learner"):
            for _ in range(NUM_BUCKETS):
                group.broadcast(torch.zeros(BUCKET_BYTES, dtype=torch.uint8))
        return time.monotonic() - began

    sender.start()
    try:
        port = ports.get(timeout=60)
        with ThreadPoolExecutor(2) as threads:
            assert max(threads.map(play, (1, 2))) < LIMIT + 5
    finally:
        sender.kill()
        sender.join()


def test_nccl_is_for_members_with_a_gpu_each():
    assert _each_has_a_gpu(["cuda 1f", "cuda 2e", "cuda 3d"])
    assert not _each_has_a_gpu(["cuda 1f", "cuda 2e", "cuda 1f"])  # learner and engine take turns
    assert not _each_has_a_gpu(["cuda 1f", "cpu"])
    assert not _each_has_a_gpu(["cpu"])
