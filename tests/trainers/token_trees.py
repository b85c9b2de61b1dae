"""Random token trees, their flat counterparts and tiny models for the trainers' tests."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from trainers.batch import TokenTree
from trainers.model import switch_off_dropout


@dataclass
class Node:
    """A run of tokens; ``trained`` False for prompt and forced tokens."""

    token_ids: list[int]
    trained: bool
    children: list[Node] = field(default_factory=list)
    leaf: tuple[float, float] | None = None  # (advantage, weight) if a path ends here


def random_tree(
    rng: random.Random,
    *,
    vocab: int = 17,
    prompt: int = 5,
    segment: int = 6,
    depth: int = 3,
    branch: int = 3,
    forced: float = 0.2,
) -> Node:
    """A tree with leaves of both signs and different lengths, and forced runs inside."""

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(count)]

    def grow(level: int) -> Node:
        node = Node(tokens(rng.randint(1, segment)), trained=rng.random() > forced)
        if level < depth and (level == 0 or rng.random() < 0.8):
            node.children = [grow(level + 1) for _ in range(rng.randint(1, branch))]
        else:
            # Few bits, so that sums over leaves are exact in the records' float32.
            advantage = rng.choice([-1, 1]) * rng.randint(3, 32) / 16
            # 0: a failed verdict
            node.leaf = (advantage, rng.choice([1.0, 0.5, 0.25, 0.25, 0.0]))
        return node

    return Node(tokens(prompt), False, [grow(0) for _ in range(max(2, branch))])


def flat_as_tree(
    rng: random.Random, *, vocab: int, prompt: int, response: int, leaves: int
) -> Node:
    """A prompt with independent responses: only the prompt is shared."""
    children = [
        Node(
            [rng.randrange(vocab) for _ in range(response)], True, [], (rng.choice([-1.0, 1]), 1.0)
        )
        for _ in range(leaves)
    ]
    return Node([rng.randrange(vocab) for _ in range(prompt)], False, children)


def paths(root: Node) -> list[list[Node]]:
    """Every root-to-leaf path."""
    found: list[list[Node]] = []

    def walk(node: Node, above: list[Node]) -> None:
        here = [*above, node]
        if node.leaf is not None:
            found.append(here)
        for child in node.children:
            walk(child, here)

    walk(root, [])
    return found


def weighted_as(root: Node, loss_weighting: str, trained_above: int = 0) -> Node:
    """The tree with its leaves' weights as in ``token_mean`` (1) or ``sequence_mean`` (1 / trained
    tokens of the path); those of weight 0, and those without a trained token, have 0.
    """
    trained = trained_above + len(root.token_ids) * root.trained
    leaf = root.leaf
    if leaf is not None:
        counts = leaf[1] > 0 and trained > 0
        weight = 1.0 if loss_weighting == "token_mean" else 1 / max(trained, 1)
        leaf = (leaf[0], weight if counts else 0.0)
    children = [weighted_as(child, loss_weighting, trained) for child in root.children]
    return Node(root.token_ids, root.trained, children, leaf)


def token_tree(
    root: Node,
    *,
    temperature: float = 1.0,
    behaviour_seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> TokenTree:
    """The tree's tensors, built token by token (slow and plain, as an oracle should be).

    The behaviour log-prob of a token is a function of its path, so that flat sequences of the same
    tree carry the same ones.
    """

    def floats(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)

    ids: list[int] = []
    positions: list[int] = []
    until: list[int] = []
    predictor: list[int] = []
    weight: list[float] = []
    pos: list[float] = []
    neg: list[float] = []
    behaviour: list[float] = []
    leaf_token: list[int] = []
    leaves: list[tuple[float, float]] = []
    lengths: list[int] = []

    def walk(node: Node, parent: int, trained_above: int, path: tuple[int, ...]) -> list[int]:
        own = []
        for token in node.token_ids:
            path = (*path, token)
            index = len(ids)
            ids.append(token)
            positions.append(0 if parent < 0 else positions[parent] + 1)
            until.append(-1)
            predictor.append(parent)
            weight.append(0.0)
            pos.append(0.0)
            neg.append(0.0)
            chance = random.Random(hash((behaviour_seed, path))).uniform(-6.0, -1.5)
            behaviour.append(chance if node.trained else 0.0)
            own.append(index)
            parent = index
        trained_here = trained_above + (len(own) if node.trained else 0)
        below: list[int] = []
        if node.leaf is not None:
            below.append(len(leaves))
            leaves.append(node.leaf)
            leaf_token.append(parent)
            lengths.append(trained_here)
        for child in node.children:
            below += walk(child, parent, trained_here, path)
        for index in own:
            until[index] = len(ids)
            if node.trained:
                for leaf in below:
                    advantage, leaf_weight = leaves[leaf]
                    weight[index] += leaf_weight
                    pos[index] += leaf_weight * max(advantage, 0)
                    neg[index] += leaf_weight * min(advantage, 0)
        return below

    walk(root, -1, 0, ())
    count = len(ids)
    return TokenTree(
        token_ids=torch.tensor(ids),
        position_ids=torch.tensor(positions),
        visible_until=torch.tensor(until),
        predictor=torch.tensor(predictor),
        advantage_pos=floats(pos),
        advantage_neg=floats(neg),
        weight=floats(weight),
        behaviour_logprobs=floats(behaviour),
        sampling_logprobs=floats(behaviour),
        temperature=floats([temperature] * count),
        policy_version=torch.zeros(count, dtype=torch.int64),
        leaf_token=torch.tensor(leaf_token),
        leaf_advantage=floats([advantage for advantage, _ in leaves]),
        leaf_weight=floats([leaf_weight for _, leaf_weight in leaves]),
        leaf_num_tokens=torch.tensor(lengths),
        leaf_reward=floats([float(advantage > 0) for advantage, _ in leaves]),
    )


def flat_trees(root: Node, **options: Any) -> list[TokenTree]:
    """The same leaves as independent sequences, one tree with one leaf each."""
    sequences = []
    for path in paths(root):
        chain = [Node(node.token_ids, node.trained) for node in path]
        for above, below in zip(chain, chain[1:], strict=False):
            above.children = [below]
        chain[-1].leaf = path[-1].leaf
        sequences.append(token_tree(chain[0], **options))
    return sequences


_SMALL = {
    "vocab_size": 17,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def tiny_model(family: str, seed: int = 1, **changes: object) -> transformers.PreTrainedModel:
    """A randomly initialised model with two layers; weights large enough to make mistakes show."""
    torch.manual_seed(seed)
    small = {**_SMALL, **changes}
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=17,
            n_positions=128,
            n_embd=16,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
            **changes,
        )
    elif family == "gpt_neox":
        config = transformers.GPTNeoXConfig(**small)
    else:
        kinds = {
            "qwen3": transformers.Qwen3Config,
            "llama": transformers.LlamaConfig,
            "mistral": transformers.MistralConfig,
            "gemma2": transformers.Gemma2Config,
            "gpt_oss": transformers.GptOssConfig,
            "cohere": transformers.CohereConfig,
            "granite": transformers.GraniteConfig,
        }
        config = kinds[family](**{"num_key_value_heads": 2, "head_dim": 8, **small})
    switch_off_dropout(config)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def save_tiny_model(folder: Path, family: str = "qwen3", **changes: object) -> str:
    tiny_model(family, 1, **changes).save_pretrained(folder)
    return str(folder)
