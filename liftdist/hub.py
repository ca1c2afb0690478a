"""Repositories of the Hugging Face hub: which commit a name stands for, and what an error of the hub means to a user.

    (kind, name, revision) -> commit       asked once for a run: in its environment, processes find what the first one was told

A branch may move while a job waits or runs; all that is read after the first answer comes from the commit of that answer.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from liftdist import environment, files
from liftdist.errors import UserError

MODEL, DATASET = "model", "dataset"
_WORDS = {MODEL: "model", DATASET: "data set"}
_LOCAL = {MODEL: "folder", DATASET: "file"}
REPLY_TIMEOUT = 5.0  # seconds within which the hub must answer a request, unless HF_HUB_ETAG_TIMEOUT is set
READ_TIMEOUT = 30.0  # seconds of silence in the middle of an exchange, for requests to which the library sets no limit
NAME = r"[\w.-]+(/[\w.-]+)?"
FULL_NAME = r"[\w.-]+/[\w.-]+"
_REVISION = r"[\w.+-]+(/[\w.+-]+)*"
_COMMIT = r"[0-9a-f]{40}"
LOGIN = "log in: hf auth login, or set HF_TOKEN"


@dataclass(frozen=True)
class Repository:
    """A repository at a revision: a branch, a tag or a commit; its main branch if None."""

    setting: str  # what names it, for messages
    kind: str  # MODEL or DATASET
    name: str
    revision: str | None = None
    local: str = ""  # what its setting may name instead; by default a folder of a model, a file of a data set
    write: bool = False  # whether it is to be written

    def __str__(self) -> str:
        return f"{self.setting} {self.name}" + (f" (revision {self.revision})" if self.revision else "")

    @property
    def page(self) -> str:
        from huggingface_hub import constants

        return f"{_clean(constants.ENDPOINT)}/{'datasets/' if self.kind == DATASET else ''}{self.name}"

    def commit(self) -> str | None:
        """The commit that the revision stands for, 40 hexadecimal digits; None if there is no hub and the cache does not know.

        If the hub gives no answer, or an error, it is the one that the cache knows, and a line on stderr says so.

        Raises:
            UserError: no such repository or revision, or no access to it, and no copy in the cache.
        """
        self.check_revision()
        if self.revision is not None and re.fullmatch(_COMMIT, self.revision):
            return self.revision
        if (known := resolved().get(self._key)) is not None:
            return known
        reason = why_unreachable()
        try:
            found = self._ask() if reason is None else None
        except Exception as error:  # the library raises errors of many kinds
            from huggingface_hub.errors import RevisionNotFoundError

            if isinstance(error, RevisionNotFoundError) or self._cached() is None:
                raise self.error(error) from None
            found, reason = None, self.explain(error)
        if found is None:
            found = self._cached()
            if found is not None and reason != OFFLINE:
                sys.stderr.write(f"{self}: commit {found} is taken, which the cache knows: {reason}\n")
        if found is not None:
            self.remember(found)
        return found

    def check_revision(self) -> None:
        """Raises ``UserError`` if the revision can be none."""
        if self.revision is not None and (not re.fullmatch(_REVISION, self.revision) or ".." in self.revision):
            raise UserError(f"{self}: is no revision; give a branch, a tag or the full hash of a commit")

    @contextlib.contextmanager
    def reading(self) -> Iterator[tuple[str | None, bool]]:
        """The commit to read in the block, and whether from the cache alone. Raises ``UserError`` for what is raised there."""
        commit, unreachable = self.commit(), why_unreachable()
        try:
            yield commit or self.revision, unreachable is not None
        except Exception as error:  # the library raises errors of many kinds
            raise (self.error(error) if unreachable is None else self.unreachable(unreachable)) from None

    def remember(self, commit: str) -> None:
        """Take ``commit`` for this revision from now on, in this process and in those that it starts."""
        adopt(resolved() | {self._key: commit})

    def error(self, error: BaseException) -> UserError:
        """What went wrong when the repository was read, in one line with the remedy."""
        return UserError(f"{self}: {self.explain(error)}")

    def unreachable(self, reason: str) -> UserError:
        return UserError(
            f"{self}: the hub cannot be reached ({reason}); give a local {self._local}, or fetch it where "
            "there is a network: liftdist select CONFIG --prefetch"
        )

    def explain(self, error: BaseException) -> str:
        return self.cause(error) or _clean(f"{self._absent}: {first_line(error)}")

    def cause(self, error: BaseException) -> str | None:
        """What the hub, the network or the cache has to do with an error; None if nothing."""
        return next((_clean(text) for link in chain(error) if (text := self._explain(link)) is not None), None)

    @property
    def _local(self) -> str:
        return self.local or _LOCAL[self.kind]

    @property
    def _absent(self) -> str:
        return "the hub does not take it" if self.write else f"no such {self._local}, and the hub does not provide it"

    @property
    def _key(self) -> str:
        return f"{self.kind} {self.name}@{self.revision or 'main'}"

    def _ask(self) -> str:
        from huggingface_hub import HfApi

        info = HfApi().repo_info(self.name, repo_type=self.kind, revision=self.revision or "main", timeout=_seconds())
        if not re.fullmatch(_COMMIT, info.sha or ""):
            raise UserError(f"{self}: the hub names no commit of it; does HF_ENDPOINT name a hub?")
        with contextlib.suppress(OSError):  # a cache that cannot be written fails where files are
            self._ref.parent.mkdir(parents=True, exist_ok=True)
            files.write(self._ref, info.sha)
        return str(info.sha)

    def _cached(self) -> str | None:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = self._ref.read_text().strip()
            return text if re.fullmatch(_COMMIT, text) else None
        return None

    @property
    def _ref(self) -> Path:
        """Where the library keeps the commit of a branch or tag."""
        from huggingface_hub import constants

        folder = f"{self.kind}s--{self.name.replace('/', '--')}"
        return Path(constants.HF_HUB_CACHE, folder, "refs", self.revision or "main")

    def _explain(self, error: BaseException) -> str | None:
        """What one error of a chain means; None if it says nothing."""
        from huggingface_hub import constants, errors

        if isinstance(error, UserError):
            return str(error).removeprefix(f"{self}: ")
        if isinstance(error, errors.GatedRepoError):
            return self._gated(error)
        if isinstance(error, errors.RevisionNotFoundError):
            wanted, commits = self.revision or "main", f"{self.page}/commits"
            return f"has no revision {wanted}; give a branch, a tag or the full hash of a commit, see {commits}"
        if isinstance(error, errors.RepositoryNotFoundError):
            if self._is_of_another_kind():
                return f"is a {_WORDS[_other(self.kind)]} on the hub, not a {_WORDS[self.kind]}"
            return f"{self._absent}: not found; if it is private, {LOGIN}"
        if isinstance(error, errors.HfHubHTTPError):
            return self._explain_status(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"no space left in the hub's cache {constants.HF_HOME}; free some, or set HF_HOME to a larger disk"
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            where = error.filename or constants.HF_HOME
            return f"the hub's cache cannot be written ({where}: {error.strerror}); set HF_HOME to a folder that can"
        if type(error).__module__.startswith(("httpx", "http.", "aiohttp")) or "Consistency check" in str(error):
            where = f" to {host}" if (host := _host(error)) else ""
            return f"the connection{where} broke off ({_reason(error)}); start again: files that have arrived are kept"
        if isinstance(error, json.JSONDecodeError):
            return (
                f"what answers at {constants.ENDPOINT} is no hub; look at HF_ENDPOINT and at the proxies of your site"
            )
        return None

    def _explain_status(self, error: Any) -> str:
        status = error.response.status_code
        said = _line(error.server_message) if error.server_message else f"HTTP status {status}"
        if (host := _host(error)) != _endpoint() and status < 500:
            return f"{host}, where the hub keeps its files, refuses them ({said}); your proxy or firewall must allow it"
        if status == 401:
            return f"the hub refuses the token ({said}); {LOGIN} to one that is valid"
        if status == 403:
            return f"the hub denies access ({said}); use a token that may {'write to' if self.write else 'read'} {self.page}"
        if status == 412:
            return "the branch has changed meanwhile; start again"
        if status == 429:
            after = error.response.headers.get("retry-after")
            when = f"in {after} s" if after and after.isdigit() else "later"
            return f"the hub limits the rate of requests ({said}); try again {when}, or log in, which raises the limit"
        if status >= 500:
            return f"the hub has failed ({status}: {said}); try again later: files that have arrived are kept"
        path = urlsplit(str(error.response.url)).path
        if status == 404 and "/api/" not in path:
            return f"the hub does not provide its file {path.rpartition('/')[2]} ({said})"
        return f"{self._absent}: {first_line(error)}"

    def _gated(self, error: Any) -> str:
        said = _line(error.server_message or "")
        if token() is None:
            return f"is gated: ask for access at {self.page}, then {LOGIN}"
        if "await" in said.lower() or "pending" in said.lower() or "review" in said.lower():
            return f"is gated, and your request for access waits for its owners, see {self.page}: {said}"
        return f"is gated, and the user of your token has no access: ask for it at {self.page}"

    def _is_of_another_kind(self) -> bool:
        from huggingface_hub import HfApi

        with contextlib.suppress(Exception):
            HfApi().repo_info(self.name, repo_type=_other(self.kind), timeout=_seconds())
            return True
        return False


OFFLINE = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"


def resolved() -> dict[str, str]:
    """The commits that revisions stand for in this run, as far as they have been asked for."""
    return environment.COMMITS.get({})


def adopt(commits: Mapping[str, str]) -> None:
    """Take over :func:`resolved` of another process."""
    os.environ[environment.COMMITS.name] = json.dumps(dict(commits))


@functools.cache  # one request per process
def why_unreachable() -> str | None:
    """Why the hub cannot be reached; None if it answers a request, with any status.

    Asked first because the library repeats each failed request for over a minute.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return OFFLINE
    seconds = _seconds()
    host = _endpoint()
    answers: list[str | None] = []

    def ask() -> None:
        try:  # the library's client respects the settings for proxies and certificates
            session = get_session()
            session.event_hooks["request"].append(_bound)
            session.head(constants.ENDPOINT, timeout=seconds, follow_redirects=False)
            answers.append(None)
        except Exception as error:
            answers.append(f"{host}: {_clean(_reason(error))}")

    for name in ("file_download", "utils._http"):
        logging.getLogger(f"huggingface_hub.{name}").addFilter(_clean_record)
    # the client's timeout covers neither name resolution nor the number of addresses that it tries in turn
    thread = threading.Thread(target=ask, name="hub", daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else f"{host}: no answer within {seconds:g} s"


def first_line(error: BaseException) -> str:
    return _line(str(error)) or type(error).__name__


def _line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _reason(error: BaseException) -> str:
    """The first line of an error of the network, with what to look at."""
    line = first_line(error)
    if "CERTIFICATE_VERIFY" in line:
        return f"{line}; SSL_CERT_FILE may name the certificates of your site"
    if type(error).__name__ == "ProxyError":
        return f"{line}; HTTPS_PROXY, HTTP_PROXY and NO_PROXY name proxies"
    return line


def _seconds() -> float:
    from huggingface_hub import constants

    return float(constants.HF_HUB_ETAG_TIMEOUT) if "HF_HUB_ETAG_TIMEOUT" in os.environ else REPLY_TIMEOUT


def token() -> str | None:
    """The user's token; None if there is none."""
    from huggingface_hub import get_token

    with contextlib.suppress(OSError):
        return get_token()
    return None


def _endpoint() -> str:
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]  # without credentials


def _host(error: Any) -> str:
    """Host and port that a request which failed went to; empty if the error does not know."""
    with contextlib.suppress(AttributeError, RuntimeError):
        request = error.response.request if hasattr(error, "response") else error.request
        return urlsplit(str(request.url)).netloc.rpartition("@")[2]
    return ""


def _other(kind: str) -> str:
    return MODEL if kind == DATASET else DATASET


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _clean(text: str) -> str:
    """``text`` without the user's token, and without credentials and signatures in addresses."""
    if secret := token():
        text = text.replace(secret, "<token>")
    return re.sub(r"(https?://)(?:[^/\s@]*@)?([^\s?'\"]*)(?:\?[^\s'\")]*)?", r"\1\2", text)


def _bound(request: Any) -> None:
    """Set the limits that the library leaves open: it would wait for ever."""
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {key: READ_TIMEOUT if limit is None else limit for key, limit in limits.items()}


def _clean_record(record: logging.LogRecord) -> bool:
    """Clean what the library logs: addresses of files are signed."""
    record.msg, record.args = _clean(record.getMessage()), ()
    return True
