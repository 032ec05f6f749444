"""A data worker's life: a processor, then blocks of rows until the pipe closes. Started by workers.py as a program.

It is not a fork (the process it serves has threads) and not a process of `multiprocessing` (which would run the user's
script again to find its way): a fresh interpreter that imports what rows need and nothing else.
"""

from __future__ import annotations

import gc
import os
import pickle
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import Queue
from threading import Thread

READY = b"ready"


def main(descriptor: int) -> None:
    """Serve the pipe `descriptor`. A result of None says: do this block yourself."""
    # One worker per CPU: threads inside one would only wait for each other.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pipe = Connection(descriptor)
    with suppress(EOFError, OSError):  # the process that is served has ended, or needs this one no more
        _serve(pipe)


def _serve(pipe: Connection) -> None:
    from dropforge.errors import DropforgeError

    processor = pickle.loads(pipe.recv_bytes())
    gc.freeze()  # what lives as long as the worker need not be looked through again and again
    pipe.send_bytes(READY)
    given: Queue[bytes | None] = Queue()
    # The pipe is emptied beside the work: were it full while this process sends a result, both sides would wait.
    Thread(target=_receive, args=(pipe, given), daemon=True).start()
    while (content := given.get()) is not None:
        block, work = pickle.loads(content)
        try:
            result = processor.process(block.rows(), work)
        except DropforgeError:
            result = None  # the parent meets it again and raises it with its rows
        pipe.send_bytes(pickle.dumps(result, protocol=pickle.HIGHEST_PROTOCOL))


def _receive(pipe: Connection, given: Queue[bytes | None]) -> None:
    try:
        while True:
            given.put(pipe.recv_bytes())
    except (EOFError, OSError):
        given.put(None)
