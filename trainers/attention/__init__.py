"""Training attention over a packed row of token trees, without a mask over the whole row.

The row's tokens stand in depth-first preorder, so each is seen by one interval of queries
(``k <= q < visible_until[k]``). The function is registered with transformers under the name
``packed_tree`` and receives the row as the keyword ``packed_tree`` of the model's forward.
"""

from trainers.attention.choose import check_attention
from trainers.attention.packed_tree import (
    NAME,
    PackedTreeContext,
    packed_tree_attention,
    register,
)

__all__ = ["NAME", "PackedTreeContext", "check_attention", "packed_tree_attention", "register"]
