"""What can be known to be wrong before ranks are started and weights are read: paths, files, the kind of model.

Imports no torch by itself, so that a wrong path is reported at once.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from liftdist.data import records
from liftdist.errors import UserError
from liftdist.models.check import check_model_folder, check_weight_files
from liftdist.models.hub import resolve_model
from liftdist.runs import claims
from liftdist.schema import Config


def check_cache_dir(config: Config) -> None:
    """Raises ``UserError`` unless the cache can be written."""
    cache_dir = Path(config.cache_dir).expanduser()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache_dir).close()
    except OSError as error:
        raise UserError(f"cache_dir {cache_dir}: cannot be written: {error.strerror}") from None


def check(config: Config, ranks: int | None, training: bool) -> None:
    """What takes seconds and needs no ranks: the layout, the run directory, the first records, the kind of model.

    Raises:
        UserError: the first thing that is wrong.
    """
    if ranks is not None:
        config.mesh.layout(ranks)
    check_cache_dir(config)
    if training:
        claims.check_free(Path(config.run_dir).expanduser())
        records.check_first_records(config.data)
    folder = resolve_model(config.model.path, weights=False)
    if folder == Path(config.model.path).expanduser():
        check_weight_files(folder)
    check_model_folder(folder, config.model.trust_remote_code)
