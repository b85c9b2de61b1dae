"""Named choices, and user code by path, the same way everywhere.

A registry maps a short name to an object. Where a name has a colon it is user code instead:
``package.module:attribute`` or ``path/to/file.py:attribute``. A wrong name is an error that lists
the known ones.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named objects of one ``kind`` (the word used in errors, e.g. ``"reward"``).

    Args:
        builtin: names that are known from the start but imported at their first use, as
            ``module:attribute``: a configuration can be checked against them without their imports.
    """

    def __init__(self, kind: str, builtin: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._builtin = dict(builtin or {})

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files an object under ``name``; the same name twice is a programming
        error.
        """

        def add(entry: T) -> T:
            assert name not in self, f"{self.kind} {name!r} is registered twice"
            self._entries[name] = entry
            return entry

        return add

    def names(self) -> list[str]:
        return sorted({*self._entries, *self._builtin})

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: str) -> bool:
        return name in self._entries or name in self._builtin

    def get(self, name: str) -> T:
        """Return the entry called ``name``, or load user code when ``name`` has the form
        ``where:attribute``.

        Raises:
            ValueError: the name is not registered, or the user code cannot be found.
        """
        if name in self._entries:
            return self._entries[name]
        if name in self._builtin:
            self._entries[name] = load_object(self._builtin[name], kind=self.kind)
            return self._entries[name]
        if ":" in name:
            return load_object(name, kind=self.kind)
        self.check(name)
        raise AssertionError(name)  # check has raised

    def check(self, name: str, besides: Iterable[str] = ()) -> None:
        """Raise the ``ValueError`` of :meth:`get` for an unknown name, importing nothing: of user
        code (a name with a colon) it is checked that its file is there.

        Args:
            besides: words that are allowed too, though they name no entry.
        """
        known = sorted({*self.names(), *besides})
        if name in known:
            return
        if ":" in name:
            check_spec(name, kind=self.kind)
            return
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"unknown {self.kind} {name!r}.{hint} Known: {', '.join(known) or 'none'}. "
            "Your own code goes in as 'module:function' or 'path/to/file.py:function'."
        )


def load_object(spec: str, *, kind: str = "object") -> Any:
    """Load ``module:attribute`` or ``file.py:attribute``.

    Raises:
        ValueError: no such file, module or attribute; the message says which.
    """
    where, attribute = _split(spec, kind)
    module = _load_file(where, kind) if where.endswith(".py") else _load_module(where, kind)
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise ValueError(
            f"{kind} {spec!r}: {where} has no {attribute!r}; "
            f"it has {', '.join(public[:20]) or 'nothing'}"
        )
    return getattr(module, attribute)


def check_spec(spec: str, *, kind: str = "object") -> None:
    """What can be known of ``spec`` without importing anything: its form, and that its file exists.

    Raises:
        ValueError: of :func:`load_object`.
    """
    where, _ = _split(spec, kind)
    if where.endswith(".py"):
        _find_file(where, kind)


def _split(spec: str, kind: str) -> tuple[str, str]:
    where, _, attribute = spec.rpartition(":")
    if not where or not attribute:
        raise ValueError(
            f"{kind} {spec!r}: expected 'module:function' or 'path/to/file.py:function'"
        )
    return where, attribute


def _load_module(name: str, kind: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise ValueError(f"{kind} {name!r}: no module of that name can be imported") from error
        raise  # the user's module exists, and one of its own imports is missing


def _find_file(path: str, kind: str) -> Path:
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"{kind} file {path!r} does not exist (looked at {file})")
    return file


def _load_file(path: str, kind: str) -> Any:
    file = _find_file(path, kind)
    # A stable name, so that records defined in the file can be pickled within a process that loaded
    # it too.
    digest = hashlib.blake2b(str(file).encode(), digest_size=4).hexdigest()
    name = f"treepo_user_{file.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
