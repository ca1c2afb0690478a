"""What each of vLLM's workers can do besides, with ``--worker-extension-cls liftdist.serving.worker.DeltaWorker``.

    llm.collective_rpc("load_delta", args=("math", "/path/math.delta", BASE_DIGEST))        llm.collective_rpc("list_deltas")
    llm.collective_rpc("switch_delta", args=(None, "math"))     apply      ("math", None)   undo      ("math", "chat")   swap

While weights are switched no request may run, and afterwards what was computed with the old ones must go: ``pause_generation`` of
vLLM's engine does both. vLLM imports this module in each worker before it loads the model.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers import utils
from vllm.platforms import current_platform

from liftdist.deltas import file as delta_file
from liftdist.errors import UserError
from liftdist.serving import placement
from liftdist.serving.placement import Placed

if current_platform.is_cpu():
    _dispatch = utils.dispatch_cpu_unquantized_gemm

    def _plain(layer: nn.Module, remove_weight: bool) -> None:
        """In place of kernels that compute with a packed copy of a matrix, which nobody can write to: those of torch."""
        if layer.weight.ndim == 2:
            layer.cpu_linear = torch.nn.functional.linear  # type: ignore[assignment]
        else:
            _dispatch(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = _plain


class DeltaWorker:
    """Deltas in a worker's share of the model. What cannot be done is the ``error`` of an answer."""

    vllm_config: Any
    model_runner: Any

    def load_delta(self, key: str, path: str, base_digest: str) -> dict[str, Any]:
        """Read a delta, and find its weights in the model, which must hold the base model's.

        Args:
            key: to name it by from now on.
            base_digest: of the base model that the engine was given, as ``liftdist show`` prints it.

        Returns:
            ``counts``, of groups of tensors: their ``names``, the ``weights`` that the delta changes, and those of them that are
            ``placed`` in this worker's share; what several workers hold is counted on each.
        """
        try:
            if self.vllm_config.quant_config is not None:
                raise UserError("the engine holds quantised weights, to which no delta applies; serve the model itself")
            if self.vllm_config.model_config.use_mla:
                raise UserError(
                    "vLLM computes MLA with products of weights, which would stay as they are; serve the merged model"
                )
            delta = delta_file.read(Path(path))
            if delta.compressed:
                raise UserError(
                    f"{path}: is compressed; `liftdist export {path} --format delta --base MODEL --output FILE` writes it whole"
                )
            if delta.base_digest != base_digest:
                raise UserError(
                    f"{path}: is for another base model than the one that is served; `liftdist show` names it"
                )
            placed, counts = placement.place(self.model_runner.get_model(), delta)
            if not placement.holds(placed, "base"):
                raise UserError(
                    f"{path}: the engine does not hold the base values of the delta; restart it with its base model. If "
                    "that is what it holds, its kernels repack weights: those of experts do not with --moe-backend triton; else "
                    "serve the merged model, which `liftdist export --format hf` writes"
                )
        except UserError as error:
            return {"error": str(error)}
        self._deltas[key] = placed
        return {"counts": [asdict(one) for one in counts]}

    def switch_delta(self, undo: str | None, apply: str | None) -> dict[str, Any]:
        """Undo a delta and apply another, or one of both, to the bit.

        Returns:
            ``error``, if weights are not what they must be; then it is not applied, or not even undone, as ``holds`` says by key.
        """
        holds = undo
        try:
            for key in (undo, apply):
                placement.check_in_use(self.model_runner.get_model(), self._deltas[key] if key else ())
            if undo is not None:
                if not placement.holds(self._deltas[undo], "values"):
                    raise UserError(
                        "the engine does not hold the weights of the delta that is to be undone; restart it"
                    )
                placement.write(self._deltas[undo], "base")
            holds = None
            if apply is not None:
                if not placement.holds(self._deltas[apply], "base"):
                    raise UserError("the engine does not hold the weights of the base model; restart it")
                placement.write(self._deltas[apply], "values")
        except UserError as error:
            return {"error": str(error), "holds": holds}
        return {}

    def forget_delta(self, key: str) -> None:
        """Free what :meth:`load_delta` keeps of a delta that is not applied."""
        self._deltas.pop(key, None)

    def list_deltas(self) -> list[str]:
        """The keys of all deltas that are loaded."""
        return list(self._deltas)

    @property
    def _deltas(self) -> dict[str, list[Placed]]:
        return vars(self).setdefault("_deltas_by_key", {})
