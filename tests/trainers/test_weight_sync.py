"""Weight sync catches what can go wrong on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from token_trees import tiny_model
from transformers import AutoModelForCausalLM

from trainers.weight_sync import WeightSyncError, check_digests, check_probes, prepare
from treepo.base.digest import manifest_of, tensor_digests

FLOAT32 = ("float32", "float32")  # engines and learner


def sent_weights(dtype="float32", tied=True):
    model = tiny_model("qwen3", tie_word_embeddings=tied)
    return prepare(model.state_dict(), dtype)


def received(sent):
    """What an honest engine stores: the same bytes in its own memory, ties kept."""
    copies = {}
    return {
        name: copies.setdefault(tensor.data_ptr(), tensor.clone())
        for name, tensor in sent.tensors.items()
    }


def check(sent, stored):
    check_digests(sent.digests, {"engine 0": sent.digests, "engine 1": tensor_digests(stored)})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_honest_engine_passes_and_ties_survive_the_cast(dtype):
    sent = sent_weights(dtype)
    assert {str(t.dtype) for t in sent.tensors.values()} == {f"torch.{dtype}"}
    assert sent.manifest.tied == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert manifest_of(received(sent)) == sent.manifest
    check(sent, received(sent))


def test_a_flipped_bit_is_caught_and_named():
    sent = sent_weights()
    stored = received(sent)
    name = "model.layers.1.mlp.up_proj.weight"
    stored[name].view(torch.uint8)[3, 5] ^= 1
    with pytest.raises(WeightSyncError, match=f"engine 1 .* other bytes in {name}$"):
        check(sent, stored)


def test_two_swapped_tensors_of_equal_shape_are_caught():
    sent = sent_weights()
    stored = received(sent)
    one, other = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    assert stored[one].shape == stored[other].shape
    stored[one], stored[other] = stored[other], stored[one]
    with pytest.raises(WeightSyncError, match="gate_proj.*up_proj"):
        check(sent, stored)


def test_an_untied_head_that_kept_its_old_values_is_caught():
    sent = sent_weights()
    stored = received(sent)
    stored["lm_head.weight"] = stored["lm_head.weight"] + 1e-3
    with pytest.raises(WeightSyncError, match="other bytes in lm_head.weight"):
        check(sent, stored)
    assert manifest_of(stored) != sent.manifest


def test_a_missing_an_extra_and_a_reordered_tensor_are_caught():
    sent = sent_weights()
    stored = received(sent)
    norm = stored.pop("model.norm.weight")
    with pytest.raises(WeightSyncError, match="lacks model.norm.weight"):
        check(sent, stored)
    stored["model.norm.weight"] = norm
    with pytest.raises(WeightSyncError, match="another order"):
        check(sent, stored)
    with pytest.raises(WeightSyncError, match="were not sent: adapter"):
        check(sent, {**received(sent), "adapter": norm})


def test_probes_return_the_largest_gap_and_refuse_more_than_rounding():
    reference = [np.array([-1.0, -2.0]), np.array([-3.0])]
    close = [np.array([-1.0, -2.00001]), np.array([-3.0])]
    assert check_probes(reference, {"engine 0": close}, FLOAT32) == pytest.approx(1e-5)
    far = [np.array([-1.0, -2.0]), np.array([-3.1])]
    with pytest.raises(WeightSyncError, match="engine 1 .* token 1 of golden sequence 1"):
        check_probes(reference, {"engine 0": close, "engine 1": far}, FLOAT32)
    with pytest.raises(WeightSyncError, match="nan apart"):
        check_probes(reference, {"engine 0": [close[0], np.array([np.nan])]}, FLOAT32)
    with pytest.raises(WeightSyncError, match="other golden sequences"):
        check_probes(reference, {"engine 0": close[:1]}, FLOAT32)


def test_probes_allow_what_the_coarser_of_two_dtypes_rounds_away():
    reference = [np.full(100, -1.0)]
    one_far, all_off = reference[0].copy(), reference[0] - 0.25
    one_far[7] -= 1.5  # as an unlikely token in bfloat16
    for dtypes in (("bfloat16", "float32"), ("float32", "bfloat16")):
        assert check_probes(reference, {"engine": [one_far]}, dtypes) == 1.5
        with pytest.raises(WeightSyncError, match="0.25 apart in the mean .* in bfloat16 .* 0.2"):
            check_probes(reference, {"engine": [all_off]}, dtypes)
    with pytest.raises(WeightSyncError, match="1.5 apart at token 8 .* in float16 .* 0.3"):
        check_probes(reference, {"engine": [one_far]}, ("float16", "float32"))
    close = [reference[0] - 2e-5]
    assert check_probes(reference, {"engine": close}, ("float64", "float32")) < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["tiny_chain_sum", "tiny_long_sums"])
def test_models_in_16_bits_pass_the_probes_and_permuted_weights_do_not(name, dtype):
    folder = Path(__file__).parents[2] / "treepo" / "assets" / name
    rng = np.random.default_rng(0)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rough = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    golden = [rng.integers(0, exact.config.vocab_size, 60) for _ in range(4)]
    reference = [logprobs(exact, row) for row in golden]
    found = [logprobs(rough, row) for row in golden]
    assert check_probes(reference, {"engine": found}, (dtype, "float32")) > 1e-4
    weights = rough.get_output_embeddings().weight.data
    weights.copy_(weights.roll(1, 0).clone())
    with pytest.raises(WeightSyncError, match="other log-probs"):
        check_probes(
            reference, {"engine": [logprobs(rough, row) for row in golden]}, (dtype, "float32")
        )


@torch.no_grad()
def logprobs(model, row: np.ndarray) -> np.ndarray:
    tokens = torch.tensor(row)
    of_all = torch.log_softmax(model(tokens[None]).logits[0, :-1].double(), -1)
    return of_all.gather(1, tokens[1:, None])[:, 0].numpy()
