"""Processes that turn blocks of rows into tokens, in order. A worker that dies is named, and its blocks done here."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from dropforge.data.blocks import Block
from dropforge.data.process import Batch, Counts, RowProcessor, Work
from dropforge.data.worker import READY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Result = tuple[Batch, Counts]
START_AFTER_ROWS = 20_000
"""Smaller files are done before a worker has imported its libraries."""
THREADS = 2
"""In this process; tokenizers let other threads run while they work."""
MAX_WORKERS = 8
BYTES_PER_WORKER = 1 << 30
AHEAD = 3
"""Blocks a worker has waiting."""


def worker_count(cpus: int, *, free_bytes: int) -> int:
    """One per CPU, at most 8, and at most half of the free memory at 1 GiB each; 1 means: no processes."""
    return max(1, min(cpus, MAX_WORKERS, free_bytes // 2 // BYTES_PER_WORKER))


@dataclass(kw_only=True)
class _Worker:
    """A process, its pipe and the blocks it was given, oldest first."""

    number: int
    process: subprocess.Popen[bytes]
    pipe: Connection
    waiting: deque[int]
    ready: bool = False


class RowPool:
    """Processes rows with one tokenizer: here until `workers` processes are there to do it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, workers: int, warn: Callable[[str], None], after: int | None = None
    ) -> None:
        self.local = RowProcessor(tokenizer)
        self._wanted = workers if workers > 1 else 0
        self._warn = warn
        self._after = START_AFTER_ROWS if after is None else after
        self._done = 0
        self._workers: list[_Worker] = []

    def run(self, blocks: Iterable[Block], work: Work) -> Iterator[Result]:
        """One result per block, in the order of the blocks. Raises DataError as `RowProcessor.process` does."""
        source = iter(blocks)
        yield from self._here(source, work)
        yield from self._there(source, work)

    def _process(self, block: Block, work: Work) -> Result:
        return self.local.process(block.rows(), work)

    def _here(self, source: Iterator[Block], work: Work) -> Iterator[Result]:
        """Blocks done in this process: the tokenizer works on one while Python prepares the next."""
        waiting: deque[Future[Result]] = deque()
        with ThreadPoolExecutor(THREADS, thread_name_prefix="dropforge-data") as threads:
            while not self._some_ready():
                block = next(source, None)
                if block is None:
                    break
                waiting.append(threads.submit(self._process, block, work))
                if len(waiting) > THREADS:
                    yield self._counted(waiting.popleft().result())
            while waiting:
                yield self._counted(waiting.popleft().result())

    def _counted(self, result: Result) -> Result:
        self._done += result[1].read
        if self._wanted and self._done >= self._after:
            self._start()
        return result

    def _some_ready(self) -> bool:
        """Whether a worker can be given blocks; hears of those that got so far, and of those that died before."""
        for worker in list(self._workers):
            try:
                if not worker.ready and worker.pipe.poll():
                    worker.ready = worker.pipe.recv_bytes() == READY
            except (EOFError, OSError):
                self._lost(worker)
        return any(worker.ready for worker in self._workers)

    def _there(self, source: Iterator[Block], work: Work) -> Iterator[Result]:
        numbered = enumerate(source)
        given: dict[int, Block] = {}
        turns: deque[tuple[int, _Worker | None]] = deque()
        while True:
            self._some_ready()
            room = max(1, sum(worker.ready for worker in self._workers) * AHEAD) - len(turns)
            for number, block in islice(numbered, max(0, room)):
                given[number] = block
                turns.append((number, self._give(number, block, work)))
            if not turns:
                return
            number, worker = turns.popleft()
            block = given.pop(number)
            yield self._take(worker, number) or self._process(block, work)

    def _give(self, number: int, block: Block, work: Work) -> _Worker | None:
        """Send a block to the worker with the least to do; None when there is no worker left."""
        while ready := [worker for worker in self._workers if worker.ready]:
            worker = min(ready, key=lambda one: len(one.waiting))
            try:
                worker.pipe.send_bytes(pickle.dumps((block, work), protocol=pickle.HIGHEST_PROTOCOL))
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
        code = _ended(worker.process)
        how = f"killed by signal {-code}" if code < 0 else f"ended with status {code}"
        rows = f"{len(worker.waiting)} blocks of rows" if worker.waiting else "no rows"
        self._warn(
            f"data worker {worker.number} (process {worker.process.pid}) was {how}; {rows} of it are done again in "
            "this process. Signal 9 usually means that memory ran out"
        )
        worker.pipe.close()
        worker.waiting.clear()
        self._workers.remove(worker)

    def _start(self) -> None:
        wanted, self._wanted = self._wanted, 0  # once; those that die are not replaced
        if not wanted:
            return
        content = pickle.dumps(self.local, protocol=pickle.HIGHEST_PROTOCOL)
        for number in range(1, wanted + 1):
            ours, theirs = Pipe()
            descriptor = theirs.fileno()
            command = [sys.executable, "-P", "-c", f"from dropforge.data.worker import main; main({descriptor})"]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(descriptor,))
            theirs.close()
            worker = _Worker(number=number, process=process, pipe=ours, waiting=deque())
            self._workers.append(worker)
            try:
                ours.send_bytes(content)
            except OSError:
                self._lost(worker)

    def close(self) -> None:
        """End the workers, which keep nothing that could be lost."""
        for worker in self._workers:
            worker.pipe.close()
            worker.process.kill()
            worker.process.wait()
        self._workers = []

    def __enter__(self) -> RowPool:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def _ended(process: subprocess.Popen[bytes]) -> int:
    """Exit status of a worker whose pipe is closed; killed when it does not end by itself."""
    try:
        return process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
