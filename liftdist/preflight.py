"""Checks before ranks start and weights are read: mesh layout, folders, files, first records, the model's type and headers.

Imports no torch itself, so that a wrong path is reported at once.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from liftdist import files
from liftdist.data import records, sources
from liftdist.errors import UserError
from liftdist.models import stored
from liftdist.models.check import check_model_folder
from liftdist.models.hub import resolve_model
from liftdist.runs import claims
from liftdist.runs.layout import CHECKPOINTS
from liftdist.schema import Config
from liftdist.sync import version


def check_cache_dir(config: Config) -> None:
    """Create ``cache_dir`` if needed. Raises ``UserError`` if it cannot be written."""
    cache_dir = Path(config.cache_dir).expanduser()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache_dir).close()
        kept = [path for name in ("digests", "tokens", "selections") if (path := cache_dir / name).is_dir()]
        if problem := files.not_writable(kept):
            raise UserError(f"cache_dir {cache_dir}: {problem}; give a folder of your own (cache_dir=...)")
    except OSError as error:
        raise UserError(
            f"cache_dir {cache_dir}: cannot be written: {error.strerror}; give a writable folder (cache_dir=...)"
        ) from None


def check_named(config: Config) -> None:
    """Raises ``UserError`` if what names weights does not exist; a run that has a checkpoint needs no ``selection.file``."""
    named = [("exclude", path) for path in config.selection.exclude]
    if config.selection.file is not None and not (Path(config.run_dir).expanduser() / CHECKPOINTS).is_dir():
        named.append(("file", config.selection.file))
    for key, path in named:
        if not Path(path).expanduser().exists():
            raise UserError(f"selection.{key} {path}: no such file or folder")


def check_own_answers(config: Config) -> None:
    """Raises ``UserError`` if a model in training is not to answer itself."""
    if config.eval.server is not None:
        raise UserError("eval.server: is for `liftdist eval`; in training the model itself answers: leave it out")


def check_sync(config: Config) -> None:
    """Raises ``UserError`` if the run cannot publish versions in ``sync.to``, because of what that is or holds."""
    if config.sync.to is not None:
        try:
            version.check_folder(Path(config.sync.to).expanduser(), claims.identity(Path(config.run_dir).expanduser()))
        except UserError as error:
            raise UserError(f"sync.to {error} (sync.to=...)") from None


def check(config: Config, ranks: int | None, training: bool) -> None:
    """Check the mesh layout, the run directory, the first records, the type of the model, its files' headers, and files that name
    weights; takes seconds.

    Args:
        ranks: number of ranks, or None if not known yet.
        training: check the run directory and the data, too.

    Raises:
        UserError: the first problem found.
    """
    if ranks is not None:
        config.mesh.layout(ranks)
    check_cache_dir(config)
    check_named(config)
    if training:
        check_own_answers(config)
        claims.check_free(Path(config.run_dir).expanduser())
        check_sync(config)
        records.check_first_records(config.data)
    folder = resolve_model(config.model.path, config.model.revision, weights=False)
    if folder == Path(config.model.path).expanduser():
        stored.resolve(folder)
    check_model_folder(folder, config.model.trust_remote_code)


def fetch(config: Config, training: bool) -> None:
    """Download what is on the hub, by one process for all ranks. Raises ``UserError`` if there is none, or no access, or if
    the model's files are damaged."""
    stored.resolve(resolve_model(config.model.path, config.model.revision))
    if training:
        sources.fetch(config.data)
