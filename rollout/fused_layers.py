"""A decoder layer of the usual form (Llama's) as one function, for few rows on a CPU.

Small models spend much of a decode step on what surrounds the products: calls of modules, norms in
many passes, narrow products. Here queries, keys and values are one product, gate and up another,
and norms and rotation take as few passes over the rows as they can. Which layers may run so is
found by trying (``rollout.fusing``).

The merged weights are the second copy that ``PackedLinear`` would make; they are made again
whenever a parameter changes. The model keeps its parameters and their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from rollout.attention.base import AttentionContext, LayerVariant
from rollout.merged import MergedProduct, RMSNorm

DecoderLayer = Any  # a module with the parts' names in Llama; modules don't type theirs


@dataclass(frozen=True, slots=True)
class _Weights:
    """What a layer's parameters become."""

    input_norm: RMSNorm
    qkv: MergedProduct
    heads_norm: RMSNorm | None  # of the heads of queries and keys, each with its own weight
    o: MergedProduct
    post_norm: RMSNorm
    gate_up: MergedProduct
    down: MergedProduct


class Angles:
    """Cosines and signed sines of a forward, worked out once for all its layers."""

    _last: tuple[Any, torch.Tensor, torch.Tensor] | None = None

    def of(self, embeddings: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Both [T, 1, D]; rotated x is x * cos + (x with its halves swapped) * sin."""
        last = self._last
        if last is None or last[0] is not embeddings:
            cos, sin = (angle[0].unsqueeze(1) for angle in embeddings)
            half = sin.shape[-1] // 2
            signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)
            self._last = last = embeddings, cos, signed
        return last[1:]

    def __getstate__(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, slots=True)
class Form:
    """What a layer hands to attention: which layer it says it is and how its heads are made."""

    index: int
    num_heads: int
    num_kv_heads: int
    width: int
    variant: LayerVariant
    rotates: bool


class FusedForward:
    """The ``forward`` of a decoder layer, in place of its class's, which takes over for whatever
    is not a forward of the engine, and where a module inside is hooked.

    It notices new values by autograd's version counter, which writes through ``.data`` bypass.
    """

    _weights: _Weights | None = None
    _version: list[int] | None = None
    _seen: list[torch.nn.Parameter] | None = None  # keeps their ids from being used again

    def __init__(self, layer: DecoderLayer, form: Form, angles: Angles) -> None:
        self.layer, self.form, self._angles = layer, form, angles
        inner = [module for module in layer.modules() if module is not layer]
        self._hooks = [h for m in inner for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._holders = [m._modules for m in (layer, layer.self_attn, layer.mlp)]
        self._children = [module for holder in self._holders for module in holder.values()]
        self._parameters = [module._parameters for module in inner]

    def __getstate__(self) -> dict[str, Any]:
        """A copy packs for itself: packed weights cannot be copied."""
        return {
            k: v for k, v in self.__dict__.items() if k not in ("_weights", "_version", "_seen")
        }

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        tree: AttentionContext | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        weights = None
        if tree is not None and not torch.is_grad_enabled() and hidden_states.shape[0] == 1:
            weights = self._current(hidden_states)
        if tree is None or weights is None:
            kwargs |= {"position_embeddings": position_embeddings}
            kwargs |= {} if tree is None else {"tree": tree}
            return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        rows, form = hidden_states[0], self.form
        angles = None
        if form.rotates:
            assert position_embeddings is not None
            angles = self._angles.of(position_embeddings)
        query, key, value = self._heads(weights, rows, angles)
        out = tree.attend_rows(form.index, query, key, value, form.variant)
        return _after(weights, rows, out).unsqueeze(0)

    def through(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [N, hidden] through all products, as if each saw the value of one head alone."""
        weights = self._current(rows)
        assert weights is not None
        query, _, _ = self._heads(weights, rows, None)
        return _after(weights, rows, query)

    def linear_layers(self) -> Iterator[torch.nn.Linear]:
        return (module for module in self.layer.modules() if isinstance(module, torch.nn.Linear))

    def _heads(
        self, weights: _Weights, rows: torch.Tensor, angles: tuple[torch.Tensor, ...] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [N, H, D], keys and values [N, Hkv, D]."""
        form = self.form
        split = form.num_heads + form.num_kv_heads
        heads = weights.qkv(weights.input_norm(rows)).view(len(rows), -1, form.width)
        turned, length = heads[:, :split], None
        if weights.heads_norm is not None:
            turned, length = weights.heads_norm.scaled(turned)
        if angles is not None:
            cos, sin = angles
            turned = torch.addcmul(turned * cos, turned.roll(form.width // 2, -1), sin)
        if length is not None:
            turned.div_(length)
        return turned[:, : form.num_heads], turned[:, form.num_heads :], heads[:, split:]

    def _current(self, like: torch.Tensor) -> _Weights | None:
        """The merged weights, new if a parameter is; None if they cannot be used."""
        children = [module for holder in self._holders for module in holder.values()]
        if any(self._hooks) or children != self._children or not like.numel():
            return None
        seen = [p for store in self._parameters for p in store.values() if p is not None]
        if like.dtype != seen[0].dtype:
            return None
        try:
            version = [n for p in seen for n in (id(p), p._version, p.data_ptr())]
        except RuntimeError:  # a tensor made for inference alone counts no versions
            return None
        if version != self._version:
            self._weights, self._version, self._seen = self._merged(), version, seen
        return self._weights

    def _merged(self) -> _Weights:
        layer, attention, form = self.layer, self.layer.self_attn, self.form
        heads_norm = None
        if hasattr(attention, "q_norm"):
            counts = ((attention.q_norm, form.num_heads), (attention.k_norm, form.num_kv_heads))
            weight = torch.cat([norm.weight.detach().expand(n, -1) for norm, n in counts])
            heads_norm = RMSNorm(weight, epsilon(attention.q_norm))
        norms = layer.input_layernorm, layer.post_attention_layernorm
        before, after = (RMSNorm(norm.weight, epsilon(norm)) for norm in norms)
        return _Weights(
            input_norm=before,
            qkv=MergedProduct.of(attention.q_proj, attention.k_proj, attention.v_proj),
            heads_norm=heads_norm,
            o=MergedProduct.of(attention.o_proj),
            post_norm=after,
            gate_up=MergedProduct.of(layer.mlp.gate_proj, layer.mlp.up_proj),
            down=MergedProduct.of(layer.mlp.down_proj),
        )


def _after(weights: _Weights, rows: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """The rest of the layer, from attention's ``attended [N, H, D]`` on."""
    rows = weights.o(attended.reshape(len(rows), -1)).add_(rows)
    gate, up = weights.gate_up(weights.post_norm(rows)).chunk(2, -1)
    return weights.down(F.silu(gate).mul_(up)).add_(rows)


def epsilon(norm: Any) -> float:
    """What a norm adds to its mean square."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def fused_layers(model: torch.nn.Module) -> list[FusedForward]:
    """Those of ``model``."""
    own = (vars(module).get("forward") for module in model.modules())
    return [forward for forward in own if isinstance(forward, FusedForward)]


def forget_merged(model: torch.nn.Module) -> None:
    """Free the merged weights; they are made again when they are used."""
    for fused in fused_layers(model):
        fused._weights = fused._version = fused._seen = None


def undo_fused_layers(model: torch.nn.Module) -> None:
    """Give the layers their own forward back."""
    for fused in fused_layers(model):
        del fused.layer.forward
