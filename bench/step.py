"""The phases of a step: overhead of the hooks in forward-backward, and the optimizer's phase against alternatives.

    python -m bench step [--ranks 1] [--rows 2] [--length 256] [--rounds 7] [--synthetic 8b] [--base-dtype nf4]
                         [--on-host] [--out FILE]

    forward-backward   liftdist against the same model, trained matrices and sharding with dense gradients and no hooks
    optimizer          step and write back, against fused AdamW on the same matrices, and against masked LIFT's loop

All stay in memory and are timed in turn. Forward-backward is in processor time on a CPU, everything else in wall time.
"""

from __future__ import annotations

import os
import statistics

import torch

from bench import compare, contenders, measure
from bench.scale import MODELS
from liftdist.distributed import mesh as meshes


def main() -> None:
    parser = measure.parser("step", __doc__, ranks=1)
    parser.add_argument("--rows", type=int, default=2, help="sequences per rank")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--synthetic", choices=list(MODELS), help="random weights of this shape instead of a model")
    parser.add_argument("--layers", type=int, default=32, help="layers of a synthetic model")
    parser.add_argument("--base-dtype", choices=("int8", "fp8", "nf4"), help="model.base_dtype of liftdist's side")
    parser.add_argument("--on-host", action="store_true", help="optimizer.device=cpu of liftdist's side")
    options = measure.on_ranks(parser)
    config = measure.config()
    config.model.base_dtype = options.base_dtype
    config.optimizer.device = "cpu" if options.on_host else None
    with meshes.start(config.mesh.layout, config.mesh.timeout) as mesh:
        sides = {}
        for kind in ("dense", "quickly-masked", "liftdist"):
            sides[kind] = contenders.KINDS[kind](compare.make_model(options, mesh.device), config, mesh)
        sides["dense"].losses = sides["quickly-masked"].losses = lambda batch: contenders.objective.token_losses(
            dense.model, batch
        )
        dense = sides["dense"]
        contenders.in_chunks(dense.model)  # so that only the hooks differ
        vocabulary = dense.model.config.vocab_size
        batch = next(contenders.batches(vocabulary, options.rows, options.length, mesh.device, mesh.rank))

        def clear() -> None:
            for param in dense.model.parameters():
                param.grad = None
            sides["liftdist"].principal.drop_gradients()

        both = {kind: lambda kind=kind: sides[kind].forward_backward(batch) for kind in ("dense", "liftdist")}
        for run in both.values():
            run()
        clear()
        rounds: dict[str, list[float]] = {kind: [] for kind in both}
        for number in range(options.rounds):
            for kind in list(both) if number % 2 else reversed(list(both)):
                rounds[kind].append(measure.busy_seconds(both[kind]))
            clear()

        gradients = [torch.randn_like(param) for param in dense.trained]

        def give(params: list[torch.nn.Parameter]) -> None:
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = gradient

        updates: dict[str, list[float]] = {kind: [] for kind in sides}
        principal = sides["liftdist"].principal
        for number in range(options.rounds + 1):
            for kind, side in sides.items():
                if kind != "liftdist":
                    give(side.trained)
                else:
                    principal.values.grad.normal_()
                taken = measure.seconds(side.optimizer.step if kind == "dense" else side.update)
                if number:  # the first round creates the state
                    updates[kind].append(taken)
    if os.environ["RANK"] != "0":
        return
    found = {
        "hooks": measure.ratio(rounds, "liftdist", "dense"),
        "update over fused AdamW": measure.ratio(updates, "liftdist", "dense"),
        "masked update over liftdist's": measure.ratio(updates, "quickly-masked", "liftdist"),
    }
    medians = {f"forward-backward {kind}": statistics.median(taken) for kind, taken in rounds.items()}
    medians |= {f"update {kind}": statistics.median(taken) for kind, taken in updates.items()}
    print(f"{measure.machine()}, torch {torch.__version__}, {options.ranks} ranks")
    for name, value in (medians | found).items():
        print(f"{name:34s} {value:8.4f}{' s' if name in medians else ' (ratio)'}")
    measure.write(
        {"ranks": options.ranks, "rows": options.rows, "length": options.length, "ratios": found, "seconds": medians,
         "rounds": {"forward_backward": rounds, "update": updates}},
        options.out,
    )  # fmt: skip


if __name__ == "__main__":
    main()
