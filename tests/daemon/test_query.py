from __future__ import annotations

import pytest
from daemon_harness import ticket
from dropforge.daemon.crash_points import ignore
from dropforge.daemon.query import find_job, list_jobs
from dropforge.daemon.queue import put
from dropforge.daemon.rejection import reject
from dropforge.errors import CommandError, Problem, SpecError
from dropforge.events import RunLog
from dropforge.files import write_json
from dropforge.paths import DataRoot
from dropforge.states import State


def place(root: DataRoot, number: int, folder: str, *, state: State | None = None, name: str = "job", **fields) -> str:
    made = ticket(number, id=f"{number:06d}-{name}-0000000{number}", name=name, slug=name)
    put(root, folder, made)
    root.run(made.id).path.mkdir(parents=True)
    if state is not None:
        RunLog(root.run(made.id)).state(state, **fields)
    return made.id


def test_jobs_are_listed_in_order_with_their_status(root: DataRoot) -> None:
    second = place(root, 2, "running", state=State.TRAINING, step=7, attempt=1)
    first = place(root, 1, "done", state=State.SUCCEEDED)
    (root.inbox / "bad.yaml").write_text("x")
    error = SpecError.of([Problem(code="spec-x", what="it is bad")])
    reject(root, "bad.yaml", error, job_id="000003-bad-00000003", crash=ignore)
    jobs = list_jobs(root, alive=True)
    assert [(job.id, job.state) for job in jobs] == [
        (first, State.SUCCEEDED), (second, State.TRAINING), ("000003-bad-00000003", State.REJECTED),
    ]  # fmt: skip
    assert jobs[1].status["step"] == 7
    assert jobs[2].message == "it is bad"
    assert list_jobs(root, ended=0, alive=True) == [jobs[1]]
    assert list_jobs(root, ended=1, alive=True) == jobs[1:]


def test_the_place_of_the_ticket_wins_over_status(root: DataRoot) -> None:
    place(root, 1, "failed", state=State.TRAINING)
    place(root, 2, "queue", state=State.INTERRUPTED, reason="shutdown")
    place(root, 3, "held")
    write_json(root.run(place(root, 4, "done")).status, ["not", "a", "status"])
    root.run(place(root, 5, "queue")).status.write_text("{torn")
    assert [job.state for job in list_jobs(root)] == [
        State.FAILED, State.INTERRUPTED, State.HELD, State.SUCCEEDED, State.QUEUED,
    ]  # fmt: skip


def test_a_running_job_that_was_asked_to_stop_is_cancelling(root: DataRoot) -> None:
    job_id = place(root, 1, "running", state=State.TRAINING)
    root.run(job_id).attempt(1).mkdir(parents=True)
    write_json(root.run(job_id).attempt(1) / "stop.json", {"reason": "user"})
    assert list_jobs(root, alive=True)[0].state is State.CANCELLING


def test_result_and_waiting_for(root: DataRoot) -> None:
    done, queued = place(root, 1, "done", state=State.SUCCEEDED), place(root, 2, "queue", state=State.QUEUED)
    root.result("job", done).path.mkdir(parents=True)
    write_json(root.queue_json, {"queued": [{"id": queued, "waiting_for": "another job runs"}]})
    jobs = list_jobs(root)
    assert jobs[0].result == root.result("job", done).path
    assert jobs[1].waiting_for == "another job runs"


def test_find_by_id_number_prefix_and_name(root: DataRoot) -> None:
    first = place(root, 1, "done", name="alpha")
    newest = place(root, 2, "queue", name="alpha")
    other = place(root, 13, "failed", name="beta")
    assert find_job(root, first).id == first
    assert find_job(root, "000002").id == newest
    assert find_job(root, "2").id == newest
    assert find_job(root, "alpha").id == newest
    assert find_job(root, other[:9]).id == other


@pytest.mark.parametrize(("text", "code"), [("0000", "job-ambiguous"), ("nobody", "job-unknown"), ("", "job-unknown")])
def test_what_fits_no_job_or_several(root: DataRoot, text: str, code: str) -> None:
    place(root, 1, "done")
    place(root, 2, "done", name="other")
    with pytest.raises(CommandError) as caught:
        find_job(root, text)
    assert caught.value.code == code


def test_an_empty_or_missing_data_root_has_no_jobs(root: DataRoot) -> None:
    assert list_jobs(root) == []
    assert list_jobs(DataRoot(root.path / "nowhere")) == []
