"""Adapters: the policy they make, its gradient, and what leaves the learner."""

from __future__ import annotations

import dataclasses
import random

import peft
import pytest
import tiny_models
import torch
import transformers
from flat_oracle import flat_objective, plain_scores
from rank_program import LORA, drawn_trees
from test_learner import model_that_loaded
from token_trees import flat_trees, random_tree, save_tiny_model, tiny_model, token_tree

from trainers import attention
from trainers.learner import Learner
from trainers.lora import Adapters
from trainers.lora_settings import LoraSettings
from trainers.losses import POLICY_LOSSES, trained_tokens
from trainers.model import PolicyModel
from trainers.objective import objective
from trainers.packing import pack, pack_row, total_weight
from trainers.settings import LearnerSettings, OptimizerSettings, PolicyLossSettings

attention.register()
FAST = OptimizerSettings(lr=1e-2)
KL = PolicyLossSettings(kl_loss_coef=0.3)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", tie_word_embeddings=True)


def with_zero_b(model, settings=LORA):
    model.set_attn_implementation(attention.NAME)
    return PolicyModel(model, adapters=Adapters(model, settings))


def with_adapters(model, settings=LORA):
    """A policy whose B is not 0 any more."""
    policy = with_zero_b(model, settings)
    draw = torch.Generator().manual_seed(5)
    for layer in policy.adapters.layers.values():
        b = layer.lora_B["default"].weight
        b.data.copy_(0.2 * torch.randn(b.shape, generator=draw, dtype=b.dtype))
    return policy


def merged_policy(policy, make):
    """A plain model with the policy's merged weights, all of them trained."""
    model = make()
    model.load_state_dict(policy.weights(policy.model.state_dict()))
    model.set_attn_implementation(attention.NAME)
    return PolicyModel(model)


def logprobs_of(policy, row):
    return policy(row, torch.nonzero(row.weight > 0).squeeze(1))


def loss_of(policy, row, settings=PolicyLossSettings()):  # noqa: B008
    index = torch.nonzero(row.weight > 0).squeeze(1)
    tokens = trained_tokens(row, index, *policy(row, index))
    return objective(tokens, POLICY_LOSSES.get(settings.name), settings).loss


@pytest.mark.parametrize(
    "settings",
    [LORA, LoraSettings(rank=2, alpha=5, use_rslora=True)],
    ids=["alpha over rank", "rank-stabilised"],
)
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen3"])
def test_the_merged_model_computes_what_model_and_adapters_do(family, settings):
    def make():
        return tiny_model(family).double()

    policy = with_adapters(make(), settings)
    row = pack_row(drawn_trees(3))
    with torch.no_grad():
        (own, _), (merged, _) = (logprobs_of(p, row) for p in (policy, merged_policy(policy, make)))
        base, _ = logprobs_of(with_zero_b(make()), row)
    assert float((own - base).abs().max()) > 0.1
    # qwen3's norms compute in float32 whatever the model's dtype
    tolerance = 2e-5 if family == "qwen3" else 1e-11
    torch.testing.assert_close(own, merged, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "family", ["mistral", "gemma2", "gpt_oss", "phi3", "qwen3_moe", "deepseek_v3", "opt"]
)
def test_other_families_take_adapters_and_merge_them(family):
    model = tiny_models.tiny_model(family)
    policy = with_adapters(model)
    names = list(tiny_models.tiny_model(family).state_dict())
    merged = policy.weights(model.state_dict())
    assert list(merged) == names
    plain = merged_policy(policy, lambda: tiny_models.tiny_model(family))
    row = pack_row(drawn_trees(2))
    with torch.no_grad():
        torch.testing.assert_close(
            logprobs_of(policy, row)[0], logprobs_of(plain, row)[0], rtol=1e-3, atol=1e-4
        )
        assert float((logprobs_of(policy, row)[0] - base_logprobs(policy, row)).abs().max()) > 1e-3


def base_logprobs(policy, row):
    with policy.adapters.off():
        return logprobs_of(policy, row)[0]


def test_a_layer_s_merged_weight_is_the_one_worked_out_by_hand():
    """W + (alpha / r) B A for a layer [out, in], transposed where GPT-2 stores it so."""
    settings = LoraSettings(rank=2, alpha=3, target_modules=["q_proj"])
    policy = with_adapters(tiny_model("qwen3"), settings)
    state = {k: v.clone() for k, v in policy.model.state_dict().items()}
    name = "model.layers.1.self_attn.q_proj"
    a, b = (state[f"{name}.lora_{x}.default.weight"] for x in "AB")
    merged = policy.weights(state)
    w = state[f"{name}.base_layer.weight"].clone()
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            w[i, j] += 1.5 * (b[i, 0] * a[0, j] + b[i, 1] * a[1, j])
    torch.testing.assert_close(merged[f"{name}.weight"], w, rtol=1e-5, atol=1e-6)
    other = "model.layers.1.self_attn.k_proj.weight"
    assert merged[other].data_ptr() == state[other].data_ptr()


def test_gradients_follow_from_the_merged_model_s_by_the_chain_rule():
    """dL/dB = s G A^T and dL/dA = s B^T G with G the full gradient of the merged weight."""

    def make():
        return tiny_model("gpt2").double()

    policy = with_adapters(make())
    plain = merged_policy(policy, make)
    row = pack_row(drawn_trees(4))
    loss_of(policy, row).backward()
    loss_of(plain, row).backward()
    full = dict(plain.model.named_parameters())
    assert len(policy.adapters.layers) == 8  # four a layer
    for name, layer in policy.adapters.layers.items():
        gradient = full[f"{name}.weight"].grad.T  # [out, in]
        a, b = (getattr(layer, f"lora_{x}")["default"].weight for x in "AB")
        torch.testing.assert_close(b.grad, 2.0 * gradient @ a.T, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(a.grad, 2.0 * b.T @ gradient, rtol=1e-8, atol=1e-10)
        assert float(a.grad.abs().max()) > 1e-3
    frozen = [p for n, p in policy.named_parameters() if "lora" not in n]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_adapters_get_the_same_gradient_from_a_tree_as_from_its_leaves_one_by_one():
    """Against transformers' own attention and the objective as the papers write it."""
    rng = random.Random(3)
    roots = [random_tree(rng) for _ in range(3)]
    trees = [token_tree(root, dtype=torch.float64) for root in roots]
    policy = with_adapters(tiny_model("gpt2").double())
    loss_of(policy, pack_row(trees)).backward()
    of_tree = gradients(policy)
    settings, denominator = PolicyLossSettings(), total_weight(trees)
    for root in roots:
        for sequence in flat_trees(root, dtype=torch.float64):
            scored = plain_scores(policy.model, sequence)
            none = dataclasses.replace(scored, logprobs=scored.logprobs.detach())
            flat_objective(sequence, scored, none, settings, denominator).backward()
    of_leaves = gradients(policy)
    assert of_tree.keys() == of_leaves.keys() and len(of_tree) == 16
    for name, gradient in of_tree.items():
        torch.testing.assert_close(gradient, of_leaves[name], rtol=1e-7, atol=1e-9)
        assert float(gradient.abs().max()) > 1e-4


def gradients(policy):
    found = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return found


def rows_of(trees, max_tokens=200):
    return pack(trees, max_tokens, 1)[0]


def make_learner(model_path, zero_stage=0, lora=LORA, **changes):
    settings = dict(zero_stage=zero_stage, optimizer=FAST, lora=lora) | changes
    return Learner(model_path, LearnerSettings(**settings))


def copy_of(state):
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_learner_begins_as_its_model_and_moves_the_adapted_layers_alone(model_path, zero_stage):
    plain = Learner(model_path, LearnerSettings())
    learner = make_learner(model_path, zero_stage)
    assert learner.digest() == plain.digest()
    before = copy_of(learner.state_tensors())
    with learner._whole_state() as own:
        frozen = copy_of(learner.policy.adapters.base(own))
    metrics = learner.update([rows_of(drawn_trees(4))] * 2)
    assert metrics["actor/num_updates"] == 2 and 0 < metrics["actor/grad_norm"] < 1e3
    after = learner.state_tensors()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    linear = {f"{name}.weight" for name in learner.policy.adapters.layers}
    assert len(linear) == 2 * 7 and moved == linear
    with learner._whole_state() as own:
        base = learner.policy.adapters.base(own)
        assert all(torch.equal(base[name], frozen[name]) for name in frozen)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_the_gradient_norm_is_that_of_the_adapters(model_path, zero_stage):
    settings = OptimizerSettings(name="sgd", lr=1.0, weight_decay=0.0, grad_clip=0.0)
    learner = make_learner(model_path, zero_stage, optimizer=settings)
    trees = drawn_trees(3)
    policy = make_learner(model_path).policy
    loss_of(policy, pack_row(trees)).backward()
    expected = sum(float(g.square().sum()) for g in gradients(policy).values()) ** 0.5
    metrics = learner.update([rows_of(trees)])
    assert metrics["actor/grad_norm"] == pytest.approx(expected, rel=1e-4)
    with learner._whole_state() as own:
        b = [t for n, t in own.items() if "lora_B" in n]
        moved = sum(float(t.square().sum()) for t in b) ** 0.5  # from 0
    assert moved == pytest.approx(expected, rel=1e-4)  # A has no gradient while B is 0


def test_recomputed_layers_give_adapters_the_same_update(model_path):
    changes = dict(policy_loss=KL, reference="lora_off")
    plain = make_learner(model_path, **changes)
    recomputing = make_learner(model_path, gradient_checkpointing=True, **changes)
    rows = rows_of(drawn_trees(3))
    assert plain.update([rows, rows]) == recomputing.update([rows, rows])
    assert plain.digest() == recomputing.digest()


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_the_optimiser_holds_the_adapters_alone(model_path, zero_stage):
    learner = make_learner(model_path, zero_stage)
    learner.update([rows_of(drawn_trees(2))])
    # r (in + out) of each layer, worked out from the model's shape: hidden 16, 4 and 2 heads of 8,
    # intermediate 24; q, k, v, o, gate, up, down
    widths = [16 + 32, 16 + 16, 16 + 16, 32 + 16, 16 + 24, 16 + 24, 24 + 16]
    expected = 2 * 3 * sum(widths)
    held = sum(
        tensor.numel()
        for state in learner._engine.optimizer.state.values()
        for tensor in state.values()
        if torch.is_tensor(tensor) and tensor.numel() > 1
    )
    # two moments, with at most a few elements of padding
    assert 2 * expected <= held < 2 * expected + 64
    everything = sum(p.numel() for p in Learner(model_path, LearnerSettings()).policy.parameters())
    assert expected < everything / 2


@pytest.mark.parametrize(
    ("zero_stage", "dtype"),
    [(0, "float32"), (1, "float32"), (2, "bfloat16"), (3, "float32"), (3, "bfloat16")],
)
def test_a_resumed_learner_makes_the_identical_next_update(model_path, tmp_path, zero_stage, dtype):
    changes = dict(dtype=dtype, policy_loss=KL, reference="lora_off")
    learner = make_learner(model_path, zero_stage, **changes)
    rows = rows_of(drawn_trees(4))
    learner.update([rows, rows])
    learner.save(tmp_path)
    saved = learner.digest()
    metrics = learner.update([rows])
    final = learner.digest()
    resumed = make_learner(model_path, zero_stage, **changes)
    assert resumed.digest() != saved
    resumed.load(tmp_path)
    assert resumed.digest() == saved and resumed.num_optimizer_steps == 2
    assert resumed.update([rows]) == metrics
    assert resumed.digest() == final


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_checkpoint_leaves_the_frozen_weights_out(model_path, tmp_path, zero_stage):
    learner = make_learner(model_path, zero_stage)
    learner.save(tmp_path)
    (file,) = (tmp_path / "weights_and_optimizer").glob("*model_states.pt")
    names = [n for n in torch.load(file, weights_only=False)["module"] if "lora" not in n]
    frozen = {n for n, p in learner.policy.named_parameters() if not p.requires_grad}
    assert not frozen & set(names)


def test_a_checkpoint_goes_on_with_the_same_adapters_and_model_alone(tmp_path):
    model_path = save_tiny_model(tmp_path / "model")
    make_learner(model_path).save(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"written with lora=\{'rank': 3.*has \{'rank': 4"):
        make_learner(model_path, lora=LoraSettings(rank=4)).load(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="written with lora=.*has None"):
        Learner(model_path, LearnerSettings()).load(tmp_path / "checkpoint")
    save_tiny_model(tmp_path / "model", attention_bias=True)
    with pytest.raises(ValueError, match="adapters on another model .* put the model"):
        make_learner(model_path).load(tmp_path / "checkpoint")


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_an_export_is_the_merged_model_with_the_adapters_beside_it(
    model_path, tmp_path, zero_stage
):
    learner = make_learner(model_path, zero_stage)
    learner.update([rows_of(drawn_trees(2))])
    learner.export_hf(tmp_path)
    state = learner.state_tensors()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(merged.state_dict()) == list(state)
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    base = transformers.AutoModelForCausalLM.from_pretrained(model_path)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        before, expected = base(ids).logits, merged(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)
    assert float((before - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_publication_is_what_an_engine_of_the_plain_model_stores(model_path, zero_stage):
    learner = make_learner(model_path, zero_stage)
    learner.update([rows_of(drawn_trees(2))])
    engine = model_that_loaded(learner, model_path)
    path = torch.tensor([3, 1, 4, 1, 5])
    logits = engine(path[None]).logits[0, :-1]
    expected = torch.log_softmax(logits, -1).gather(1, path[1:, None])[:, 0]
    (score,) = learner.score_paths([path.numpy()])
    torch.testing.assert_close(torch.from_numpy(score), expected.detach(), rtol=1e-4, atol=1e-5)


def test_adapters_begin_alike_whatever_was_drawn_before_and_leave_the_draws_alone():
    first = Adapters(tiny_model("qwen3"), LORA)
    torch.manual_seed(77)
    expected = torch.rand(3)
    torch.manual_seed(77)
    model = tiny_model("qwen3")
    torch.manual_seed(77)
    second = Adapters(model, LORA)
    assert torch.equal(torch.rand(3), expected)
    other = Adapters(tiny_model("qwen3"), dataclasses.replace(LORA, seed=1))
    for name, layer in first.layers.items():
        a = layer.lora_A["default"].weight
        assert torch.equal(a, second.layers[name].lora_A["default"].weight)
        assert not torch.equal(a, other.layers[name].lora_A["default"].weight)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(rank=-1), r"lora.rank=-1: must be >= 0"),
        (dict(rank=4, alpha=0.0), r"lora.alpha=0.0"),
        (dict(rank=4, dropout=0.1), r"lora.dropout=0.1: must be 0: with dropout every forward"),
        (dict(rank=4, target_modules=[]), r"lora.target_modules=\[\]"),
        (dict(rank=4, target_modules=["all-linear", "q_proj"]), "alone"),
        (dict(rank=4.5), "rank"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        LoraSettings(**changes)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["q_proj", "w1"], "'w1' is no layer of Qwen3ForCausalLM.*down_proj.*v_proj"),
        (["embed_tokens"], "'embed_tokens' is no linear layer below the head"),
        (["lm_head"], "'lm_head' is no linear layer below the head"),
    ],
)
def test_names_of_layers_that_cannot_have_adapters_are_refused_with_those_that_can(
    model_path, names, match
):
    with pytest.raises(ValueError, match=match):
        make_learner(model_path, lora=LoraSettings(rank=2, target_modules=names))


def test_a_reference_without_adapters_needs_adapters():
    with pytest.raises(ValueError, match="lora_off' needs adapters .* set lora.rank"):
        LearnerSettings(policy_loss=KL, reference="lora_off")
