"""Data sets on the hub at one commit: through the ``datasets`` library, or a single file of one.

Must not know local files, except that a single file is read as one once it is here.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from liftdist import hub
from liftdist.data.reading import Place, Source
from liftdist.data.tables import check_columns
from liftdist.errors import UserError
from liftdist.hub import Repository


class DatasetSource(Source):
    """A data set of the ``datasets`` library, memory-mapped."""

    is_table = True

    def __init__(self, name: str, records: Any) -> None:
        self.name, self.records = name, records

    def digest(self, cache_dir: Path) -> str:  # noqa: ARG002
        return str(self.records._fingerprint)

    def __len__(self) -> int:
        return len(self.records)

    def read(self, begin: int, end: int) -> Iterator[Place]:
        for index in range(begin, min(end, len(self.records))):
            yield f"{self.name}: record {index}", self.records[index]


def open_hub(repo: Repository, subset: str | None, split: str) -> Source:
    """The records of a split, or of a part of one (``train[:1000]``), downloaded if need be. Raises ``UserError``."""
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
        _check_columns(repo, builder)  # before the data is downloaded, if they are known
        builder.download_and_prepare()
        splits = list(builder.info.splits or {})
        if not set(re.findall(r"(?:^|\+)\s*([\w.-]+)", split)) <= set(splits):
            raise UserError(f"{repo}: has no split {split}; those it has: {', '.join(splits)}")
        _check_columns(repo, builder)
        records = builder.as_dataset(split=split)
    except UserError:
        raise
    except Exception as error:  # the library raises errors of many kinds
        raise UserError(f"{repo}: {_explain(repo, subset, error)}") from None
    if commit is None:
        repo.remember(builder.hash)
    if not len(records):
        raise UserError(f"{repo}: split {split} holds no record")
    return DatasetSource(f"{repo.name}[{split}]", records)


def _check_columns(repo: Repository, builder: Any) -> None:
    if features := builder.info.features:
        check_columns(repo.name, features, features.to_dict())


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


def download(repo: Repository, file: str) -> Path:
    """A single file of a data set, in the hub's cache. Raises ``UserError``."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    commit, unreachable = repo.commit(), hub.why_unreachable()
    try:
        return Path(
            hf_hub_download(
                repo.name, file, repo_type=repo.kind, revision=commit, local_files_only=unreachable is not None
            )
        )
    except LocalEntryNotFoundError as error:
        raise (repo.unreachable(unreachable) if unreachable else repo.error(error)) from None
    except EntryNotFoundError:
        raise UserError(f"{repo}: has no file {file}; see {repo.page}/tree/{commit or 'main'}") from None
    except Exception as error:
        raise repo.error(error) from None
