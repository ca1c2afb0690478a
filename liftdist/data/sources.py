"""Sources of records: a local file, or a data set on the hub at one commit.

A source has a number of records and a digest of its contents, and reads any range of records, each with its location for error
messages. A JSON Lines file is indexed only as far as records are requested: the first ones of a large file are available at once.
"""

from __future__ import annotations

import glob
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from liftdist import digests, hub
from liftdist.errors import UserError
from liftdist.hub import Repository
from liftdist.schema import DataConfig

LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet")

Record = Mapping[str, Any]


class JsonlSource:
    """One JSON object per line; only line offsets are held in memory. Empty lines are skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._numbers, self._offsets = array("q"), array("q")  # line number and byte offset of each record
        self._line = self._scanned = 0  # lines and bytes indexed so far
        self._complete = False

    def _index(self, end: int | None = None) -> None:
        """Index the first ``end`` records, or all."""
        if self._complete or (end is not None and len(self._offsets) >= end):
            return
        with self.path.open("rb") as file:
            file.seek(self._scanned)
            for line in file:
                self._line += 1
                if line.strip():
                    self._numbers.append(self._line)
                    self._offsets.append(self._scanned)
                self._scanned += len(line)
                if end is not None and len(self._offsets) >= end:
                    return
        self._complete = True

    def __bool__(self) -> bool:
        self._index(1)
        return bool(self._offsets)

    def __len__(self) -> int:
        self._index()
        return len(self._offsets)

    def digest(self, cache_dir: Path) -> str:
        return digests.of_file(self.path, cache_dir)

    def read(self, begin: int, end: int) -> Iterator[tuple[str, Record]]:
        self._index(end)
        with self.path.open("rb") as file:
            for number, offset in zip(self._numbers[begin:end], self._offsets[begin:end], strict=True):
                file.seek(offset)
                where = f"{self.path}:{number}"
                try:
                    record = json.loads(file.readline())
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    reason = getattr(error, "msg", None) or str(error)
                    column = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
                    raise UserError(f"{where}: not JSON: {reason}{column}") from None
                if not isinstance(record, dict):
                    raise UserError(f"{where}: must be a JSON object, got {type(record).__name__}")
                yield where, record


class ListSource:
    """Records in memory or memory-mapped: a JSON array, or a data set of the ``datasets`` library.

    Args:
        source: the file they were read from, or the fingerprint of the data set.
    """

    def __init__(self, name: str, records: Any, source: Path | str) -> None:
        self.name, self.records, self._source = name, records, source

    def digest(self, cache_dir: Path) -> str:
        return self._source if isinstance(self._source, str) else digests.of_file(self._source, cache_dir)

    def __len__(self) -> int:
        return len(self.records)

    def read(self, begin: int, end: int) -> Iterator[tuple[str, Record]]:
        for index in range(begin, min(end, len(self.records))):
            record = self.records[index]
            if not isinstance(record, dict):
                raise UserError(f"{self.name}: record {index}: must be an object, got {type(record).__name__}")
            yield f"{self.name}: record {index}", record


Source = JsonlSource | ListSource


def is_local(path: str) -> bool:
    return Path(path).suffix in LOCAL_SUFFIXES or path.startswith((".", "/", "~")) or Path(path).exists()


def repository(path: str, revision: str | None = None) -> Repository | None:
    """The repository that ``path`` names; None if it is a local file. Raises ``UserError`` if it can be neither."""
    if is_local(path):
        if revision is not None:
            raise UserError(f"data {path}: is a local file, which has no revision {revision}; leave the revision out")
        return None
    if not re.fullmatch(hub.NAME, path):
        raise UserError(f"data {path}: no such file, and no name on the hub either (OWNER/NAME)")
    return Repository("data", hub.DATASET, path, revision)


def open_source(path: str, subset: str | None, split: str, revision: str | None = None) -> Source:
    """The source of a path or hub name.

    Args:
        revision: commit, tag or branch of a hub name.

    Raises:
        UserError: it is missing, unreadable, empty or of an unknown kind, or the hub does not provide it.
    """
    if (repo := repository(path, revision)) is not None:
        return _open_hub(repo, subset, split)
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"data {path}: " + ("is a folder; name a file in it" if file.is_dir() else "no such file"))
    if file.suffix not in LOCAL_SUFFIXES:
        raise UserError(f"data {path}: must end in {', '.join(LOCAL_SUFFIXES)}")
    try:
        source: Source
        if file.suffix == ".jsonl":
            source = JsonlSource(file)
        elif file.suffix == ".parquet":
            source = ListSource(path, _load_parquet(file), file)
        else:
            source = _open_json(file)
    except OSError as error:
        raise UserError(f"data {path}: {error.strerror or error}") from None
    if not source:
        raise UserError(f"data {path}: holds no record")
    return source


def _open_json(file: Path) -> Source:
    """A JSON array of objects; files with one object per line often have this suffix, too."""
    with file.open("rb") as stream:
        if stream.read(4096).lstrip()[:1] != b"[":
            return JsonlSource(file)
    try:
        return ListSource(str(file), json.loads(file.read_bytes()), file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{file}{line}: not JSON: {getattr(error, 'msg', error)}") from None


def _load_parquet(file: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset("parquet", data_files=str(file), split="train")
    except Exception as error:  # the library raises errors of many kinds
        raise UserError(f"data {file}: {hub.first_line(error)}") from None


def _open_hub(repo: Repository, subset: str | None, split: str) -> Source:
    import datasets

    datasets.disable_progress_bars()
    commit, unreachable = repo.commit(), hub.why_unreachable()
    try:
        known = commit is not None or repo.revision is None  # else the newest copy may be another revision's
        builder = _built(repo, subset, commit) if known and (subset or unreachable) else None
        if builder is None and unreachable:
            raise repo.unreachable(unreachable)
        if builder is None:
            _check_access(repo, commit)
            builder = datasets.load_dataset_builder(repo.name, subset, revision=commit)
            if commit is not None and builder.hash != commit:  # what the library falls back on, whatever its revision
                raise UserError(f"{repo}: the hub does not provide commit {commit}, and the cache holds {builder.hash}")
        builder.download_and_prepare()
        splits = list(builder.info.splits or {})
        if not set(re.findall(r"(?:^|\+)\s*([\w.-]+)", split)) <= set(splits):
            raise UserError(f"{repo}: has no split {split}; those it has: {', '.join(splits)}")
        records = builder.as_dataset(split=split)
    except UserError:
        raise
    except Exception as error:  # the library raises errors of many kinds
        raise UserError(f"{repo}: {_explain(repo, subset, error)}") from None
    if commit is None:
        repo.remember(builder.hash)
    if not len(records):
        raise UserError(f"{repo}: split {split} holds no record")
    return ListSource(f"{repo.name}[{split}]", records, str(records._fingerprint))


def _check_access(repo: Repository, commit: str | None) -> None:
    """Read the first file that the library reads. Its own error leaves out what the hub says of a gated repository."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(repo.name, "README.md", repo_type=repo.kind, revision=commit)
    except LocalEntryNotFoundError as error:
        raise repo.error(error) from None
    except EntryNotFoundError:
        return
    except Exception as error:
        raise repo.error(error) from None


def _built(repo: Repository, subset: str | None, commit: str | None) -> Any:
    """What the cache holds of ``commit``, or its newest copy if that is None; None if it holds nothing.

    Offline, the library takes the newest copy whatever the revision.

    Raises:
        UserError: there are several subsets, and none is named.
    """
    from datasets import config
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    owner, _, name = repo.name.rpartition("/")
    folder = "___".join(filter(None, (owner, camelcase_to_snakecase(name))))
    pattern = f"{glob.escape(subset) if subset else '*'}/*/{commit or '*'}/dataset_info.json"
    kept = [info.parent for info in Path(config.HF_DATASETS_CACHE, folder).glob(pattern)]
    if not kept:
        return None
    newest = max(kept, key=lambda path: path.stat().st_mtime)
    subsets = sorted({path.parts[-3] for path in kept if path.name == newest.name})
    if len(subsets) > 1:
        raise UserError(f"{repo}: the cache holds several subsets; data.subset must name one of {', '.join(subsets)}")
    subset, version, found = newest.parts[-3:]
    return Cache(dataset_name=name, repo_id=repo.name, config_name=subset, version=version, hash=found)


def _explain(repo: Repository, subset: str | None, error: Exception) -> str:
    """What an error of the library means."""
    text = str(error)
    known = ", ".join(re.findall(r"'([^']+)'", text.partition("[")[2].partition("]")[0]))
    if "scripts are no longer supported" in text:
        return (
            "is made by a script, which is not run; use a repository or revision that holds the data itself: "
            "data.revision=refs/convert/parquet, where the hub has converted it"
        )
    if text.startswith("BuilderConfig") and "not found" in text:
        return f"has no subset {subset}; those it has: {known}"
    if "Config name is missing" in text:
        return f"data.subset must name one of its subsets: {known}"
    if type(error).__name__ in ("EmptyDatasetError", "DataFilesNotFoundError"):
        return f"holds no data file of a kind that can be read ({hub.first_line(error)})"
    return repo.cause(error) or f"cannot be read: {hub.first_line([*hub.chain(error)][-1])}"


def remember_digests(paths: Iterable[str | None], cache_dir: Path) -> None:
    """Hash local files and cache their digests for the ranks of this machine. Raises ``UserError`` like :func:`open_source`."""
    for path in paths:
        if path is not None and is_local(path):
            open_source(path, None, "train").digest(cache_dir)


def locations(config: DataConfig) -> list[tuple[str, str | None]]:
    """Path and revision of the training data and, if there is any, of the data for evaluation."""
    found = [(config.path, config.revision)]
    return found + ([(config.eval_path, config.revision_of_eval_path)] if config.eval_path else [])


def fetch(config: DataConfig) -> None:
    """Download data sets on the hub, so that ranks find them. Raises ``UserError`` like :func:`open_source`."""
    for (path, revision), split in zip(locations(config), (config.split, config.eval_split), strict=False):
        if not is_local(path):
            open_source(path, config.subset, split, revision)
