"""The client of a tracker in a process of its own: whatever it does, it neither stops nor delays training.

    main rank: Client  --lines of JSON-->  client.py: Run of trackers/NAME.py  ->  the service

What the client prints goes to ``trackers/NAME.log`` of the run directory, ``trackers/NAME.json`` holds the run's
:class:`Identity`. The process outlives the rank for at most ``CLOSE`` seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liftdist import files, signals, start
from liftdist.redaction import redact
from liftdist.registry import TRACKERS
from liftdist.runs import layout

CLOSE = 30  # seconds in which a client may end its run, as it may wait for a network that is gone
PIPE = 2**20  # bytes that may wait for the client: those of a step, with the memory of thousands of ranks, must fit


@dataclass(frozen=True)
class Identity:
    """What makes a run directory one run of a tracker, over all attempts."""

    id: str
    recorded: int = -1  # the last step that earlier attempts recorded


class Client:
    """A tracker whose client runs in another process.

    Services cannot rewind: steps that earlier attempts recorded and that are trained again are not recorded again.

    Raises ``UserError`` if the folder ``trackers`` is something else; ``OSError`` once, when the client has failed, and is silent
    from then on.
    """

    def __init__(self, name: str, run_dir: Path, after: int | None) -> None:
        self._name, self._run_dir, self._after = name, run_dir, after
        self._folder = files.real_folder(run_dir / layout.TRACKERS)
        self._recorded = -1 if after is None else _last_step(run_dir)
        self._process: subprocess.Popen[bytes] | None = None
        self._failed = False

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._after is None or not self._after < step <= self._recorded:
            self._send("scalars", step, values)

    def text(self, tag: str, text: str) -> None:
        self._send("text", tag, text)

    def close(self) -> None:
        if self._process is None or self._failed:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            code = self._process.wait(CLOSE + 1)
        except subprocess.TimeoutExpired:
            code = -signal.SIGALRM
        if code:
            self._fail(f"has not ended within {CLOSE} s" if code == -signal.SIGALRM else self._reason())

    def _send(self, *call: Any) -> None:
        if self._failed:
            return
        try:
            process = self._process or self._open()
            assert process.stdin is not None
            line = json.dumps(call).encode() + b"\n"
            if os.write(process.stdin.fileno(), line) < len(line):
                raise BlockingIOError
        except BlockingIOError:
            self._fail("does not read what is sent to it")
        except BrokenPipeError:
            self._fail(self._reason())
        except OSError as error:
            self._fail(files.reason(error))

    def _open(self) -> subprocess.Popen[bytes]:
        identity = self._identity(self._folder / f"{self._name}.json")
        with files.open_to_append(self._folder / f"{self._name}.log") as log, signals.blocked():
            self._process = subprocess.Popen(
                [sys.executable, "-P", start.__file__, __name__, self._name, self._run_dir, identity.id],
                stdin=subprocess.PIPE,
                pipesize=PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        return self._process

    def _identity(self, path: Path) -> Identity:
        """The run's identity, kept with the last step that any attempt before this one recorded."""
        try:
            kept = Identity(**json.loads(files.read(path)))
        except FileNotFoundError:
            kept = Identity(uuid.uuid4().hex)
        except (ValueError, TypeError) as error:
            raise OSError(f"{path}: damaged: {error}; remove it, and the run goes on as another one there") from None
        self._recorded = max(self._recorded, kept.recorded)
        kept = dataclasses.replace(kept, recorded=self._recorded)
        files.write(path, json.dumps(dataclasses.asdict(kept)) + "\n")
        return kept

    def _reason(self) -> str:
        """The last line that the client has printed."""
        path = self._folder / f"{self._name}.log"
        with contextlib.suppress(OSError, ValueError):
            return redact(f"{(files.read(path).splitlines() or [''])[-1]} ({path})")
        return "its process has ended"

    def _fail(self, reason: str) -> None:
        self._failed = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # and what the client has started
        raise OSError(f"{self._name} {reason}")


def _last_step(run_dir: Path) -> int:
    """The last step in ``metrics.jsonl``, before it is rewound; -1 if there is none."""
    last = -1
    with contextlib.suppress(OSError, ValueError):
        for line in files.read(run_dir / layout.METRICS).splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                last = max(last, int(json.loads(line)["step"]))
    return last


def _read(lines: queue.SimpleQueue[bytes]) -> None:
    """Take what the rank sends at once, however long the client takes for it."""
    for line in sys.stdin.buffer:
        lines.put(line)
    signal.alarm(CLOSE)  # ends the process
    lines.put(b"")


def main() -> None:
    """``NAME RUN_DIR ID``: record the calls that stdin holds, one a line, until it ends."""
    signals.ignore()  # a stop is the rank's business: it closes stdin
    signals.unblock()
    name, run_dir, id = sys.argv[1:]
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    try:
        run = TRACKERS.load(name).Run(Path(run_dir), Identity(id))
        while line := lines.get():
            method, *arguments = json.loads(line)
            getattr(run, method)(*arguments)
        run.close()
    except BaseException as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        os._exit(1)  # at once: the client would wait for what it cannot send


if __name__ == "__main__":
    main()
