"""Memory that tensors give up comes back with every byte, under every view of it."""

from __future__ import annotations

import gc

import numpy as np
import torch

from treepo.base.aside import Aside, storages


def tensors() -> list[torch.Tensor]:
    """All of this process that Python knows."""
    gc.collect()
    return [
        thing
        for thing in gc.get_objects()
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.layout == torch.strided
    ]


def held_bytes() -> int:
    """Of all of them, each storage once."""
    found = [tensor.untyped_storage() for tensor in tensors()]
    return sum({storage._cdata: storage.nbytes() for storage in found}.values())


def test_views_of_one_buffer_see_the_same_values_after_their_memory_went_and_came():
    flat = torch.arange(64, dtype=torch.float32)
    views = [flat[:16].view(4, 4), flat[16:48].view(torch.int32), flat[60:]]
    integers = torch.arange(-3, 4, dtype=torch.int8)  # 7 bytes, no multiple of a word
    empty = torch.empty(0)
    before = [t.clone() for t in (flat, *views, integers)]
    aside = Aside()
    assert aside.put([*views, flat, integers, empty]) == 64 * 4 + 7 == aside.num_bytes
    assert all(t.untyped_storage().nbytes() == 0 for t in (flat, *views, integers))
    assert aside.restore() == 64 * 4 + 7 and aside.num_bytes == 0
    for tensor, expected in zip((flat, *views, integers), before, strict=True):
        assert torch.equal(tensor, expected)
    flat += 1
    assert torch.equal(views[0], flat[:16].view(4, 4))  # still views


def test_memory_is_freed_in_between_and_the_copies_after():
    others = tensors()  # what other tests left is not to go meanwhile
    start = held_bytes()
    big = torch.randn(1 << 20)
    kept = big.sum().item()
    aside = Aside()
    aside.put([big], forget=False)
    pieces = aside._put[0].copy
    assert held_bytes() - start == big.numel() * 4  # the copy alone
    del pieces
    aside.restore()
    assert held_bytes() - start == big.numel() * 4 and big.sum().item() == kept
    assert aside.put([big], forget=True) == 0
    assert held_bytes() == start and aside.num_bytes == big.numel() * 4
    assert aside.restore() == 0 and len(big) == big.untyped_storage().nbytes() // 4
    del others


def test_tensors_may_be_put_aside_in_turns_and_twice():
    first, second = torch.rand(5), torch.rand(7)
    copies = first.clone(), second.clone()
    aside = Aside()
    assert (aside.put([first]), aside.put([first, second]), aside.put([second])) == (20, 28, 0)
    assert aside.restore() == 48
    assert torch.equal(first, copies[0]) and torch.equal(second, copies[1])


def test_copies_may_be_forgotten_later():
    tensor = torch.rand(5)
    aside = Aside()
    aside.put([tensor])
    aside.forget()
    assert aside.restore() == 0 and tensor.untyped_storage().nbytes() == 20


def test_a_tensor_of_many_pieces_is_put_together_again(monkeypatch):
    monkeypatch.setattr("treepo.base.aside._CHUNK", 64)
    tensor = torch.rand(1001)
    copy, aside = tensor.clone(), Aside()
    aside.put([tensor])
    assert len(aside._put[0].copy) == 63
    aside.restore()
    assert torch.equal(tensor, copy)


def test_memory_that_torch_does_not_own_stays():
    array = np.arange(6.0)
    tensor = torch.from_numpy(array)
    aside = Aside()
    assert storages([tensor, torch.empty(3, device="meta")]) == []
    assert aside.put([tensor]) == 0 and tensor.sum() == 15
