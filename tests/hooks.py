"""A look into a run that is under way: functions of the source with something before or after each of their calls."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def around(
    owner: Any,
    name: str,
    before: Callable[..., None] = lambda *_: None,
    after: Callable[..., Any] = lambda result, *_: result,
) -> Iterator[None]:
    """While the block runs, each call of a function of a module or a class is ``after(function(*arguments), *arguments)``,
    with ``before(*arguments)`` called first."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def call(*arguments, **keywords):
        before(*arguments)
        return after(function(*arguments, **keywords), *arguments)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, function)
