from __future__ import annotations

import pytest
from daemon_harness import ticket
from dropforge.daemon.control import Action, Switch, is_on, pending, request, set_switch
from dropforge.daemon.queue import put
from dropforge.errors import CommandError
from dropforge.paths import DataRoot


@pytest.mark.parametrize("action", list(Action))
def test_a_request_is_one_file_that_pending_reads(root: DataRoot, action: Action) -> None:
    put(root, action.folders[0], ticket())
    path = request(root, ticket().id, action.value, priority=80 if action is Action.PRIORITY else None)
    assert path == root.control / f"{ticket().id}.{action}"
    (found,), meaningless = pending(root)
    assert (found.job_id, found.action, meaningless) == (ticket().id, action, [])
    assert found.number == (80 if action is Action.PRIORITY else None)


@pytest.mark.parametrize(
    ("job_id", "action", "priority", "code"),
    [("000001-job-00000000", "explode", None, "action-unknown"), ("nobody", "cancel", None, "job-unknown"),
     ("../../etc/passwd", "cancel", None, "job-unknown"), ("000001-job-00000000", "retry", None, "action-impossible"),
     ("000001-job-00000000", "priority", None, "action-value"), ("000001-job-00000000", "priority", 101, "action-value")],
)  # fmt: skip
def test_impossible_requests_are_refused_before_anything_is_written(
    root: DataRoot, job_id, action, priority, code
) -> None:
    put(root, "queue", ticket())
    with pytest.raises(CommandError) as caught:
        request(root, job_id, action, priority=priority)
    assert caught.value.code == code
    assert list(root.control.iterdir()) == []


def test_files_that_mean_nothing_are_told_apart(root: DataRoot) -> None:
    put(root, "queue", ticket())
    for name in ("nobody.cancel", f"{ticket().id}.explode", "README"):
        (root.control / name).touch()
    (root.control / f"{ticket().id}.priority").write_text("high")
    (root.control / "link.cancel").symlink_to("/etc/passwd")
    requests, meaningless = pending(root)
    assert requests == []
    assert len(meaningless) == 5


def test_switches(root: DataRoot) -> None:
    for switch in Switch:
        assert not is_on(root, switch)
        set_switch(root, switch, on=True)
        assert is_on(root, switch)
        assert pending(root) == ([], [])
        set_switch(root, switch, on=False)
        set_switch(root, switch, on=False)
        assert not is_on(root, switch)
