"""Whose turn it is, where requests for several models share an engine that holds one of them at a time.

A request whose model is held begins at once, unless others wait and the turn has lasted its time. Otherwise it waits. When the
last request that runs has ended, the model of the one that has waited longest has its turn, and all that wait for it begin.

Nothing waits while the engine is idle. With n models a request waits for n turns at most: those that came
before it are all served in one turn of their model. A turn takes its time, what is then left of the longest answer, and a switch.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

Output = TypeVar("Output")


@dataclass(eq=False)
class _Waiting:
    model: str | None
    begins: asyncio.Future[None]


class Turns:
    """Requests take turns by model.

    Args:
        switch: makes the engine hold the second model in place of the first; no request runs meanwhile. If it raises, the engine
            holds nobody knows what: no request begins any more, and each raises that error.
        seconds: for which a turn lasts at least, if requests for its model go on coming.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        switch: Callable[[str | None, str | None], Awaitable[None]],
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._switch, self._seconds, self._clock = switch, seconds, clock
        self.held: str | None = None  # the model that the engine holds, which begins with the base model
        self.error: Exception | None = None
        self._began = clock()
        self._running = 0
        self._waiting: list[_Waiting] = []  # in order of arrival
        self._switching: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def of(self, model: str | None) -> AsyncIterator[None]:
        """A request for ``model`` runs inside; entering waits for its turn. Raises the error of a switch that failed."""
        if self.error is not None:
            raise self.error
        is_over = self._waiting and self._clock() - self._began >= self._seconds
        if model == self.held and self._switching is None and not is_over:
            self._running += 1
        else:
            await self._wait(_Waiting(model, asyncio.get_running_loop().create_future()))
        try:
            yield
        finally:
            self._running -= 1
            self._go_on()

    def refuse(self, model: str, error: Exception) -> None:
        """Raise ``error`` in all requests that wait for ``model``."""
        for request in [one for one in self._waiting if one.model == model]:
            self._waiting.remove(request)
            if not request.begins.done():
                request.begins.set_exception(error)

    async def _wait(self, request: _Waiting) -> None:
        self._waiting.append(request)
        self._go_on()
        try:
            await request.begins
        except asyncio.CancelledError:
            if request in self._waiting:
                self._waiting.remove(request)
            elif request.begins.done() and not request.begins.cancelled() and not request.begins.exception():
                self._running -= 1  # it was to begin in this moment
                self._go_on()
            raise

    def _go_on(self) -> None:
        """Begin the next turn if nothing runs."""
        if self._running or self._switching is not None or not self._waiting or self.error is not None:
            return
        if self._waiting[0].model == self.held:
            self._begin()
        else:
            self._switching = asyncio.get_running_loop().create_task(self._turn_to(self._waiting[0].model))

    async def _turn_to(self, model: str | None) -> None:
        try:
            await self._switch(self.held, model)
            self.held = model
        except Exception as error:
            self.error = error
            for request in self._waiting:
                if not request.begins.done():
                    request.begins.set_exception(error)
            self._waiting.clear()
        finally:
            self._switching = None
        self._begin()
        self._go_on()  # all that waited for this model may have gone away

    def _begin(self) -> None:
        """Let all begin that wait for the model that is held."""
        self._began = self._clock()
        for request in [one for one in self._waiting if one.model == self.held]:
            self._waiting.remove(request)
            if not request.begins.done():
                request.begins.set_result(None)
                self._running += 1


async def in_turn(
    turn: contextlib.AbstractAsyncContextManager[None], made: AsyncGenerator[Output, None]
) -> AsyncGenerator[Output, None]:
    """What a request makes in its turn, which ends with the last output, however late a client takes that.

    Closing this ends the request."""
    ready: asyncio.Queue[Output | None] = asyncio.Queue()

    async def make() -> None:
        try:
            async with turn, contextlib.aclosing(made):
                async for output in made:
                    ready.put_nowait(output)
        finally:
            ready.put_nowait(None)

    making = asyncio.create_task(make())
    try:
        while (output := await ready.get()) is not None:
            yield output
        await making  # raises what it has raised
    finally:
        making.cancel()
        await asyncio.wait([making])
