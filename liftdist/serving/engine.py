"""vLLM's engine as its API server sees it, with deltas in the place of adapters.

    --lora-modules NAME=DELTA, POST /v1/load_lora_adapter   ->  add_lora                    a model of its own in /v1/models
    POST /v1/... {"model": NAME}                            ->  generate(lora_request=NAME)  waits for NAME's turn
    POST /v1/unload_lora_adapter                            ->  remove_lora                 frees what the workers hold of it

The API server resolves names, streams, and cancels as it does for adapters, on all of its routes; below this class the engine
knows of no adapter, and computes with plain weights. Between turns it is drained, caches are reset, weights are exchanged.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar

from prometheus_client import Counter, Histogram
from vllm.logger import init_logger
from vllm.renderers.chat_utils import MM_PARSER_MAP
from vllm.v1.engine.async_llm import AsyncLLM

from liftdist.errors import UserError
from liftdist.serving.placement import Count, check_found
from liftdist.serving.routing import AUTO
from liftdist.serving.turns import Turns, in_turn

logger = init_logger("vllm.liftdist")
_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_DRAINING = Histogram(
    "liftdist_drain_seconds",
    "Seconds in which the engine was drained and its caches reset before a switch.",
    buckets=_SECONDS,
)
_SWITCHING = Histogram(
    "liftdist_switch_seconds", "Seconds in which weights were exchanged.", ["undone", "applied"], buckets=_SECONDS
)
_WAITING = Histogram(
    "liftdist_wait_seconds", "Seconds that a request waited for its turn.", ["model"], buckets=_SECONDS
)
ROUTED = Counter("liftdist_routed_requests", "Requests for the model auto, by the model that was chosen.", ["model"])


class DeltaLLM(AsyncLLM):
    """One engine, whose requests take turns by model."""

    base_digest: ClassVar[str]  # of the base model that it is started with
    turn: ClassVar[float]  # seconds
    chooses: ClassVar[bool] = False  # whether there is a model auto
    refusal: ClassVar[str | None] = None  # of the last delta that could not be loaded

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        check(vllm_config, kwargs.get("client_count", 1))
        super().__init__(vllm_config, *args, **kwargs)
        self._keys: dict[str, str] = {}  # by name: what the workers call a delta
        self._names: dict[int, str] = {}  # by the number that the API server gives to a delta
        self._numbers = itertools.count()
        self._turns = Turns(self._switch, self.turn)
        self._base = str(self.model_config.served_model_name)

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None, **others: Any
    ) -> AsyncIterator[Any]:
        """As vLLM's, with the weights of the delta that ``lora_request`` names."""
        outputs = super().generate(prompt, sampling_params, request_id, **others)
        async with contextlib.aclosing(in_turn(self._turn_of(lora_request), outputs)) as made:
            async for output in made:
                yield output

    async def encode(
        self, prompt: Any, pooling_params: Any, request_id: str, lora_request: Any = None, *args: Any, **others: Any
    ) -> AsyncIterator[Any]:
        """As vLLM's, with the weights of the delta that ``lora_request`` names."""
        outputs = super().encode(prompt, pooling_params, request_id, None, *args, **others)
        async with contextlib.aclosing(in_turn(self._turn_of(lora_request), outputs)) as made:
            async for output in made:
                yield output

    async def add_lora(self, lora_request: Any) -> bool:
        """Load a delta in all workers, or again under a name that is known.

        Raises:
            UserError: it is damaged, or not for this base model, or not for this engine; what was loaded before stays.
        """
        name, path, key = lora_request.lora_name, lora_request.lora_path, str(next(self._numbers))
        try:
            check_name(name, [self._base, *([AUTO] if self.chooses else [])])
            async with self._turns.of(
                None
            ):  # so that it can be compared with the base model, and none of this name is applied
                try:
                    found = await self.collective_rpc("load_delta", args=(key, path, self.base_digest))
                    _raise_first(found)
                    weights = check_found(path, [[Count(**one) for one in share["counts"]] for share in found])
                except Exception:
                    await self.collective_rpc("forget_delta", args=(key,))
                    raise
                if name in self._keys:
                    await self.collective_rpc("forget_delta", args=(self._keys[name],))
                self._keys[name] = key
                self._names[lora_request.lora_int_id] = name
        except UserError as error:
            DeltaLLM.refusal = str(error)
            raise
        logger.info("Delta %s: %d weights of %s", name, weights, path)
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        """Free what the workers hold of a delta, once its requests that came before have ended; later ones raise ``UserError``.

        The API server of vLLM 0.32 does not call this when it unloads one, later ones do.
        """
        if (name := self._names.get(lora_id)) is None:
            return False
        async with self._turns.of(None):  # so that it is not applied
            del self._names[lora_id]
            key = self._keys.pop(name)
            self._turns.refuse(name, _unloaded(name))
            await self.collective_rpc("forget_delta", args=(key,))
        logger.info("Delta %s: unloaded", name)
        return True

    async def check_health(self) -> None:
        """Raises if the engine is dead, or its weights are not known any more."""
        await super().check_health()
        if self._turns.error is not None:
            raise self._turns.error

    @contextlib.asynccontextmanager
    async def _turn_of(self, lora_request: Any) -> AsyncIterator[None]:
        name = lora_request.lora_name if lora_request is not None else None
        came = time.perf_counter()
        if name is not None and name not in self._keys:
            raise _unloaded(name)
        async with self._turns.of(name):
            _WAITING.labels(name or self._base).observe(time.perf_counter() - came)
            yield

    async def _switch(self, undo: str | None, apply: str | None) -> None:
        begun = time.perf_counter()
        await self.pause_generation(mode="wait", clear_cache=True)  # prefixes, encodings, and connectors, too
        drained = time.perf_counter()
        keys = [self._keys[name] if name is not None else None for name in (undo, apply)]
        _raise_first(await self.collective_rpc("switch_delta", args=tuple(keys)))
        switched = time.perf_counter()
        await self.resume_generation()
        _DRAINING.observe(drained - begun)
        _SWITCHING.labels(undo or self._base, apply or self._base).observe(switched - drained)
        logger.info("Switched from %s to %s in %.3f s", undo or self._base, apply or self._base, switched - begun)


def check(config: Any, clients: int) -> None:
    """Raises ``UserError`` for a configuration of vLLM in which a delta would not be what answers."""
    refusals = {
        "serves LoRA adapters; serve them without deltas": config.lora_config is not None,
        "has several engines (--data-parallel-size); start a server for each": config.parallel_config.data_parallel_size
        > 1,
        "has several API servers (--api-server-count); start a server for each": clients > 1,
        "keeps keys and values outside of the engine (--kv-transfer-config), where they outlive a delta; leave that out": (
            config.kv_transfer_config is not None
        ),
    }
    for problem, is_so in refusals.items():
        if is_so:
            raise UserError(f"vLLM {problem}")


def check_name(name: str, taken: Sequence[str]) -> None:
    """Raises ``UserError`` for the name of another model, which would answer, and for names by which vLLM takes an adapter
    unasked: those of the parts of messages."""
    if name in taken:
        raise UserError(f"delta {name}: is the name of another model; give it another one")
    if name in {kind.split("_")[0] for kind in MM_PARSER_MAP}:
        raise UserError(f"delta {name}: vLLM takes this name for a kind of content in messages; give it another one")


def _unloaded(name: str) -> UserError:
    return UserError(f"delta {name}: was unloaded while a request for it waited")


def _raise_first(found: list[dict[str, Any]]) -> None:
    for one in found:
        if "error" in one:
            raise UserError(one["error"])
