"""``liftdist push``: a result as one commit of a repository on the hub.

    run directory -> export in a format -+
    delta file -> the same, or as it is -+-> files, model card -> checks of the repository -> one commit
    exported folder, as it is -----------+

The repository and what it holds are checked before anything is exported. A branch holds one result: files of weights that an
earlier push left, and this one does not replace, are removed by the same commit. Hidden files are not sent.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from liftdist import files, hub, schema_tree
from liftdist.deltas import delta as deltas
from liftdist.deltas import export
from liftdist.deltas import file as delta_file
from liftdist.errors import UserError
from liftdist.hub import Repository
from liftdist.models import check
from liftdist.publishing import card
from liftdist.publishing.card import Result
from liftdist.report import read as runs
from liftdist.runs import layout, manifest

README, ADAPTER = "README.md", "adapter_config.json"
_FILES = {"delta": delta_file.NAME, "patch": delta_file.PATCH_NAME}  # of formats that are one file
_SETTINGS = ("config.json", "tokenizer_config.json", ADAPTER)
_ORIGINS = ("_name_or_path", "base_model_name_or_path", "name_or_path")  # their keys that may hold a local path
_WHOLE = "a push is one commit: it is there whole or not at all"
Contents = dict[str, Path | bytes]  # by path in the repository


@dataclass(frozen=True)
class Held:
    """What a branch of a repository holds."""

    commit: str
    names: list[str]
    kind: str | None  # of what liftdist push has put there, by its card


def run(options: argparse.Namespace, say: Callable[[str], None]) -> list[str]:
    """Push ``options.source``. Returns the lines to print.

    Args:
        say: prints progress.

    Raises:
        UserError: the source is no result, or not in that format; the repository cannot be written, or holds something else.
    """
    repo = Repository("push", hub.MODEL, options.repository, options.revision, write=True)
    _check_name(repo)
    kind = _kind(options)
    held = None if options.dry_run else _held(repo, kind, options)
    with contextlib.ExitStack() as stack:
        result, contents = _result(options, kind, stack, say)
        text = card.write(result)
        if held is None or README not in held.names or not options.keep_readme:
            contents[README] = text.encode()
        if options.dry_run:
            listed = [f"{_size(part):>15,}  {name}" for name, part in sorted(contents.items())]
            return [text, *listed, "", "nothing was sent (--dry-run)"]
        commit = _commit(repo, contents, held, options.public)
    return [f"{repo.page} (commit {commit})"]


def _size(part: Path | bytes) -> int:
    return part.stat().st_size if isinstance(part, Path) else len(part)


def _check_name(repo: Repository) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo.name)
        if repo.name.count("/") != 1:
            raise UserError(
                f"{repo}: is no name of a repository; give ORG/NAME, with your user name or an organization"
            )
    except HFValidationError as error:
        raise UserError(f"{repo}: is no name of a repository; give ORG/NAME: {hub.first_line(error)}") from None
    repo.check_revision()


def _kind(options: argparse.Namespace) -> str:
    """The kind of result that is pushed. Raises ``UserError`` if the source is none, or not in the format asked for."""
    source: Path = options.source
    if not source.exists():
        raise UserError(f"{source}: no such run directory, delta or exported folder")
    if source.is_file():
        export.check_step(source, options.step)
        return card.KINDS[options.format or "delta"]
    if not (source / deltas.ABOUT).is_file():
        layout.check_run(source)
        return card.KINDS[options.format or "hf"]
    for name in ("format", "step", "base"):
        if getattr(options, name) is not None:
            raise UserError(
                f"{source}: is an exported folder, pushed as it is; leave --{name} out, or push the run directory"
            )
    if (source / README).exists():
        raise UserError(f"{source / README}: would be replaced by the model card; move it elsewhere")
    return card.KINDS["peft" if (source / ADAPTER).exists() else "hf"]


def _result(
    options: argparse.Namespace, kind: str, stack: contextlib.ExitStack, say: Callable[[str], None]
) -> tuple[Result, Contents]:
    """What to say of the result, and its files, of which those that are made for the push last as long as ``stack``."""
    source: Path = options.source
    name, branch = options.repository, options.revision
    if source.is_dir() and (source / deltas.ABOUT).is_file():
        about = check.read_json(source / deltas.ABOUT)
        return Result(name, branch, kind, about, _license(about, None)), _contents(source)
    if source.is_file() and kind == "delta":
        given = delta_file.read(source)
        if options.base is None:
            return Result(name, branch, kind, given.about(), _license(given.about(), None)), {delta_file.NAME: source}
        if given.compressed or not all(
            given.get(name).undoable for name in given.names[:1]
        ):  # an export makes it larger
            made, base, _ = export.read(source, options.step, options.base, say)
            export.check_base(base, made, options.cache_dir)
            return Result(name, branch, kind, made.about(), _license(made.about(), base)), {delta_file.NAME: source}
    format = options.format or ("delta" if source.is_file() else "hf")
    made, base, dtype = export.read(source, options.step, options.base, say)
    if format == deltas.AS_TRAINED:
        made = replace(made, made={**made.made, deltas.AS_TRAINED: True})
    result = Result(name, branch, kind, made.about(), _license(made.about(), base))
    if source.is_dir():
        saved = manifest.read(made.location / layout.MANIFEST)
        settings = dict(schema_tree.leaves(yaml.safe_load(saved.provenance.config)))
        result = replace(result, run=replace(runs.read(source), settings=settings), manifest=saved)
    target = stack.enter_context(files.scratch_beside(source)) / _FILES.get(format, "folder")
    export.export(made, base, target, format, options.cache_dir, dtype)
    return result, {target.name: target} if target.is_file() else _contents(target)


def _contents(folder: Path) -> Contents:
    """The files of a folder that are not hidden; settings without local paths."""
    found: Contents = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        before = check.read_json(path) if path.name in _SETTINGS else {}
        after = {key: card.public(value) if key in _ORIGINS else value for key, value in before.items()}
        changed = after != before
        found[name.as_posix()] = (json.dumps(after, indent=2, ensure_ascii=False) + "\n").encode() if changed else path
    return found


def _license(about: Mapping[str, Any], base: Path | None) -> dict[str, str]:
    """What the base model's own card says of its license; nothing if it cannot be read: then it is for the user to say."""
    from huggingface_hub import ModelCard, hf_hub_download

    with contextlib.suppress(Exception):
        path: Path | None = base / README if base is not None else None
        if "base_model" in about and hub.why_unreachable() is None:
            path = Path(hf_hub_download(about["base_model"], README, revision=about["base_commit"]))
        if path is not None:
            found = ModelCard.load(path).data.to_dict()
            return {key: found[key] for key in ("license", "license_name", "license_link") if key in found}
    return {}


# ---------------------------------------------------------------------------------------------------------------------
# The repository.


@contextlib.contextmanager
def _errors(repo: Repository) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library raises errors of many kinds
        raise repo.error(error) from None


def _held(repo: Repository, kind: str, options: argparse.Namespace) -> Held | None:
    """What the branch holds; None if there is no such repository. Raises ``UserError`` if the push may not go there."""
    if hub.token() is None:
        raise UserError(f"{repo}: there is no token; {hub.LOGIN}")
    if (reason := hub.why_unreachable()) is not None:
        raise UserError(
            f"{repo}: the hub cannot be reached ({reason}); push where there is a network; --dry-run needs none"
        )
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    with _errors(repo):
        try:
            try:
                info = HfApi().model_info(repo.name, revision=repo.revision)
            except RevisionNotFoundError:  # a new branch begins with what is on the main one
                info = HfApi().model_info(repo.name)
        except RepositoryNotFoundError:
            return None
        names = [entry.rfilename for entry in info.siblings or ()]
        text = ""
        if README in names:
            text = Path(hf_hub_download(repo.name, README, revision=info.sha)).read_text(
                encoding="utf-8", errors="replace"
            )
    if options.public == bool(info.private):
        has, wants = ("private", "public") if info.private else ("public", "private")
        remedy = "leave --public out" if options.public else "give --public"
        raise UserError(f"{repo}: the repository is {has}, not {wants}; {remedy}, or change that in its settings")
    found, untouched = card.identify(text)
    if text and not untouched and not options.keep_readme:
        whose = "was edited since liftdist push wrote it" if found else "is not by liftdist push"
        raise UserError(f"{repo}: its README.md {whose}; --keep-readme leaves it as it is, or remove it there")
    if found not in (None, kind):
        raise UserError(f"{repo}: holds a {found}, and would hold a {kind}, too; give another repository or --revision")
    return Held(info.sha, names, found)


def _commit(repo: Repository, contents: Contents, held: Held | None, public: bool) -> str:
    """Make the repository and its branch if there are none, and one commit; its hash."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    old = [name for name in held.names if _is_weights(name) and name not in contents] if held else []
    if old and held and held.kind is None:
        raise UserError(
            f"{repo}: also holds {', '.join(old)}; remove what is there, or give another repository or --revision"
        )
    operations = [
        *(CommitOperationAdd(name, part if isinstance(part, bytes) else str(part)) for name, part in contents.items()),
        *(CommitOperationDelete(name) for name in old),
    ]
    api = HfApi()
    with _errors(repo):
        if held is None:
            api.create_repo(repo.name, private=not public, exist_ok=True)
        if repo.revision is not None:
            api.create_branch(repo.name, branch=repo.revision, exist_ok=True)
    try:
        made = api.create_commit(
            repo.name,
            operations,
            commit_message="Pushed by liftdist",
            revision=repo.revision,
            parent_commit=held.commit if held else None,  # the hub refuses it if the branch has moved since
        )
        return str(made.oid)
    except Exception as error:
        raise UserError(f"{repo.error(error)}; {_WHOLE}") from None


def _is_weights(name: str) -> bool:
    return "/" not in name and (name.endswith(".safetensors") or name == check.INDEX)
