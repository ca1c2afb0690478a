"""Model folders made from a delta: applied, undone, swapped, merged, or in the forms that other software reads.

A folder is written beside its place, file by file, and takes its name in one step when it is complete.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from liftdist import files, preflight
from liftdist.deltas import delta as deltas
from liftdist.deltas.delta import Delta
from liftdist.distributed.mesh import gather, together
from liftdist.models import weights
from liftdist.models.weights import ModelFolder
from liftdist.runs import checkpoint
from liftdist.runs import claims as rundir
from liftdist.schema import UserError

COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".py")


def change_folder(
    folder: Path, cache_dir: Path, apply: Delta | None = None, undo: Delta | None = None, output: Path | None = None
) -> Path:
    """Apply a delta to a Hugging Face folder, undo one, or swap one for another: to a new folder, or in place.

    In place the finished folder takes the old one's name in one step: there is no moment at which the folder is a mixture.

    Raises:
        UserError: the folder is not the model that the delta starts from, or cannot be replaced in one step.
    """
    stored = ModelFolder(folder)
    deltas.check_same_base(apply, undo)
    started_from = apply or undo
    assert started_from is not None
    for name in [name for delta in (apply, undo) if delta for name in delta.names]:
        if name not in stored.file_of:
            raise UserError(f"{folder}: has no {name}, which {started_from.origin} changes")
    try:  # everything that is wrong, before anything is written
        found = weights.digest(folder, cache_dir) if undo is None else _digest_without(stored, undo)
        if found != started_from.base:
            what = f"differs in more than {undo.origin} changed from" if undo else "is another model than"
            raise UserError(f"{what} the base of {started_from.origin} ({found[:12]}, not {started_from.base[:12]})")
        for name in apply.names if apply else ():
            change = started_from.get(name)
            if output is None and change.base is None:
                raise UserError(
                    f"{started_from.origin} holds no base values, so this could not be taken back; give --output"
                )
            deltas.edit(name, stored.read(name), deltas.by_name(name, undo), change)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    target = output or folder.resolve()

    _rewrite(
        stored,
        target,
        lambda name, tensor: deltas.edit(name, tensor, deltas.by_name(name, undo), deltas.by_name(name, apply)),
        lambda temporary: _copy_others(stored, temporary),
        replace=output is None,
    )
    return target


def _digest_without(stored: ModelFolder, undo: Delta) -> str:
    """What the digest of a folder would be with a delta undone."""
    tensors = {}
    for name in stored.file_of:
        tensor = deltas.edit(name, stored.read(name), deltas.by_name(name, undo), None)
        sha256 = hashlib.sha256(weights.bytes_of(tensor)).hexdigest()
        tensors[name] = (weights.dtype_name(tensor.dtype), list(tensor.shape), sha256)
    return weights.combine(tensors)


def _rewrite(
    stored: ModelFolder,
    target: Path,
    edit: Callable[[str, Tensor], Tensor],
    finish: Callable[[Path], None],
    replace: bool = False,
) -> None:
    """Write a model folder, file by file, its files dealt to the ranks; it appears under its name when it is complete.

    Args:
        edit: from a tensor's name and value, what takes its place.
        finish: completes the folder, on one rank, before it appears.
        replace: take the place of a folder that exists.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    made = ""
    with together(), _disk_errors(target):
        if rank == 0:
            if target.exists() and not replace:
                raise UserError(f"{target}: exists")
            made = tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent)
            if replace:
                _check_exchange(Path(made), target)
    temporary = Path(gather(made)[0])
    try:
        members: dict[str, list[str]] = {}
        for name, file in stored.file_of.items():
            members.setdefault(file, []).append(name)
        total = 0
        with together(), _disk_errors(target):
            for file in sorted(members)[rank::ranks]:
                tensors = {name: edit(name, stored.read(name)).contiguous() for name in members[file]}
                save_file(tensors, temporary / file, {"format": "pt"})
                total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
                del tensors
        total = sum(gather(total))
        with together(), _disk_errors(target):
            if rank == 0:
                if (stored.folder / preflight.INDEX).exists():
                    index = json.loads((stored.folder / preflight.INDEX).read_text())
                    if index.get("metadata", {}).get("total_size") == total:
                        shutil.copyfile(stored.folder / preflight.INDEX, temporary / preflight.INDEX)
                    else:
                        index["metadata"] = index.get("metadata", {}) | {"total_size": total}
                        (temporary / preflight.INDEX).write_text(json.dumps(index, indent=2) + "\n")
                finish(temporary)
                for path in temporary.iterdir():
                    if path.is_file() and not path.is_symlink():
                        old = target / path.name
                        path.chmod(old.stat().st_mode & 0o777 if replace and old.is_file() else files.mode(0o666))
                        files.sync_file(path)
                temporary.chmod(target.stat().st_mode & 0o777 if replace else files.mode(0o777))
                files.sync_folder(temporary)
                if replace:
                    _exchange(temporary, target)
                else:
                    temporary.rename(target)
                files.sync_folder(target.parent)
    finally:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # what is left of a failure, or the replaced folder


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turns an error of the disk into a ``UserError``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {files.reason(error)}") from None
    except SafetensorError as error:
        raise UserError(f"{target}: cannot be written: {error}") from None


def _check_exchange(folder: Path, target: Path) -> None:
    """Raises ``UserError`` now, rather than when everything is written, where folders cannot be exchanged."""
    pair = [folder / name for name in ("first", "second")]
    for path in pair:
        path.mkdir()
    try:
        _exchange(*pair)
    except UserError as error:
        raise UserError(str(error).replace(str(pair[1]), str(target))) from None
    for path in pair:
        path.rmdir()


def _exchange(first: Path, second: Path) -> None:
    """Exchange the names of two folders in one step. Raises ``UserError`` where the file system cannot."""
    at_fdcwd, rename_exchange = -100, 2
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0:
        return
    problem = ctypes.get_errno()
    if problem in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        raise UserError(
            f"{second}: its file system cannot replace a folder in one step; give --output for a new folder"
        )
    raise UserError(f"{second}: cannot be replaced: {os.strerror(problem)}")


def _copy_others(stored: ModelFolder, target: Path) -> None:
    """Everything in a model folder but its weights."""
    written = {*stored.file_of.values(), preflight.INDEX}
    for path in stored.folder.iterdir():
        if path.name in written:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target / path.name, symlinks=True)
        elif path.exists():  # a link into a cache becomes the file that it names
            shutil.copy2(path, target / path.name)


def export_merged(delta: Delta, base: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write the fine-tuned model as a Hugging Face folder, with config, tokenizer, generation config and chat template of
    the base; in ``dtype``, or as the base is. Collective where ranks run.

    Raises:
        UserError: ``target`` exists or cannot be written.
    """
    with together():
        stored = ModelFolder(base)

    def edit(name: str, tensor: Tensor) -> Tensor:
        tensor = deltas.edit(name, tensor, None, deltas.by_name(name, delta))
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    def finish(temporary: Path) -> None:
        for path in base.iterdir():
            if path.is_file() and path.suffix in COPIED_SUFFIXES and path.name != preflight.INDEX:
                shutil.copyfile(path, temporary / path.name)
        if dtype is not None:
            config = json.loads((temporary / "config.json").read_text())
            config["dtype"] = str(dtype).removeprefix("torch.")
            config.pop("torch_dtype", None)  # the older name of the same
            (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    _rewrite(stored, target, edit, finish)


def export_shira(delta: Delta, base: Path, target: Path) -> None:
    """Write a SHiRA adapter that ``peft.PeftModel.from_pretrained`` loads. It holds differences in float32: they add up to
    the trained weights to within the rounding of float32 at the larger of old and new value, which in bf16 is exact but
    for weights that became thousands of times smaller.

    Raises:
        UserError: something else than weights of linear layers changed, or more of one than the format can hold.
    """
    changes = dict(deltas.changed(delta))
    for name, change in changes.items():
        if len(change.shape) != 2 or not name.endswith(".weight") or "embed" in name or change.base is None:
            raise UserError(
                f"{delta.origin}: a SHiRA adapter cannot hold {name} {list(change.shape)}: not a linear layer"
            )
    rank = max((-(-c.indices.numel() // sum(c.shape)) for c in changes.values()), default=1)  # one for all modules
    tensors = {}
    for name, change in changes.items():
        rows, columns = change.shape
        size = rank * (rows + columns)
        if size > rows * columns:
            raise UserError(
                f"{delta.origin}: a SHiRA adapter of rank {rank} is larger than {name} {list(change.shape)}"
            )
        padding = size - change.indices.numel()  # with differences of zero, at (0, 0)
        indices = torch.stack([change.indices // columns, change.indices % columns])
        difference = change.values.float() - (change.base.float() if change.base is not None else 0)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.shira_indices"] = nn.functional.pad(indices, (0, padding)).to(torch.int32)
        tensors[f"{module}.shira_weight"] = nn.functional.pad(difference, (0, padding))
    settings = {
        "peft_type": "SHIRA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "mask_type": "principal_weights",
        "target_modules": [name.removesuffix(".weight") for name in changes],
        "inference_mode": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    if target.exists():
        raise UserError(f"{target}: exists")
    with _disk_errors(target):
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            deltas.save(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
            (temporary / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
            temporary.chmod(files.mode(0o777))
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def export_patch(delta: Delta, path: Path) -> None:
    """Write a sparse patch: for each tensor ``NAME.indices`` (flat, int32 or int64) and ``NAME.values``, which are absolute;
    the shapes are in the metadata."""
    tensors, shapes = {}, {}
    for name, change in deltas.changed(delta):
        size = int(torch.Size(change.shape).numel())
        tensors[f"{name}.indices"] = change.indices.to(torch.int32 if size < 2**31 else torch.int64)
        tensors[f"{name}.values"] = change.values
        shapes[name] = list(change.shape)
    deltas.save(tensors, path, {"format": deltas.PATCH_FORMAT, "base": delta.base, "shapes": json.dumps(shapes)})


def export(
    delta: Delta, base: Path, target: Path, format: str, cache_dir: Path, dtype: torch.dtype | None = None
) -> None:
    """Write ``delta`` as ``hf``, ``delta``, ``shira`` or ``patch``. Raises ``UserError`` unless ``base`` is its base model."""
    if weights.digest(base, cache_dir) != delta.base:
        raise UserError(f"{base}: is another model than the base of {delta.origin}")
    if format == "hf":
        export_merged(delta, base, target, dtype)
    elif format == "delta":
        deltas.write(delta, target)
    elif format == "shira":
        export_shira(delta, base, target)
    else:
        export_patch(delta, target)


def of_run_dir(
    run_dir: Path, number: int | None, base: Path | None, say: Callable[[str], None] = lambda _: None
) -> tuple[Delta, Path, torch.dtype]:
    """What a run has changed by a step, or by its newest checkpoint; its base model; the dtype it was trained in.

    Raises:
        UserError: no such run or checkpoint, a damaged one, or no base model.
    """
    steps = checkpoint.accepted(run_dir, rundir.attempts(run_dir))
    if number is not None:
        name = f"step-{number:08d}"
        if name not in steps:
            held = ", ".join(str(int(step.removeprefix("step-"))) for step in sorted(steps)) or "none"
            raise UserError(f"{run_dir}: has no checkpoint of step {number}; those it has: {held}")
        steps = {name: steps[name]}
    if not steps:
        raise UserError(f"{run_dir}: holds no checkpoint")
    step = checkpoint.newest(run_dir, steps, 0, 1, say, set_aside=False)
    assert step is not None
    say(f"exporting {step.folder}")
    if base is None:
        try:
            base = preflight.resolve_model(OmegaConf.create(step.manifest["config"]).model.path)
        except OmegaConfBaseException as error:
            raise UserError(f"{run_dir}: model.path: {str(error).splitlines()[0]}; give --base") from None
        except UserError as error:
            raise UserError(f"{error}; give --base") from None
    dtype = next(iter(step.manifest["parameters"].values()))["dtype"]
    return deltas.of_run(step, base), base, getattr(torch, dtype)
