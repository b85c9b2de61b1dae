"""Records of a run between two steps, as bytes for its checkpoints: a line with name, format and
SHA-256, then the pickled record. The digest keeps out what was damaged, not what was forged: for a
run's own files alone.
"""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """
    Attributes:
        name: what such a file holds, for its first line and for errors: 'pools'.
        version: of the records; another one's files are refused.
        kinds: types that a file may hold.
    """

    name: str
    version: int
    kinds: tuple[type, ...]

    def dump(self, record: Any) -> bytes:
        assert isinstance(record, self.kinds)
        data = pickle.dumps(record, protocol=5)
        return b"%s %d %s\n" % (self._mark, self.version, _digest(data)) + data

    def load(self, data: bytes) -> Any:
        """What :meth:`dump` wrote.

        Raises:
            ValueError: another version wrote it, or nothing did that writes such, or it is damaged.
        """
        head, _, rest = data.partition(b"\n")
        mark, _, told = head.rpartition(b" ")
        if not mark.startswith(self._mark):
            raise ValueError(f"this is no file of {self.name}")
        found = mark.removeprefix(self._mark).strip()
        if found != b"%d" % self.version:
            raise ValueError(
                f"the {self.name} have format {found.decode(errors='replace')}, and this version "
                f"reads {self.version}: go on with the version that wrote them"
            )
        if told != _digest(rest):
            raise ValueError(
                f"the {self.name} are damaged: they have another digest than was saved"
            )
        record = pickle.loads(rest)
        if not isinstance(record, self.kinds):
            raise ValueError(f"it holds a {type(record).__name__} and no {self.name}")
        return record

    @property
    def _mark(self) -> bytes:
        return f"treepo {self.name}".encode()


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()
