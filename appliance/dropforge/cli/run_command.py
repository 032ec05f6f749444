"""run: one job in the foreground, through the same queue as every other job, with a progress bar.

When a daemon serves the data root already, the job is handed to it; otherwise this process serves the root for this one
job. Ctrl-C saves a checkpoint; the job then waits in the queue and goes on with the next `dropforge watch` or `run`.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from dropforge.cli.follow import Follower, exit_status, follow
from dropforge.cli.output import data_root, emit
from dropforge.cli.queue_commands import as_json, describe, put_into_inbox, wait_for_id
from dropforge.daemon.query import JobView, find_job, list_jobs
from dropforge.daemon.singleton import daemon_is_alive
from dropforge.paths import DataRoot
from dropforge.states import State


def run(arguments: Namespace) -> int:
    root = data_root(arguments, create=True)
    dropped = put_into_inbox(root, arguments.spec)
    if daemon_is_alive(root):
        print("a daemon serves this data root; handing the job to it", file=sys.stderr)
        job = follow(root, wait_for_id(root, dropped, seconds=60).id)
    else:
        job = _serve_one(root, dropped)
    emit(arguments, as_json(root, job), describe(root, job))
    return exit_status(job.state)


def _serve_one(root: DataRoot, dropped: Path) -> JobView:
    """Serve the root until the job made from `dropped` has ended. Other jobs stay where they are."""
    from dropforge.cli.watch_command import daemon_options
    from dropforge.daemon.loop import Daemon

    options = replace(daemon_options(root, warm=False), only_file=dropped.name)
    with Daemon(root, options=options) as daemon, Follower() as show:
        shown: list[JobView] = []

        def look() -> bool:
            """True once there is nothing left to do."""
            jobs = [job for job in list_jobs(root, ended=10) if job.file == dropped.name]
            if jobs:
                shown[:] = jobs
                show.update(jobs[-1])
            return bool(jobs) and (jobs[-1].state.ended or jobs[-1].state is State.HELD)

        daemon.run(until=look)
    return find_job(root, shown[-1].id)
