import pytest
import torch

from treepo.base.digest import combine_digests, manifest_of, tensor_digest, tensor_digests

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]


def test_the_digest_of_known_bytes_follows_the_formula():
    from treepo.base.digest import _word_of
    from treepo.base.keys import mix64

    gamma, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    seed = _word_of("w|torch.int64|(2,)")
    total = sum(mix64(word ^ mix64((i + 1) * gamma + seed)) for i, word in enumerate([5, 9]))
    assert tensor_digest("w", torch.tensor([5, 9])) == mix64((total & mask) ^ seed)


@pytest.mark.parametrize(
    "num_bytes", [0, 5, 8, 100_003, 8 * (1 << 16), 8 * (1 << 17) + 24, 1 << 21]
)
def test_the_digest_does_not_depend_on_the_chunks_it_is_computed_in(num_bytes):
    from treepo.base.digest import _word_of
    from treepo.base.keys import mix64

    gamma, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    generator = torch.Generator().manual_seed(num_bytes)
    raw = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)
    seed = _word_of(f"w|torch.uint8|({num_bytes},)")
    padded = raw.numpy().tobytes() + b"\0" * (-num_bytes % 8)
    total = 0
    for at in range(0, len(padded), 8):
        word = int.from_bytes(padded[at : at + 8], "little")
        total += mix64(word ^ mix64((at // 8 + 1) * gamma + seed))
    assert tensor_digest("w", raw) == mix64((total & mask) ^ seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, 8, 1000])
def test_every_single_flipped_byte_changes_the_digest(dtype, size):
    tensor = (torch.arange(size) % 2).to(dtype)
    before = tensor_digest("w", tensor)
    raw = tensor.view(torch.uint8)
    for index in {0, raw.numel() // 2, raw.numel() - 1}:
        raw[index] ^= 1
        assert tensor_digest("w", tensor) != before
        raw[index] ^= 1
    assert tensor_digest("w", tensor) == before


def test_name_dtype_shape_and_order_of_elements_count():
    base = torch.arange(6.0)
    others = [
        tensor_digest("v", base),
        tensor_digest("w", base.double()),
        tensor_digest("w", base.reshape(2, 3)),
        tensor_digest("w", base.reshape(2, 3).T),
        tensor_digest("w", base.flip(0)),
    ]
    assert len({tensor_digest("w", base), *others}) == 6


def test_two_equal_shape_tensors_swapped_are_seen():
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    right = combine_digests(tensor_digests({"q": a, "k": b}))
    swapped = combine_digests(tensor_digests({"q": b, "k": a}))
    reordered = combine_digests(tensor_digests({"k": b, "q": a}))
    assert len({right, swapped, reordered}) == 3


def test_chunks_and_views_do_not_change_the_digest(monkeypatch):
    tensor = torch.randn(1001)
    whole = tensor_digest("w", tensor)
    assert tensor_digest("w", torch.cat([torch.zeros(1), tensor])[1:]) == whole  # unaligned storage
    monkeypatch.setattr("treepo.base.digest._CPU_CHUNK", 7)
    assert tensor_digest("w", tensor) == whole


def test_an_empty_tensor_has_a_digest_of_its_own():
    assert tensor_digest("w", torch.zeros(0)) != tensor_digest("w", torch.zeros(0, 3))


def test_the_manifest_lists_tied_tensors_together():
    shared = torch.randn(3, 2)
    manifest = manifest_of({"embed": shared, "norm": torch.ones(2), "head": shared})
    assert manifest.tied == (("embed", "head"),)
    assert [t.name for t in manifest.tensors] == ["embed", "norm", "head"]
    assert manifest_of({"embed": shared, "head": shared.clone()}).tied == ()
