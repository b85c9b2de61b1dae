"""Which decoder layers may run as ``FusedForward``: found by their parts, and proved by trying.

A layer that has the parts may still use them otherwise: norms that add one to their weight,
interleaved rotation, scaled residuals, limits. So both forwards get the same rows, and what they
hand to attention and what they return must agree. The rows are of many sizes, so that the norms'
epsilons show. The layer is tried with its own weights, and, once for each kind of layer, with
random ones in float32, where nothing hides in rounding, and with large ones, which would meet any
limit: weights may change later, and with them what a layer shows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from rollout.attention.base import LayerVariant
from rollout.fused_layers import Angles, DecoderLayer, Form, FusedForward
from rollout.linear import can_pack
from rollout.support import CODE_ERRORS

_ROW_SIZES = (1e-5, 1e-3, 1.0, 1.0, 50.0, 1.0)
_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.06, torch.float16: 0.01}  # of a row's maximum
_LARGE = 30.0
_LAST_POSITION = 1 << 14
_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj"}


def fuse_decoder_layers(model: PreTrainedModel, last_position: int | None = None) -> None:
    """Let the decoder layers of a CPU model with tree attention run fused, where that is the same.
    Before ``pack_linear_layers``: the linear layers of a fused layer are not packed themselves.

    Args:
        last_position: the largest that may be tried.
    """
    layers = [layer for layer in model.modules() if _has_parts(layer)]
    dtypes = {p.dtype for layer in layers for p in layer.parameters()}
    if model.device.type != "cpu" or len(dtypes) != 1 or not can_pack(*dtypes):
        return
    angles = Angles()
    proved: dict[tuple[Any, ...], bool] = {}
    for layer, arguments in _arguments(model, layers, last_position or _LAST_POSITION).items():
        fused = _fused(layer, arguments, angles)
        if fused is None:
            continue
        kind = _kind(layer, fused.form)
        if kind not in proved:
            proved[kind] = _holds_with_random_weights(layer, arguments, fused.form)
        if proved[kind]:
            layer.forward = fused


def _has_parts(layer: DecoderLayer) -> bool:
    """Whether a module has the parts of a decoder layer, and no others with parameters."""
    if set(layer._modules) != _LAYER_PARTS:
        return False
    attention, mlp = dict(layer.self_attn.named_children()), dict(layer.mlp.named_children())
    has_norms = attention.keys() >= _HEAD_NORMS
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [attention[name] for name in sorted(_HEAD_NORMS)] if has_norms else []
    linear = {**attention, **mlp}
    if not (attention.keys() >= _PROJECTIONS and mlp.keys() >= _MLP_PARTS):
        return False
    projections = [linear[name] for name in sorted(_PROJECTIONS | _MLP_PARTS)]
    known = {id(p) for module in (*norms, *projections) for p in module.parameters()}
    return (
        all(type(module) is torch.nn.Linear for module in projections)
        and all(set(norm._parameters) == {"weight"} for norm in norms)
        and all(hasattr(norm, "variance_epsilon") or hasattr(norm, "eps") for norm in norms)
        and all(id(p) in known for p in layer.parameters())
        and not any("forward" in vars(module) for module in layer.modules())
    )


@dataclass(slots=True)
class _Recorder:
    """A context that keeps what attention gets and answers with fixed random rows."""

    got: list[tuple[int, LayerVariant, list[torch.Tensor]]] = field(default_factory=list)

    def attend(self, layer, query, key, value, variant):
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return self.attend_rows(layer, query, key, value, variant).unsqueeze(0)

    def attend_rows(self, layer, query, key, value, variant):
        self.got.append((layer, variant, [query, key, value]))
        shape = (*query.shape[:2], value.shape[-1])
        return (_random(*shape) * _sizes(3)).to(query.dtype)


def _arguments(
    model: PreTrainedModel, layers: list[torch.nn.Module], last_position: int
) -> dict[torch.nn.Module, dict[str, Any]]:
    """The keyword arguments that each of ``layers`` gets in a forward; none if that fails."""
    found: dict[torch.nn.Module, dict[str, Any]] = {}

    def keep(layer: DecoderLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) == 1:
            found[layer] = {name: value for name, value in kwargs.items() if name != "tree"}

    num_rows = len(_ROW_SIZES)
    ids = torch.arange(num_rows)[None] % model.config.get_text_config().vocab_size
    positions = torch.linspace(0, last_position, num_rows).long()[None]
    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        with torch.inference_mode():
            model(input_ids=ids, position_ids=positions, use_cache=False, tree=_Recorder())
    except CODE_ERRORS:  # the load probe says what is wrong
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _fused(layer: DecoderLayer, arguments: dict[str, Any], angles: Angles) -> FusedForward | None:
    """The layer's fused forward, if it has one that does the same with the layer's weights."""
    try:
        _, got = _trial(layer.__call__, _rows(layer), arguments)
    except CODE_ERRORS:  # it cannot be called alone
        return None
    if len(got) != 1:
        return None
    index, variant, (query, key, value) = got[0]
    (_, heads, width), (_, kv_heads, _) = query.shape, key.shape
    attention = layer.self_attn
    widths = [attention.q_proj.out_features, attention.k_proj.out_features]
    if (
        variant.sinks is not None
        or value.shape != key.shape
        or widths != [heads * width, kv_heads * width]
        or (hasattr(attention, "q_norm") and len(attention.q_norm.weight) != width)
        or arguments.get("position_embeddings") is None
    ):
        return None
    for rotates in (True, False):
        form = Form(index, heads, kv_heads, width, variant, rotates)
        fused = FusedForward(layer, form, angles)
        if _agree(fused, layer, arguments):
            return fused
    return None


def _holds_with_random_weights(layer: DecoderLayer, arguments: dict[str, Any], form: Form) -> bool:
    twin = copy.deepcopy(layer).float()
    arguments = {name: _as_float32(value) for name, value in arguments.items()}
    for size in (1.0, _LARGE):
        _draw(twin, size)
        if not _agree(FusedForward(twin, form, Angles()), twin, arguments):
            return False
    return True


def _draw(layer: DecoderLayer, size: float) -> None:
    """Random weights; of linear layers with outputs of ``size``, but where the layer sums up."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
                continue
            scale = 1.0 if "o_proj" in name or "down_proj" in name else size
            width = parameter.shape[1] if parameter.dim() == 2 else 1
            parameter.normal_(0.0, scale / width**0.5, generator=generator)


def _agree(fused: FusedForward, layer: DecoderLayer, arguments: dict[str, Any]) -> bool:
    """Whether both hand the same to attention and return the same."""
    rows = _rows(layer)
    try:
        expected, given = _trial(layer.__call__, rows, arguments)
        found, taken = _trial(fused, rows, arguments)
    except CODE_ERRORS:
        return False
    if type(expected) is not torch.Tensor or len(given) != 1 or len(taken) != 1:
        return False
    if given[0][:2] != taken[0][:2]:
        return False
    pairs = zip([expected[0], *given[0][2]], [found[0], *taken[0][2]], strict=True)
    return all(_is_close(a, b) for a, b in pairs)


def _trial(forward, rows: torch.Tensor, arguments: dict[str, Any]):
    """What a layer returns and what it hands to attention."""
    recorder = _Recorder()
    with torch.inference_mode():
        return forward(rows, tree=recorder, **arguments), recorder.got


def _is_close(expected: torch.Tensor, found: torch.Tensor) -> bool:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    wide, tolerance = expected.double().flatten(1), _TOLERANCE[expected.dtype]
    allowed = tolerance * wide.abs().amax(1, keepdim=True)
    return bool(((wide - found.double().flatten(1)).abs() <= allowed).all())


def _kind(layer: DecoderLayer, form: Form) -> tuple[Any, ...]:
    """Layers of one kind differ in their weights alone."""
    plain = (bool, int, float, str, type(None))
    parts = []
    for name, module in layer.named_modules():
        values = {k: v for k, v in vars(module).items() if isinstance(v, plain)}
        values.pop("layer_idx", None)
        parts.append((name, type(module), tuple(sorted(values.items()))))
    shapes = [(name, p.shape) for name, p in layer.named_parameters()]
    return (*parts, *shapes, form.num_heads, form.rotates)


def _rows(layer: DecoderLayer) -> torch.Tensor:
    weight = layer.input_layernorm.weight
    return (_random(1, len(_ROW_SIZES), len(weight)) * _sizes(2)).to(weight.dtype)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _sizes(dimensions: int) -> torch.Tensor:
    return torch.tensor(_ROW_SIZES).view(-1, *[1] * (dimensions - 1))


def _as_float32(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_as_float32(item) for item in value)
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.float() if is_float else value
