"""watch: the daemon in the foreground. Logs to standard error; the first SIGTERM saves and ends, a second one kills.

Exit status: 0 after a drain, 143 after SIGTERM, 130 after Ctrl-C. So a supervisor that restarts on anything but 0 keeps
it down after a drain and brings it back after a stray signal.
"""

from __future__ import annotations

import logging
import sys
from argparse import Namespace

from dropforge.cli.output import data_root
from dropforge.daemon.loop import Daemon, DaemonOptions
from dropforge.daemon.standby import serve
from dropforge.hardware import probe
from dropforge.paths import DataRoot
from dropforge.schema import SCHEMA_FILE
from dropforge.settings import settings


def watch(arguments: Namespace) -> int:
    root = data_root(arguments, create=True)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"
    )
    copy_schema(root)
    options = daemon_options(root)
    return serve(lambda: Daemon(root, options=options))


def daemon_options(root: DataRoot, *, warm: bool = True) -> DaemonOptions:
    """What the settings and this machine's GPUs say."""
    chosen = settings()
    return DaemonOptions(
        poll_seconds=chosen.poll_seconds,
        settle_seconds=chosen.settle_seconds,
        grace_seconds=chosen.grace_seconds,
        stall_seconds=chosen.stall_seconds,
        memory_floor=int(chosen.memory_floor_mib * (1 << 20)),
        metrics_port=chosen.metrics_port,
        notify_url=chosen.notify_url,
        notify_format=chosen.notify_format,
        warm=warm,
        gpus=tuple(gpu.uuid for gpu in probe(root.path).gpus),
    )


def copy_schema(root: DataRoot) -> None:
    """Put the JSON Schema beside the data, so that editors can check specs while they are written."""
    from dropforge.files import write_bytes

    target, text = root.schema / SCHEMA_FILE.name, SCHEMA_FILE.read_bytes()
    if not target.exists() or target.read_bytes() != text:
        write_bytes(target, text)
