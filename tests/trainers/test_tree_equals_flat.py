"""A packed tree has the log-probs, the objective and the gradients of its leaves as separate rows.

The flat side is ``flat_oracle``: each leaf by itself, through transformers' own attention, with the
objective as the papers write it.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import tiny_models
import torch
from flat_oracle import flat_objective, plain_scores
from token_trees import flat_trees, random_tree, tiny_model, token_tree, weighted_as

from trainers import attention
from trainers.losses import POLICY_LOSSES, trained_leaves, trained_tokens
from trainers.model import PolicyModel, check_supported
from trainers.objective import objective
from trainers.packing import pack_row, total_weight
from trainers.settings import PolicyLossSettings

attention.register()
PPO = dict(name="ppo_clip", clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0)
GSPO = dict(name="gspo", clip_ratio_low=0.2, clip_ratio_high=0.15)
CISPO = dict(name="cispo", clip_ratio_low=0.6, clip_ratio_high=0.5)
OBJECTIVES = {
    "ppo_clip": PolicyLossSettings(**PPO),
    "gspo": PolicyLossSettings(**GSPO),
    "cispo": PolicyLossSettings(**CISPO),
    "reinforce": PolicyLossSettings(name="reinforce"),
    "nll": PolicyLossSettings(name="nll"),
    "ppo_clip, k1 and entropy": PolicyLossSettings(
        **PPO, kl_loss_coef=0.3, kl_loss_type="k1", entropy_coeff=0.2
    ),
    "cispo and k2": PolicyLossSettings(**CISPO, kl_loss_coef=0.3, kl_loss_type="k2"),
    "gspo, k3 and entropy": PolicyLossSettings(**GSPO, kl_loss_coef=0.1, entropy_coeff=0.2),
}


def policy_of(model, implementation=attention.NAME) -> PolicyModel:
    model.set_attn_implementation(implementation)
    return PolicyModel(model)


def tokens_of(policy, row, reference=None):
    index = torch.nonzero(row.weight > 0).squeeze(1)
    logprobs, entropy = policy(row, index, True)
    ref_logprobs = None
    if reference is not None:
        with torch.no_grad():
            ref_logprobs, _ = reference(row, index)
    return trained_tokens(row, index, logprobs, entropy, ref_logprobs)


def objective_of(tokens, settings):
    return objective(tokens, POLICY_LOSSES.get(settings.name), settings).loss


def loss_of(policy, row, settings=OBJECTIVES["ppo_clip"]):
    return objective_of(tokens_of(policy, row), settings)


def gradients(model, loss=None):
    """The parameters' gradients (of ``loss``, if given), which are then reset."""
    if loss is not None:
        loss.backward(retain_graph=True)
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(gradient, expected, tolerance, what=""):
    """Within ``tolerance`` of the largest entry of all gradients."""
    assert gradient.keys() == expected.keys(), what
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 1e-3, what
    for name, own in gradient.items():
        error = float((own - expected[name]).abs().max()) / largest
        assert error < tolerance, f"{what} {name}: {error:.2e}"


def with_ratios_around_1(model, trees, sequences):
    """Both with their old log-probs moved by the same, so that the ratio's log has mean 0 over the
    trees' tokens whatever the family's log-probs are."""
    with torch.no_grad():
        tokens = tokens_of(policy_of(model), pack_row(trees))
    shift = (tokens.logprobs - tokens.old_logprobs).mean()
    return [
        [replace(one, behaviour_logprobs=one.behaviour_logprobs + shift) for one in batch]
        for batch in (trees, sequences)
    ]


def assert_clipped_on_each_side(tokens, settings, what):
    """Some of the terms that are compared are clipped, on each side, and some are not."""
    bounds, log_ratio = settings.bounds(), (tokens.logprobs - tokens.old_logprobs).detach()
    pos, neg = tokens.advantage_pos > 0, tokens.advantage_neg < 0
    if settings.name == "gspo":
        leaves = trained_leaves(tokens.batch)
        log_ratio = tokens.path_sums(log_ratio, leaves) / tokens.batch.leaf_num_tokens[leaves]
        pos = tokens.batch.leaf_advantage[leaves] > 0
        neg = ~pos
    ratio = log_ratio.exp()
    inside = (ratio > bounds.low) & (ratio < bounds.high)
    for cases in (pos & (ratio > bounds.high), neg & (ratio < bounds.low), inside):
        assert 0.02 < float(cases.double().mean()) < 0.9, what


def check_family(make_model, tolerance, dtype=torch.float64, objectives=tuple(OBJECTIVES), seed=3):
    """Objective and gradients of two packed trees against their leaves one by one.

    Args:
        make_model: a new model with other weights at each call: the policy and the reference.
    """
    model, other = make_model().to(dtype).eval(), make_model().to(dtype).eval()
    rng = random.Random(seed)
    grown = [random_tree(rng, depth=3, segment=7) for _ in range(2)]
    for loss_weighting in ("token_mean", "sequence_mean"):
        roots = [weighted_as(root, loss_weighting) for root in grown]
        trees = [token_tree(root, temperature=0.8, dtype=dtype) for root in roots]
        sequences = [s for r in roots for s in flat_trees(r, temperature=0.8, dtype=dtype)]
        trees, sequences = with_ratios_around_1(model, trees, sequences)
        assert max(s.num_tokens for s in sequences) > 16  # longer than twice the window
        assert sum(s.num_tokens for s in sequences) > 1.5 * sum(t.num_tokens for t in trees)
        denominator = total_weight(trees)
        assert denominator == pytest.approx(total_weight(sequences), rel=1e-6)

        row = pack_row(trees, denominator)
        tokens = tokens_of(policy_of(model), row, policy_of(other))
        for name in objectives:
            if OBJECTIVES[name].name in ("ppo_clip", "gspo", "cispo"):
                assert_clipped_on_each_side(tokens, OBJECTIVES[name], name)
        tree_losses = {o: objective_of(tokens, OBJECTIVES[o]) for o in objectives}
        tree_gradients = {o: gradients(model, loss) for o, loss in tree_losses.items()}

        scored = [plain_scores(model, sequence) for sequence in sequences]
        with torch.no_grad():
            references = [plain_scores(other, sequence) for sequence in sequences]
        for name in objectives:
            what = f"{name}, {loss_weighting}"
            flat_loss = sum(
                flat_objective(sequence, own, reference, OBJECTIVES[name], denominator)
                for sequence, own, reference in zip(sequences, scored, references, strict=True)
            )
            expected = pytest.approx(flat_loss.item(), rel=tolerance, abs=tolerance)
            assert tree_losses[name].item() == expected, what
            assert_same(tree_gradients[name], gradients(model, flat_loss), tolerance, what)


def new_models(make):
    """Models of ``make(seed)``, another at each call."""
    seeds = iter(range(100))
    return lambda: make(next(seeds))


# Parts compute in float32 in a float64 model too: RMSNorm, eager attention's softmax, routers. How
# much their rounding makes depends on the processor: 3e-7 to 1.2e-6 was seen.
ROUNDING = 1e-5

FAMILIES = [
    ("gpt2", {}, torch.float64, 1e-10),
    ("gpt_neox", {}, torch.float64, 1e-10),
    ("qwen3", {}, torch.float64, ROUNDING),
    ("llama", {}, torch.float64, ROUNDING),
    ("mistral", {"sliding_window": 8}, torch.float64, ROUNDING),
    ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 8}, torch.float64, ROUNDING),
    ("cohere", {}, torch.float64, ROUNDING),
    ("granite", {"logits_scaling": 3.0}, torch.float64, ROUNDING),
    (
        "gpt_oss",
        {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
        torch.float32,
        2e-4,
    ),
]


@pytest.mark.parametrize(("family", "changes", "dtype", "tolerance"), FAMILIES)
def test_packed_trees_have_the_objectives_and_gradients_of_flat_sequences_in_plain_transformers(
    family, changes, dtype, tolerance
):
    check_family(new_models(lambda seed: tiny_model(family, seed, **changes)), tolerance, dtype)


TOLERANCES = {"gpt2": 1e-10, "gpt_neox": 1e-10}


def served_model(family, seed):
    """A tiny float64 model of a family that the engine serves."""
    model = tiny_models.tiny_model(family, torch.float64, seed)
    if any("experts" in name for name, _ in model.named_modules()):
        model.set_experts_implementation("eager")  # grouped products have no float64
    return model


@pytest.mark.long
@pytest.mark.parametrize("family", tiny_models.SERVED)
def test_every_family_that_the_engine_serves_trains_on_trees_as_on_sequences(family):
    make = new_models(lambda seed: served_model(family, seed))
    check_supported(make().config)
    every_clipped_loss_and_kl = ("ppo_clip, k1 and entropy", "cispo and k2", "gspo, k3 and entropy")
    check_family(make, TOLERANCES.get(family, ROUNDING), objectives=every_clipped_loss_and_kl)


@pytest.mark.long
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize("seed", range(102, 112))
def test_random_trees_have_every_objective_and_gradient_of_their_leaves_in_float64(family, seed):
    check_family(new_models(lambda number: tiny_model(family, number)), 1e-10, seed=seed)


def test_shared_tokens_serve_leaves_of_both_signs_and_of_different_length():
    rng = random.Random(3)
    trees = [token_tree(random_tree(rng)) for _ in range(2)]
    both = sum(int(((t.advantage_pos > 0) & (t.advantage_neg < 0)).sum()) for t in trees)
    lengths = {int(n) for t in trees for n in t.leaf_num_tokens}
    assert both > 10 and len(lengths) > 5


def partitions(items):
    """Every way to put the items into rows."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for rows in partitions(rest):
        yield [[first], *rows]
        for at, row in enumerate(rows):
            yield [*rows[:at], [first, *row], *rows[at + 1 :]]


def split_gradients(policy, trees, rows, names, denominator):
    """Gradients of each objective, accumulated over rows of the trees whose numbers they hold."""
    found = {name: {} for name in names}
    for row in rows:
        tokens = tokens_of(policy, pack_row([trees[i] for i in row], denominator), policy)
        for name in names:
            own = gradients(policy.model, objective_of(tokens, OBJECTIVES[name]))
            for key, gradient in own.items():
                found[name][key] = found[name].get(key, 0) + gradient
    return found


@pytest.mark.parametrize("loss_weighting", ["token_mean", "sequence_mean"])
def test_every_split_over_micro_batches_has_the_same_gradient(loss_weighting):
    rng = random.Random(5)
    roots = [weighted_as(random_tree(rng, depth=2), loss_weighting) for _ in range(4)]
    trees = [token_tree(root, dtype=torch.float64) for root in roots]
    names = ("ppo_clip", "cispo and k2", "gspo, k3 and entropy")
    policy, denominator = policy_of(tiny_model("gpt2").double()), total_weight(trees)
    together = split_gradients(policy, trees, [[0, 1, 2, 3]], names, denominator)
    splits = list(partitions([0, 1, 2, 3]))
    assert len(splits) == 15
    for rows in splits:
        apart = split_gradients(policy, trees, rows, names, denominator)
        for name in names:
            assert_same(apart[name], together[name], 1e-12, f"{name} {rows}")


@pytest.mark.parametrize("name", ["ppo_clip", "gspo", "cispo"])
def test_prompt_forced_and_padding_tokens_have_exactly_zero_gradient(name):
    rng = random.Random(7)
    tree = token_tree(random_tree(rng, forced=0.5))
    row = pack_row([tree])
    assert row.num_tokens > tree.num_tokens
    logprobs = torch.randn(row.num_tokens, requires_grad=True)
    index = torch.nonzero(row.weight > 0).squeeze(1)
    tokens = trained_tokens(row, index, logprobs[index], torch.zeros(len(index)))
    objective_of(tokens, OBJECTIVES[name]).backward()
    untrained = row.weight == 0
    assert untrained[tree.num_tokens :].all() and untrained[:5].all()
    assert untrained[5 : tree.num_tokens].any() and not untrained.all()
    assert (logprobs.grad[untrained] == 0).all() and (logprobs.grad[~untrained] != 0).any()


def test_what_padding_holds_changes_no_gradient():
    rng = random.Random(9)
    tree = next(t for t in iter(lambda: token_tree(random_tree(rng)), None) if t.num_tokens % 8)
    row = pack_row([tree])
    model = tiny_model("llama").double()
    policy = policy_of(model)
    loss_of(policy, row).backward()
    before = gradients(model)
    assert row.num_tokens > tree.num_tokens
    row.token_ids[tree.num_tokens :] = 13
    loss_of(policy, row).backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, before[name]), name
