"""Work on numbered parts by several processes of this machine.

    a rank  --- the job, its progress --->  an overseer  --- numbers --->  workers, forked by it

The overseer is a process of its own because a rank, which has threads and GPUs open, must not fork. It imports what the job needs
once, no torch among it, and workers share that memory. Each worker makes whole parts, in order.

Nothing outlives the rank: the overseer ends when its connection to the rank is closed, by whatever end, and the kernel ends the
workers with the overseer. Signals are the rank's to hear: the processes here have them blocked.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from liftdist import environment, processes, signals, start
from liftdist.errors import UserError

_LOOK = 0.5  # seconds between two reports of progress
_PATIENCE = 10.0  # seconds for which an overseer may take to end
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")

Beat = Callable[[int], None]  # called at any sign of progress, with the number of records made since the last call


class Job(Protocol):
    """Numbered parts to make. Pickled for other processes."""

    def is_made(self, number: int) -> bool: ...

    def make(self, number: int, beat: Beat) -> None: ...

    def close(self) -> None:
        """Remove what is not complete."""


class Unfit(Exception):
    """The job cannot be handed to other processes."""


def for_each_rank() -> int:
    """How many processes each rank of this machine may have: its share of the cores."""
    cores = processes.cores()
    if environment.LOGS.is_set():  # a job of one task a node, which SLURM may not have bound to its cores
        cores = min(cores, environment.SLURM_CPUS_PER_TASK.get(cores))
    return max(1, cores // environment.LOCAL_WORLD_SIZE.get(1))


def run(job: Job, numbers: Sequence[int], count: int, beat: Beat) -> None:
    """Make the parts ``numbers``, in order, by ``count`` processes. Those that others have made meanwhile are left out.

    Args:
        beat: called whenever there is progress, with the records made in parts that are not complete.

    Raises:
        Unfit: nothing has been made.
        UserError: the first that a part raised, in the order of ``numbers``; or memory has run out.
        RuntimeError: a bug, with its traceback; what ``beat`` raised.
    """
    ours, theirs = multiprocessing.Pipe()
    try:
        with signals.blocked():
            overseer = subprocess.Popen(
                [sys.executable, "-P", start.__file__, __name__, str(theirs.fileno())],
                env={**os.environ, **_ONE_THREAD, "TOKENIZERS_PARALLELISM": "false", "PYTHONUTF8": "1"},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        theirs.close()
        try:
            _converse(ours, (job, list(numbers), count), overseer, beat)
        finally:
            ours.close()  # by which the overseer ends
            with contextlib.suppress(subprocess.TimeoutExpired):
                overseer.wait(_PATIENCE)
            overseer.kill()
            overseer.wait()
    finally:
        theirs.close()
        ours.close()


def _converse(connection: Connection, work: object, overseer: subprocess.Popen[bytes], beat: Beat) -> None:
    def lost() -> Exception:
        return _death(overseer.wait())  # it closes its end of the connection by ending

    try:
        connection.send(sys.path)
        connection.send(work)
    except ConnectionError:
        raise lost() from None
    except Exception as error:  # pickle raises errors of many kinds
        raise Unfit(f"{type(error).__name__}: {error}") from None
    while True:
        try:
            message = connection.recv()
        except (EOFError, ConnectionError):
            raise lost() from None
        if message is None:
            return
        if isinstance(message, Exception):
            raise message
        beat(message)


def _bug(error: Exception) -> RuntimeError:
    text = "".join(traceback.format_exception(error))
    return RuntimeError(f"{type(error).__name__}: {error} (in a process that tokenises)\n{text}")


def _death(code: int) -> Exception:
    """What to raise for a process that has ended with ``code``, negative for a signal."""
    if code == -signal.SIGKILL:
        return UserError(
            "a process that tokenises was killed by SIGKILL, as the kernel does when memory runs out; the same command goes on "
            "with the parts that are missing: give it more memory, or fewer cores (taskset --cpu-list 0-3)"
        )
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return RuntimeError(f"a process that tokenises ended with {how}")


# ---------------------------------------------------------------------------------------------------------------------
# The overseer.


@dataclass
class _Worker:
    pid: int
    connection: Connection
    tally: memoryview  # of all of its parts: records made, and beats
    before: int = 0  # records that it had made before its newest part


def main() -> None:
    """Entry point of the overseer."""
    rank = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, ConnectionError):  # the rank has ended
        sys.path[:] = rank.recv()
        try:
            job, numbers, count = rank.recv()
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            rank.send(Unfit(f"{type(error).__name__}: {error}"))
            return
        workers: list[_Worker] = []
        try:
            gc.collect()
            gc.freeze()  # memory that workers share is not touched by their collectors
            tallies = memoryview(mmap.mmap(-1, 16 * count)).cast("q")
            for index in range(min(count, len(numbers))):
                workers.append(_fork(job, tallies[2 * index : 2 * index + 2], rank))
            _oversee(rank, job, numbers, workers)
        except ConnectionError:
            raise
        except Exception as error:
            rank.send(error if isinstance(error, UserError | RuntimeError) else _bug(error))
        finally:
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)
            for worker in workers:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(worker.pid, 0)
            job.close()


def _fork(job: Job, tally: memoryview, rank: Connection) -> _Worker:
    parent = os.getpid()
    ours, theirs = multiprocessing.Pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            processes.die_with_parent(parent)
            rank.close()
            ours.close()
            _work(theirs, job, tally)
            code = 0
        finally:
            os._exit(code)
    theirs.close()
    return _Worker(pid, ours, tally)


def _work(overseer: Connection, job: Job, tally: memoryview) -> None:
    """In a worker: make parts as they are asked for."""

    def beat(made: int) -> None:
        tally[0] += made
        tally[1] += 1

    while True:
        number = overseer.recv()
        try:
            job.make(number, beat)
            overseer.send(None)
        except UserError as error:
            overseer.send(UserError(str(error)))
        except Exception as error:
            overseer.send(_bug(error))


def _oversee(rank: Connection, job: Job, numbers: Sequence[int], workers: Sequence[_Worker]) -> None:
    """Hand out parts until all are made, or all before the first that failed."""
    idle, busy = list(workers), dict[Any, tuple[_Worker, int]]()  # busy: by connection, with the place of the part
    failed: dict[int, Exception] = {}  # by place in ``numbers``
    place, seen, reported = 0, 0, float("-inf")
    while True:
        while idle and place < len(numbers) and not failed:
            if not job.is_made(numbers[place]):
                worker = idle.pop()
                worker.before = worker.tally[0]
                try:
                    worker.connection.send(numbers[place])
                except OSError:
                    raise _death_of(worker) from None
                busy[worker.connection] = worker, place
            place += 1
        if not any(at < min(failed, default=place) for _, at in busy.values()):
            break
        ready = wait([rank, *busy], _LOOK)
        if rank in ready:  # it says nothing any more, so it has ended
            return
        for connection in ready:
            worker, at = busy.pop(connection)
            try:
                if (answer := worker.connection.recv()) is not None:
                    failed[at] = answer
            except (EOFError, OSError):
                raise _death_of(worker) from None
            idle.append(worker)
        beats = sum(worker.tally[1] for worker in workers)
        if beats != seen and time.monotonic() - reported > _LOOK:
            seen, reported = beats, time.monotonic()
            rank.send(sum(worker.tally[0] - worker.before for worker, _ in busy.values()))
    rank.send(failed[min(failed)] if failed else None)


def _death_of(worker: _Worker) -> Exception:
    return _death(os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1]))


if __name__ == "__main__":
    from liftdist.data import workers  # whose classes have the names by which the rank knows them

    workers.main()
