"""Target accuracy against forgetting, as frontiers: LIFT, full fine-tuning, LoRA and other choices of as many weights.

    python -m bench fidelity [--preset cpu|gpu|tiny] [--model FOLDER] [--output FOLDER] [--out FILE] [--minutes N] ...

    development    each method at each of its rates, asked the development questions
    test           the rates of each method whose frontier is the greatest there, with more seeds, asked the test questions

A run is `liftdist train` on a config that is written to ``--output``, where its run directory is, too. It follows the paper's
recipe: the Alpaca wording (on two cores: questions as they are, a third of the tokens), a mean over sequences, its optimizer, as
many refreshes in a run as there, and the step with the least loss on the development questions. Methods train equally many
weights (`full`: all) on the same batches. Forgetting is the divergence from the base model on its own text, and the rise on
prose, in nats a token; capitals of countries are asked besides.

Runs that have finished are not run again, so the same command goes on after an interruption; those that failed are tried again.
With ``--earlier FILE`` neither are those of a result file, so that a comparison can be made in pieces and on several machines.
Results are written after every run, and a picture at the end; :mod:`bench.trials` says which runs there are, and
:mod:`bench.frontier` what is made of them. Checkpoints of a finished run are removed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import yaml

from bench import contenders, frontier, measure, problems
from bench.trials import METHODS, NUMBERS, Plan, Settings, Trial, config, preset, trials
from liftdist.errors import EXIT_STOPPED, UserError
from liftdist.report import read
from liftdist.report.read import FINISHED, Run
from liftdist.runs import layout

_running: set[subprocess.Popen[bytes]] = set()


def _stop(number: int, _: FrameType | None) -> None:
    """Ask the runs to stop, which save and end, and end after them."""
    for process in [*_running]:
        process.send_signal(number)
    sys.exit("asked to stop; the same command goes on")


def run(trial: Trial, settings: Settings, output: Path, jobs: int) -> dict[str, Any]:
    """What a run found; it is run, on its share of the cores, if it has not finished.

    Raises:
        SystemExit: it was asked to stop.
    """
    folder = trial.folder(output)
    if not _has_finished(folder):
        path = output / "configs" / f"{folder.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config(trial, settings, output), sort_keys=False))
        with path.with_suffix(".log").open("a") as log:
            command = [sys.executable, "-m", "liftdist", "train", str(path), "--nproc", "1"]
            threads = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
            with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=threads) as process:
                _running.add(process)
                code = process.wait()
                _running.remove(process)
        if code == EXIT_STOPPED:
            sys.exit(f"{folder} was asked to stop; the same command goes on")
    found: dict[str, Any] = dataclasses.asdict(trial) | {"status": "failed", "reason": ""}
    try:
        made = read.read(folder)
    except UserError as error:
        return found | {"reason": f"{error}; see {output / 'configs' / folder.name}.log"}
    if not _has_finished(folder):
        return found | {"reason": made.state, "seconds": made.seconds}
    shutil.rmtree(folder / layout.CHECKPOINTS, ignore_errors=True)
    return found | {"status": FINISHED} | _found(made)


def _has_finished(folder: Path) -> bool:
    if not (folder / layout.ATTEMPTS).is_dir():
        return False
    attempts = read.read(folder).attempts
    return bool(attempts) and attempts[-1].outcome == FINISHED


def _found(made: Run) -> dict[str, Any]:
    """Losses, and what the evaluations after the best step say against those of the base model."""
    held_out = made.curves["eval/loss"]
    losses = dict(zip(held_out.steps.tolist(), held_out.values.tolist(), strict=True))
    finite = [step for step in losses if step and math.isfinite(losses[step])]
    if not finite:
        return {"status": "failed", "reason": "no evaluation loss is finite", "seconds": round(made.seconds, 1)}
    step = min(finite, key=losses.__getitem__)
    figures = {
        task: {one.step: one.value for one in some}
        for (task, metric), some in made.evaluations.items()
        if not metric.endswith("_change")  # since the base model, beside what it is of
    }
    learned = made.curves["train/loss"].values
    return {
        "seconds": round(made.seconds, 1),
        "best_step": step,
        "eval_loss": losses,
        "train_loss": float(np.mean(learned[-max(1, len(learned) // 10) :])),
        "figures": {task: of_step[step] for task, of_step in figures.items()},
        "base": {task: of_step[0] for task, of_step in figures.items()},
        "forgotten": {
            "own_text": figures["own_text"][step],
            "prose": math.log(figures["prose"][step] / figures["prose"][0]),
        },
        "scores": _scores(made, step),
        "base_scores": _scores(made, 0),
    }


def _scores(made: Run, step: int) -> str:
    answers = made.answers["target"][step]
    return "".join(f"{answers[number].score:.0f}" for number in sorted(answers, key=int))


def draw(analysis: dict[str, Any], path: Path) -> None:
    """The frontiers of all tasks as SVG, one row of axes for each."""
    from matplotlib.figure import Figure

    tested = {task: found for task, found in analysis.items() if found["seeds"]}
    if not tested:
        return
    size = len(frontier.FORGOTTEN), len(tested)
    figure = Figure(figsize=(5 * size[0], 3.5 * size[1]), layout="constrained")
    for row, (task, found) in zip(figure.subplots(size[1], size[0], squeeze=False), tested.items(), strict=True):
        for axes, measured in zip(row, frontier.FORGOTTEN, strict=True):
            for number, (method, of) in enumerate(found["methods"].items()):
                x, height, low, high = zip(*of[measured]["band"], strict=True)
                axes.step(x, height, where="post", label=method, color=f"C{number}")
                axes.fill_between(x, low, high, step="post", alpha=0.15, color=f"C{number}")
                points = [(rate["forgotten"][measured], rate["accuracy"]) for rate in of["rates"]]
                axes.scatter(*zip(*points, strict=True), s=24, color=f"C{number}", zorder=3)
            axes.set(title=task, xlabel=f"forgotten on {measured}, nats a token", ylabel="accuracy")
            axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
            axes.set_ylim(0, min(1.02, 1.3 * axes.get_ylim()[1]))
        row[0].legend()
    figure.savefig(path, metadata={"Date": None})


def report(analysis: dict[str, Any]) -> None:
    for task, found in analysis.items():
        print(f"\n{task}: {len(found['failed'])} failed runs")
        for method, of in found["development"].items():
            rates = ", ".join(f"{one['lr']:g}: {one['accuracy']:.2f} / {one['own_text']:.3f}" for one in of["rates"])
            edge = "; the best rate is the first or last tried" * of["at_edge"]
            print(f"  development  {method:18s}{rates}  (rate: accuracy / nats on own text){edge}")
        for method, of in found.get("methods", {}).items():
            areas = "  ".join(
                f"{name} {of[name]['area']:.3f} [{of[name]['interval'][0]:.3f}, {of[name]['interval'][1]:.3f}]"
                for name in frontier.FORGOTTEN
            )
            print(f"  test         {method:18s}area under the frontier, {len(found['seeds'])} seeds: {areas}")
        for method, of in found.get("against", {}).items():
            less, low, high = of["area_own_text"]
            sure = "" if of["p"] is None else f", p = {of['p']:.2g}, {of['p_holm']:.2g} for all methods together"
            edge = (
                f"; the best rate of {' and '.join(of['at_edge'])} is the first or last tried" if of["at_edge"] else ""
            )
            print(
                f"  {found['reference']} - {method}: area {less:+.3f} [{low:+.3f}, {high:+.3f}], accuracy at the best rates "
                f"within the limit {of['accuracy']:+.3f}{sure}{edge}"
            )
        if found["seeds"] and found["reference"] not in found["methods"]:
            print(f"  no rate of {found['reference']} has finished all of its runs: nothing is compared with it")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench fidelity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset", choices=("cpu", "gpu", "tiny"), default="gpu" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--model", type=Path, default=Path(".cache/quickstart/SmolLM2-135M-Instruct"))
    parser.add_argument("--output", type=Path, help="folder for run directories; runs/fidelity-PRESET if not given")
    parser.add_argument("--out", type=Path, help="results; bench/results/fidelity-PRESET.json if not given")
    parser.add_argument("--earlier", type=Path, help="results whose finished runs count and are not run again")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run later than this")
    parser.add_argument("--jobs", type=int, help="runs at a time")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="only these, the reference first")
    parser.add_argument("--tasks", nargs="+", help="these; the first of the preset's if not given")
    parser.add_argument(
        "--rates", nargs="+", default=[], metavar="METHOD=LR,LR", help="other learning rates of a method"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=NUMBER", help=f"other numbers: {', '.join(NUMBERS)}"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    settings, plan, jobs = preset(options.preset, str(options.model))
    _change(parser, options, settings, plan)
    output = options.output or Path(f"runs/fidelity-{options.preset}")
    out = options.out or Path(f"bench/results/fidelity-{options.preset}.json")
    settings.rank = _rank(options.model, settings.density)
    earlier = _earlier(options.earlier, settings) if options.earlier else {}
    _prepare(output, settings)
    carry_out(settings, plan, output, out, options.jobs or jobs, time.monotonic() + 60 * options.minutes, earlier)


def _change(parser: argparse.ArgumentParser, options: argparse.Namespace, settings: Settings, plan: Plan) -> None:
    """Take over what was given in place of the preset's."""
    if not (options.model / "config.json").exists():
        parser.error(f"--model {options.model}: no folder of a model; launch/quickstart makes the default one")
    kinds = [task.kind for task in settings.tasks]
    if unknown := set(options.tasks or ()) - set(kinds):
        parser.error(f"--tasks {' '.join(sorted(unknown))}: the preset has {', '.join(kinds)}")
    for given in options.rates:
        method, _, listed = given.partition("=")
        try:
            plan.rates[method] = sorted({_number(rate, float) for rate in listed.split(",")})
        except ValueError:
            parser.error(f"--rates {given}: must be METHOD=LR,LR, such as lift=1e-3,2e-3")
        if method not in METHODS:
            parser.error(f"--rates {given}: there are the methods {', '.join(METHODS)}")
    settings.tasks = [task for task in settings.tasks if task.kind in (options.tasks or kinds[:1])]
    plan.methods = options.methods or plan.methods
    for given in options.set:
        name, _, text = given.partition("=")
        if name not in NUMBERS:
            parser.error(f"--set {given}: there are {', '.join(NUMBERS)}")
        try:
            setattr(plan if hasattr(plan, name) else settings, name, _number(text, NUMBERS[name]))
        except ValueError:
            parser.error(f"--set {given}: must be a positive {'whole ' * (NUMBERS[name] is int)}number")
    if settings.evaluations > settings.steps:
        parser.error(f"--set evaluations={settings.evaluations}: must be at most the steps, {settings.steps}")


def _number(text: str, kind: type) -> float:
    number: float = kind(text)
    if not 0 < number < math.inf:
        raise ValueError
    return number


def _rank(folder: Path, density: float) -> int:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return max(1, contenders.equal_rank(model, density))


def _prepare(output: Path, settings: Settings) -> None:
    """Write the problems, unless ``output`` has them. Exits if its runs have other settings; other tasks may join."""
    kept, now = output / "settings.json", dataclasses.asdict(settings)
    tasks = now.pop("tasks")
    if kept.exists() and (before := json.loads(kept.read_text())) != now:
        differ = ", ".join(f"{key} {before.get(key)}, now {now[key]}" for key in now if before.get(key) != now[key])
        sys.exit(f"{output} holds runs of other settings ({differ}); give another --output")
    sizes = {split: getattr(settings, split) for split in problems.SPLITS}
    for task in tasks:
        folder = output / "problems" / task["kind"]
        if not (folder / "test.jsonl").exists():
            problems.write(folder, task["kind"], task["arguments"], sizes, settings.format)
    problems.write_known(output / "problems", settings.format)
    kept.write_text(json.dumps(now, indent=1) + "\n")


def _earlier(path: Path, settings: Settings) -> dict[Trial, dict[str, Any]]:
    """What the finished runs of a result file found. Exits if they had other settings; other tasks may join."""
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"--earlier {path}: {error}")
    now = dataclasses.asdict(settings)
    tasks = now.pop("tasks")
    if differ := [
        f"{key} {kept['settings'].get(key)}, now {now[key]}" for key in now if kept["settings"].get(key) != now[key]
    ]:
        sys.exit(f"--earlier {path}: its runs have other settings ({', '.join(differ)})")
    same = [task["kind"] for task in kept["settings"]["tasks"] if task in tasks]
    names = [field.name for field in dataclasses.fields(Trial)]
    finished = [run for run in kept["runs"] if run["status"] == FINISHED and run["task"] in same]
    return {Trial(**{name: run[name] for name in names}): run for run in finished}


def carry_out(
    settings: Settings,
    plan: Plan,
    output: Path,
    out: Path,
    jobs: int,
    deadline: float,
    earlier: dict[Trial, dict[str, Any]],
) -> None:
    """Run what has not finished and is not in ``earlier``, one stage after the other, and write results after every run."""
    shown = {"settings": dataclasses.asdict(settings) | dataclasses.asdict(plan)}
    done: list[dict[str, Any]] = []
    for stage in ("development", "test"):
        planned = list(trials(settings, plan, stage, done))
        fresh = sum(trial not in earlier and not _has_finished(trial.folder(output)) for trial in planned)
        later = 0 if stage == "test" else len(settings.tasks) * len(plan.methods) * plan.best * plan.seeds
        then = f", then at most {later} of the test" if later else ""
        print(f"{stage}: {len(planned)} runs, {fresh} to be run{then}", flush=True)
        before, found, taken = done, dict[int, dict[str, Any]](), list[float]()
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            started = [
                pool.submit(_unless_late, trial, settings, output, jobs, deadline, earlier.get(trial))
                for trial in planned
            ]
            try:
                for future in concurrent.futures.as_completed(started):
                    number = started.index(future)
                    outcome, seconds = future.result()
                    if outcome is None:
                        continue
                    found[number] = outcome
                    done = [*before, *(found[place] for place in sorted(found))]
                    if seconds is None:
                        continue
                    taken.append(seconds)
                    left = fresh - len(taken) + later
                    hours = float(np.mean(taken)) * left / jobs / 3600
                    name = planned[number].folder(output).name
                    state = f"{outcome['status']} {outcome['reason']}".strip()
                    print(f"{name}: {state}, {seconds:.0f} s; {left} runs left, about {hours:.1f} h", flush=True)
                    measure.write(shown | {"runs": done}, out)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if len(found) < len(planned):
            print(f"{len(planned) - len(found)} runs were not begun in time; the same command goes on")
            break
    analysis = frontier.analyse(shown | {"runs": done})
    measure.write(shown | {"analysis": analysis, "runs": done}, out)
    draw(analysis, out.with_suffix(".svg"))
    report(analysis)


def _unless_late(
    trial: Trial, settings: Settings, output: Path, jobs: int, deadline: float, earlier: dict[str, Any] | None
) -> tuple[dict[str, Any] | None, float | None]:
    """What a run found, and the seconds that it took now; nothing, if it has not finished and there is no time left."""
    if earlier:
        return earlier, None
    if _has_finished(trial.folder(output)):
        return run(trial, settings, output, jobs), None
    if (begun := time.monotonic()) > deadline:
        return None, None
    return run(trial, settings, output, jobs), time.monotonic() - begun


if __name__ == "__main__":
    main()
