"""vLLM's command line with deltas.

    PYTHON -m liftdist.serving.main --base-digest SHA256 --turn SECONDS [--routes FILE] -- ARGUMENT ...

The arguments are those of ``vllm serve``. Started by ``liftdist serve``, in vLLM's environment.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="liftdist.serving.main", description=__doc__)
    parser.add_argument("--base-digest", required=True, help="digest of the base model, as `liftdist show` prints it")
    parser.add_argument("--turn", type=float, required=True, help="seconds for which a model has its turn")
    parser.add_argument("--routes", type=Path, help="file of the routes by which the model `auto` chooses")
    parser.add_argument("arguments", nargs="*", help="of `vllm serve`")
    options = parser.parse_args()

    from vllm import __version__, envs
    from vllm.v1.engine import async_llm

    from liftdist.errors import EXIT_USER_ERROR, UserError

    try:
        if "mode" not in inspect.signature(async_llm.AsyncLLM.pause_generation).parameters:
            raise UserError(f"vLLM {__version__} cannot be drained while it serves; 0.32 is known to work")
        if envs.VLLM_USE_RUST_FRONTEND:
            raise UserError("VLLM_USE_RUST_FRONTEND: that API server knows of no deltas; unset it")
        from liftdist.serving.engine import ROUTED, DeltaLLM

        if options.routes is not None:
            from liftdist.serving.router import Router
            from liftdist.serving.routing import Routes

            Router.routes = Routes.load(options.routes)
            DeltaLLM.chooses = True
            Router.count = lambda name: ROUTED.labels(name).inc()
        DeltaLLM.base_digest, DeltaLLM.turn = options.base_digest, options.turn
        async_llm.AsyncLLM = DeltaLLM
        sys.argv = ["vllm", "serve", *options.arguments]
        from vllm.entrypoints.cli import main as vllm

        try:
            vllm.main()
        except ValueError as error:  # by which the API server reports what was refused of --lora-modules
            if DeltaLLM.refusal is None or str(error) != DeltaLLM.refusal:
                raise
            raise UserError(DeltaLLM.refusal) from None
    except UserError as error:
        print(f"liftdist: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    main()
