"""Requests for several models take turns: none runs on another model, all that wait go together, nobody waits for ever."""

import asyncio
import contextlib
import random

import pytest

from liftdist.serving.turns import Turns, in_turn


class Engine:
    """What requests run on: says when a model is held while a request for another one runs."""

    def __init__(self, seconds=1.0, takes=0.0):
        self.now, self.takes, self.switches, self.running = 0.0, takes, [], []
        self.turns = Turns(self.switch, seconds, clock=lambda: self.now)

    async def switch(self, old, new):
        assert not self.running
        assert old == self.turns.held
        await asyncio.sleep(self.takes)
        assert not self.running
        self.switches.append(new)

    async def answer(self, model, until=None):
        async with self.turns.of(model):
            assert self.turns.held == model
            self.running.append(model)
            try:
                await (until or settled)()
            finally:
                self.running.remove(model)
            assert self.turns.held == model


async def settled():
    for _ in range(20):
        await asyncio.sleep(0)


def test_no_request_runs_on_another_model():
    async def main():
        engine, chance, served = Engine(0.0, 0.001), random.Random(0), []

        async def client(number):
            for _ in range(20):
                model = chance.choice([None, "a", "b"])
                with contextlib.suppress(TimeoutError):  # some go away, waiting or running
                    await asyncio.wait_for(
                        engine.answer(model, lambda: asyncio.sleep(chance.random() / 200)),
                        0.004 if number % 3 == 0 else 10,
                    )
                    served.append(model)

        await asyncio.gather(*map(client, range(12)))
        assert {None, "a", "b"} == set(served)
        assert len(served) >= 8 * 20
        assert not engine.running
        await engine.answer("a")  # nothing was left that would be in its way

    asyncio.run(main())


def test_requests_that_wait_for_one_model_go_together():
    async def main():
        engine = Engine(0.0)
        await asyncio.gather(*(engine.answer("ab"[number % 2], lambda: asyncio.sleep(0.001)) for number in range(40)))
        assert engine.switches == ["a", "b"]

    asyncio.run(main())


def test_a_model_that_is_not_held_has_its_turn_at_once_when_the_engine_is_idle():
    async def main():
        engine = Engine(1000.0)
        for model in ("a", None, "a"):
            await engine.answer(model)
        assert engine.switches == ["a", None, "a"]

    asyncio.run(main())


def test_a_steady_stream_of_requests_keeps_others_waiting_for_no_longer_than_its_turn_and_an_answer():
    async def main():
        engine, ends = Engine(5.0), [asyncio.Event() for _ in range(4)]
        first = asyncio.create_task(engine.answer(None, ends[0].wait))
        await settled()
        other = asyncio.create_task(engine.answer("a", ends[1].wait))
        engine.now = 4.9  # the turn goes on, so more of its requests begin though another one waits
        second = asyncio.create_task(engine.answer(None, ends[2].wait))
        await settled()
        assert engine.running == [None, None]
        engine.now = 5.0
        late = asyncio.create_task(engine.answer(None, ends[3].wait))
        ends[0].set()
        await settled()
        assert engine.running == [None]  # what runs ends on its own weights
        ends[2].set()
        await settled()
        assert engine.running == ["a"]
        ends[1].set()
        await settled()
        assert engine.running == [None]  # the late one
        ends[3].set()
        await asyncio.gather(first, second, other, late)
        assert engine.switches == ["a", None]

    asyncio.run(main())


def test_turns_go_by_who_has_waited_longest():
    async def main():
        engine, end = Engine(0.0), asyncio.Event()
        tasks = [asyncio.create_task(engine.answer("a", end.wait))]
        await settled()
        tasks += [asyncio.create_task(engine.answer(model)) for model in ("c", "a", "b", "c", None, "b")]
        await settled()
        end.set()
        await asyncio.gather(*tasks)
        assert engine.switches == ["a", "c", "a", "b", None]

    asyncio.run(main())


@pytest.mark.parametrize("is_about_to_begin", [False, True])
def test_a_request_that_goes_away_while_it_waits_is_forgotten(is_about_to_begin):
    async def main():
        engine, end = Engine(0.0), asyncio.Event()
        running = asyncio.create_task(engine.answer("a", end.wait))
        await settled()
        gone = asyncio.create_task(engine.answer("b", lambda: asyncio.sleep(1000)))
        await settled()
        if is_about_to_begin:
            end.set()
            while engine.turns.held != "b":
                await asyncio.sleep(0)
        gone.cancel()
        end.set()
        with pytest.raises(asyncio.CancelledError):
            await gone
        await running
        await asyncio.wait_for(engine.answer("c"), 1)
        assert not engine.running

    asyncio.run(main())


def test_requests_that_wait_for_a_model_that_goes_are_refused_and_others_have_their_turn():
    async def run():
        engine, ends = Engine(), asyncio.Event()
        runs = asyncio.create_task(engine.answer("a", ends.wait))
        await settled()
        waiting = [asyncio.create_task(engine.answer(model)) for model in ("b", "c", "b")]
        await settled()
        engine.turns.refuse("b", KeyError("b"))
        ends.set()
        done = await asyncio.gather(runs, *waiting, return_exceptions=True)
        assert [type(one) for one in done] == [type(None), KeyError, type(None), KeyError]
        assert engine.switches == ["a", "c"]
        await engine.answer("b")  # has come again

    asyncio.run(run())


def test_after_a_switch_that_failed_nothing_begins():
    async def main():
        engine, end = Engine(0.0), asyncio.Event()
        running = asyncio.create_task(engine.answer(None, end.wait))
        await settled()

        async def fail(old, new):
            raise ValueError("lost")

        engine.turns._switch = fail
        waiting = [asyncio.create_task(engine.answer(model)) for model in ("a", None, "b")]
        await settled()
        end.set()
        await running  # ended as it began
        for one in waiting:
            with pytest.raises(ValueError, match="lost"):
                await one
        with pytest.raises(ValueError, match="lost"):
            await engine.answer(None)

    asyncio.run(main())


def test_a_client_that_reads_no_more_keeps_nobody_waiting_and_loses_nothing():
    async def main():
        engine, closed = Engine(0.0), []

        async def outputs(end=None):
            try:
                for number in range(3):
                    yield number
                if end is not None:
                    await end.wait()
                    raise ValueError("lost")
            finally:
                closed.append(end)

        slow = in_turn(engine.turns.of(None), outputs())
        assert await anext(slow) == 0
        assert await asyncio.wait_for(anext(in_turn(engine.turns.of("a"), outputs())), 1) == 0
        assert engine.switches == ["a"]
        assert [number async for number in slow] == [1, 2]

        end = asyncio.Event()  # one that goes away ends its request
        gone = in_turn(engine.turns.of("a"), outputs(end))
        await anext(gone)
        await gone.aclose()
        assert closed[-1] is end
        await asyncio.wait_for(engine.answer("b"), 1)

        end.set()  # and an error of the engine is the client's
        with pytest.raises(ValueError, match="lost"):
            [number async for number in in_turn(engine.turns.of("b"), outputs(end))]
        await asyncio.wait_for(engine.answer("c"), 1)

    asyncio.run(main())
