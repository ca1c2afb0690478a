"""``liftdist serve``: base and deltas are checked here, then this process becomes vLLM's Python, in vLLM's own environment.

There liftdist is found through a folder that holds a link to this package alone: what is installed beside it, torch above all,
must not be found before vLLM's own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from liftdist import output
from liftdist.deltas import file as delta_file
from liftdist.deltas.delta import changed, loses
from liftdist.errors import UserError
from liftdist.models import hub, weights
from liftdist.serving.placement import rounded

_OURS = {  # options of vLLM that decide what a delta is to it
    "--model": "name the base model before --",
    "--host": "give it before --",
    "--port": "give it before --",
    "--lora-modules": "deltas stand in their place: --delta NAME=FILE",
    "--enable-lora": "serve LoRA adapters without deltas",
    "--worker-extension-cls": "it is taken",
    "--api-server-count": "start a server for each",
    "--data-parallel-size": "start a server for each",
    "--headless": "start it on one machine",
    "--grpc": "deltas are served over HTTP",
    "--config": "give the options of that file after --, where each can be seen",
}
_READ = ("--served-model-name", "--dtype")  # options of vLLM that are read here
_DTYPES = {  # of vLLM; without one of these, the engine keeps that of the base model, or one of fewer bits
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
}
_SHORT = {"-asc": "--api-server-count", "-dp": "--data-parallel-size"}
_PROBE = "import importlib.util as u, sys; print(sys.version_info >= (3, 11), u.find_spec('vllm') is not None)"


def serve(
    base: str,
    given: Sequence[str],
    examples: Sequence[str],
    vllm: str | None,
    host: str,
    port: int,
    turn: float,
    arguments: Sequence[str],
    cache_dir: Path,
) -> None:
    """Become a server of a base model and its deltas; never returns.

    Args:
        base: the base model, as a folder or ``NAME[@REVISION]`` on the hub.
        given: ``NAME=DELTA`` each; the delta as a file or ``NAME[@REVISION]`` on the hub.
        examples: ``NAME=FILE`` each: records of what is asked of a model, by which the model ``auto`` chooses.
        vllm: the ``vllm`` command; by default that of ``PATH``.
        turn: seconds.
        arguments: of ``vllm serve``.

    Raises:
        UserError: a delta is damaged, or of another base model; examples are no records, or of no model; or vLLM is not found, or
            an argument is not its to take.
    """
    check_arguments(arguments)
    if not (math.isfinite(turn) and turn >= 0):
        raise UserError(f"--turn {turn}: must be seconds, 0 or more")
    python = python_of(vllm)
    names = _values(arguments, "--served-model-name")
    dtype = (_values(arguments, "--dtype") or ["auto"])[-1]
    folder, digest, modules = check_deltas(base, given, cache_dir, names, dtype)
    words = [str(folder.absolute()), "--host", host, "--port", str(port)]
    words += ["--worker-extension-cls", "liftdist.serving.worker.DeltaWorker"]
    if not names:
        words += ["--served-model-name", base]
    if modules:
        words += ["--lora-modules", *modules]
    command = [python, "-P", "-m", "liftdist.serving.main", "--base-digest", digest, "--turn", str(turn)]
    if examples:
        words += ["--middleware", "liftdist.serving.router.Router"]
        command += ["--routes", str(routes_of(folder, examples, [*(names or [base]), *read_names(given, ())]))]
    output.drain()
    os.execve(python, [*command, "--", *words, *arguments], environ(_package_alone(cache_dir)))


def check_deltas(
    base: str, given: Sequence[str], cache_dir: Path, names: Sequence[str] = (), dtype: str = "auto"
) -> tuple[Path, str, list[str]]:
    """The folder of a base model, its digest, and its deltas as vLLM's ``--lora-modules`` takes them.

    Args:
        names: under which the base model answers besides.
        dtype: vLLM's ``--dtype``.

    Raises:
        UserError: a delta is not there, or damaged, or for another base model, or cannot be undone, or its first tensor shows
            that the engine would round it, the others as they are loaded; the base model's weights are quantised.
    """
    modules, named = [], read_names(given, [base, *names])
    folder, _ = hub.model_of(base, "BASE")
    if given and weights.ModelFolder(folder).quantised:
        raise UserError(
            f"{base}: holds quantised weights, to which no delta applies in an engine; `liftdist export --format hf` writes the "
            "model of a delta, and vLLM serves that"
        )
    digest = weights.digest(folder, cache_dir)
    for name, text in named.items():
        path = hub.file_of(text, delta_file.NAME, f"--delta {name}")
        if path.is_dir():
            raise UserError(
                f"--delta {name}={text}: is a folder; of a run, `liftdist export {text} --format delta --output FILE` writes it"
            )
        delta = delta_file.read(path)
        if delta.compressed:
            raise UserError(
                f"--delta {name}={text}: is compressed; `liftdist export {path} --format delta --base {base} --output FILE` "
                "writes it whole"
            )
        if delta.base_digest != digest:
            raise UserError(
                f"--delta {name}={text}: is for another base model than {base}; `liftdist show {path}` names it"
            )
        for _, change in itertools.islice(changed(delta), 1):
            if change.base is None:
                raise UserError(
                    f"--delta {name}={text}: holds no base values, by which it is undone; make it without --without-base"
                )
            held = _DTYPES.get(dtype, change.stored)
            if loses(change.values, held):
                raise UserError(f"--delta {name}={text}: {rounded(held, change.dtype)}")
        modules.append(json.dumps({"name": name, "path": str(path.absolute())}))
    return folder, digest, modules


def routes_of(folder: Path, given: Sequence[str], served: Sequence[str]) -> Path:
    """A file of the routes by examples, in memory: it lasts until this process has become vLLM's, and that has read it.

    Args:
        given: ``NAME=FILE`` each.
        served: the names of the models that are served.

    Raises:
        UserError: of another form, of a model that is not served, twice of one, or as :func:`liftdist.serving.examples.routes`.
    """
    from liftdist.serving import examples  # with transformers, which takes seconds to import
    from liftdist.serving.routing import AUTO

    named: dict[str, str] = {}
    for text in given:
        name, path = _parted("--examples", text, "NAME=FILE")
        if name in named:
            raise UserError(f"--examples {text}: {name} has examples already; put them into one file")
        if name not in served:
            raise UserError(f"--examples {text}: no model {name} is served; name one of {', '.join(served)}")
        named[name] = path
    if AUTO in served:
        raise UserError(f"--examples: the model {AUTO} chooses by them; give the one that has this name another one")
    descriptor = os.memfd_create("routes", 0)  # inherited
    file = Path(f"/dev/fd/{descriptor}")
    examples.routes(folder, named).save(file)
    return file


def read_names(given: Sequence[str], taken: Sequence[str]) -> dict[str, str]:
    """Deltas by the names of their models. Raises ``UserError`` for another form, or a name that is given twice or taken."""
    named: dict[str, str] = {}
    for text in given:
        name, path = _parted("--delta", text, "NAME=FILE, or NAME=ORG/REPOSITORY[@REVISION] of the hub")
        if name in taken or name in named:  # under a name of the base model, that one would answer
            raise UserError(f"--delta {text}: {name} is the name of another model; give it another one")
        named[name] = path
    return named


def _parted(option: str, text: str, form: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise UserError(f"{option} {text}: must be {form}")
    return name, path


def check_arguments(arguments: Sequence[str]) -> None:
    """Raises ``UserError`` for options of vLLM under which deltas could not be served."""
    for word in arguments:
        option = _option(word)
        if option in _OURS:
            raise UserError(f"{word}: is not for vLLM to take here; {_OURS[option]}")
        whole = [known for known in (*_OURS, *_READ, *_SHORT) if known.startswith(option)]
        if option.strip("-") and whole and option not in whole:  # vLLM takes the beginning of an option for the option
            raise UserError(f"{word}: may be short for {whole[0]}, which is read here; write the whole option")


def python_of(vllm: str | None) -> str:
    """The Python that runs the ``vllm`` command. Raises ``UserError`` if there is none, or none that can serve deltas."""
    remedy = "install vLLM in an environment of its own, and name its command: --vllm ENVIRONMENT/bin/vllm"
    found = shutil.which(Path(vllm).expanduser() if vllm else "vllm")
    if found is None:
        raise UserError(f"--vllm {vllm}: no such command; {remedy}" if vllm else f"no command vllm in PATH; {remedy}")
    with Path(found).open("rb") as file:
        first = file.readline(4096).decode(errors="replace")
    words = first[2:].split() if first.startswith("#!") else []
    python = words[0] if words and "python" in Path(words[0]).name else str(Path(found).resolve().parent / "python3")
    try:
        probe = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, timeout=60, check=True)
        is_new, is_there = (word == "True" for word in probe.stdout.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        raise UserError(f"--vllm {found}: {python}, which is to run it, does not work; {remedy}") from None
    if not is_new or not is_there:
        problem = "holds no vLLM" if is_new else "is older than 3.11"
        raise UserError(f"--vllm {found}: its Python {python} {problem}; {remedy}")
    return python


def environ(package: Path) -> dict[str, str]:
    """The environment variables of vLLM's processes."""
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _package_alone(cache_dir: Path) -> Path:
    """A folder in which this package is all there is."""
    package = Path(__file__).resolve().parents[1]
    name = hashlib.sha256(str(package).encode()).hexdigest()[:16]
    folder = cache_dir.expanduser().absolute() / "serving" / name
    link = folder / package.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink() or link.readlink() != package:
            made = folder / f".{secrets.token_hex(8)}"
            made.symlink_to(package)
            made.replace(link)
    except OSError as error:
        raise UserError(f"--cache-dir {cache_dir}: {error.strerror}: {error.filename}") from None
    return folder


def _values(arguments: Sequence[str], option: str) -> list[str]:
    """What follows an option, of which vLLM takes the last."""
    found: list[str] = []
    is_value = False
    for word in arguments:
        if word.startswith("-"):
            if is_value := _option(word) == option:
                found = [value] if (value := word.partition("=")[2]) else []
        elif is_value:
            found.append(word)
    return found


def _option(word: str) -> str:
    option = word.partition("=")[0]
    return _SHORT.get(option, option.replace("_", "-"))
