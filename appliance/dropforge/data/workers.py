"""Processes that turn batches of rows into tokens, in order. A worker that dies is named, and its batch done here."""

from __future__ import annotations

import multiprocessing
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.connection import Connection
from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING, Any

from dropforge.data.process import Batch, Counts, RowProcessor, Work
from dropforge.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Result = tuple[Batch, Counts]
START_AFTER_ROWS = 100_000
"""Smaller files are done before a worker has imported its libraries."""
THREADS = 2
"""In this process; tokenizers let other threads run while they work."""
MIN_CPUS = 4
"""With fewer the threads use them all, and processes would only add to the work."""
MAX_WORKERS = 8
BYTES_PER_WORKER = 1 << 30
AHEAD = 3
"""Batches a worker has waiting."""


def worker_count(cpus: int, *, free_bytes: int) -> int:
    """One per CPU, at most 8, and at most half of the free memory at 1 GiB each; 1 means: no processes."""
    if cpus < MIN_CPUS:
        return 1
    return max(1, min(cpus, MAX_WORKERS, free_bytes // 2 // BYTES_PER_WORKER))


@dataclass(kw_only=True)
class _Worker:
    """A process, its pipe and the batches it was given, oldest first."""

    number: int
    process: Any
    pipe: Connection
    waiting: deque[int]


class RowPool:
    """Processes rows with one tokenizer: the first ones here, more of them in `workers` processes."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, workers: int, warn: Callable[[str], None], after: int | None = None
    ) -> None:
        self.local = RowProcessor(tokenizer)
        self._tokenizer = tokenizer
        self._wanted = workers
        self._warn = warn
        self._after = START_AFTER_ROWS if after is None else after
        self._workers: list[_Worker] = []

    def run(self, batches: Iterable[Sequence[Row]], work: Work) -> Iterator[Result]:
        """One result per batch, in the order of the batches. Raises DataError as `RowProcessor.process` does."""
        source = iter(batches)
        yield from self._threaded(source, work)
        following = next(source, None)
        if following is not None:
            self._start()
            yield from self._parallel(chain([following], source), work)

    def _threaded(self, source: Iterator[Sequence[Row]], work: Work) -> Iterator[Result]:
        """The first batches, in this process: the tokenizer works on one while Python prepares the next."""
        here = 0
        waiting: deque[Future[Result]] = deque()
        with ThreadPoolExecutor(THREADS, thread_name_prefix="dropforge-data") as threads:
            for batch in source:
                waiting.append(threads.submit(self.local.process, batch, work))
                here += len(batch)
                if len(waiting) > THREADS:
                    yield waiting.popleft().result()
                if here >= self._after and self._wanted > 1:
                    break
            while waiting:
                yield waiting.popleft().result()

    def _parallel(self, batches: Iterable[Sequence[Row]], work: Work) -> Iterator[Result]:
        source = enumerate(batches)
        given: dict[int, Sequence[Row]] = {}
        turns: deque[tuple[int, _Worker | None]] = deque()
        while True:
            room = max(1, len(self._workers) * AHEAD) - len(turns)
            for number, batch in islice(source, max(0, room)):
                given[number] = batch
                turns.append((number, self._give(number, batch, work)))
            if not turns:
                return
            number, worker = turns.popleft()
            batch = given.pop(number)
            yield self._take(worker, number) or self.local.process(batch, work)

    def _give(self, number: int, batch: Sequence[Row], work: Work) -> _Worker | None:
        """Send a batch to the worker with the least to do; None when there is no worker left."""
        while self._workers:
            worker = min(self._workers, key=lambda one: len(one.waiting))
            try:
                worker.pipe.send_bytes(pickle.dumps((batch, work), protocol=pickle.HIGHEST_PROTOCOL))
            except OSError:
                self._lost(worker)
                continue
            worker.waiting.append(number)
            return worker
        return None

    def _take(self, worker: _Worker | None, number: int) -> Result | None:
        """The result of batch `number`; None when its worker is gone or met an error, which is then met here again."""
        if worker is None or number not in worker.waiting:
            return None
        try:
            result: Result | None = pickle.loads(worker.pipe.recv_bytes())
        except (EOFError, OSError):
            self._lost(worker)
            return None
        worker.waiting.popleft()
        return result

    def _lost(self, worker: _Worker) -> None:
        worker.process.join(timeout=5)
        code = worker.process.exitcode
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
        rows = f"{len(worker.waiting)} batches" if worker.waiting else "no batch"
        self._warn(
            f"data worker {worker.number} (process {worker.process.pid}) was {how}; {rows} of it are done again in "
            "this process. Signal 9 usually means that memory ran out"
        )
        worker.pipe.close()
        worker.waiting.clear()
        self._workers.remove(worker)

    def _start(self) -> None:
        if self._workers:
            return
        context = multiprocessing.get_context("spawn")
        content = pickle.dumps(self._tokenizer, protocol=pickle.HIGHEST_PROTOCOL)
        for number in range(1, self._wanted + 1):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), name=f"dropforge-data-{number}", daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(number=number, process=process, pipe=ours, waiting=deque()))
            ours.send_bytes(content)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.pipe.close()
            worker.process.join(timeout=5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers = []

    def __enter__(self) -> RowPool:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def _work(pipe: Connection) -> None:
    """A worker's life: a tokenizer, then batches until the pipe closes. None says: do this one yourself."""
    from dropforge.errors import DropforgeError

    processor = RowProcessor(pickle.loads(pipe.recv_bytes()))
    given: Queue[bytes | None] = Queue()
    # The pipe is emptied beside the work: were it full while this process sends a result, both sides would wait.
    Thread(target=_receive, args=(pipe, given), daemon=True).start()
    while (content := given.get()) is not None:
        batch, work = pickle.loads(content)
        try:
            result: Result | None = processor.process(batch, work)
        except DropforgeError:
            result = None  # the parent meets it again and raises it with its rows
        pipe.send_bytes(pickle.dumps(result, protocol=pickle.HIGHEST_PROTOCOL))


def _receive(pipe: Connection, given: Queue[bytes | None]) -> None:
    try:
        while True:
            given.put(pipe.recv_bytes())
    except (EOFError, OSError):
        given.put(None)
