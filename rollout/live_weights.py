"""The weights an engine serves from: a whole set, half of one, or none while their memory is given
up.
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel

from rollout.fused_layers import forget_merged
from rollout.linear import forget_packed
from rollout.weights import Part, Tensors, WeightLoad, stored_state
from treepo.base.aside import Aside
from treepo.base.digest import WeightManifest, tensor_digests

SLEEPING_WEIGHTS = ("keep", "host", "drop")


class LiveWeights:
    """See the module."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._is_torn = False  # half a weight set was copied, or none after they were dropped
        self._aside = Aside()  # weights that gave up their memory

    def load(self, manifest: WeightManifest, tensors: Tensors | Iterable[Part]) -> dict[str, int]:
        """Copy a weight set into the model; returns the digests of what is stored.

        Raises:
            ValueError: the set does not fit the model; nothing is copied then.
            TornWeights: parts were copied but not all came.
        """
        self._aside.restore()
        load = WeightLoad(self._model, manifest)
        # No work from half a set: while parts come, and after an interruption.
        was_torn, self._is_torn = self._is_torn, True
        try:
            return load.copy(tensors)
        finally:
            self._is_torn = not load.is_complete if load.has_begun else was_torn

    def digests(self) -> dict[str, int]:
        """Digest of each stored tensor by name.

        Raises:
            ValueError: the weights have given up their memory.
        """
        if self._aside.num_bytes:
            raise ValueError("the engine is asleep without its weights: call wake() first")
        return tensor_digests(stored_state(self._model))

    def give_up(self, how: str) -> int:
        """Give up the weights' memory as ``how`` of ``SLEEPING_WEIGHTS`` says; returns the bytes
        that were copied to the host.
        """
        if how == "keep":
            return 0
        forget_packed(self._model)
        forget_merged(self._model)
        if how == "drop":
            self._is_torn = True
            self._aside.forget()
        return self._aside.put(stored_state(self._model).values(), forget=how == "drop")

    def restore(self) -> int:
        """Have memory again, with what was copied to the host; returns the bytes of that."""
        return self._aside.restore()

    def check_whole(self) -> None:
        """
        Raises:
            ValueError: nobody may work from these weights.
        """
        if self._is_torn:
            raise ValueError(
                "the engine refuses work: a weight load is under way or stopped half-way, or the "
                "weights were dropped when it fell asleep; load a whole set first"
            )
