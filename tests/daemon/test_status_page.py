from __future__ import annotations

import json

import pytest
from daemon_harness import Harness, drop, spec_text, ticket
from dropforge.daemon import query
from dropforge.daemon.query import JobView
from dropforge.daemon.queue import put
from dropforge.daemon.scheduler import Waiting
from dropforge.daemon.status_page import QUEUE_LISTED, InboxEntry, Page, as_json, as_markdown, write_pages
from dropforge.files import read_json
from dropforge.paths import DataRoot
from dropforge.states import State


def page(**changes) -> Page:
    return Page(**{"daemon": "running", "problems": (), "inbox": (), "waiting": (), "jobs": (), **changes})


def test_an_idle_daemon_says_what_to_do() -> None:
    assert "Drop a job into inbox/" in as_markdown(page())


def test_everything_is_shown_in_its_section() -> None:
    jobs = [
        JobView(id="1-a", name="a", state=State.TRAINING, status={"step": 3, "total_steps": 9, "loss": 0.5, "eta_seconds": 240}),
        JobView(id="2-b", name="b", state=State.HELD, reason="disk", message="disk too small"),
        JobView(id="3-c", name="c", state=State.FAILED, reason="nan_loss", message="the loss became nan"),
    ]  # fmt: skip
    text = as_markdown(page(
        jobs=jobs, waiting=[(ticket(4), Waiting(kind="slot", text="another job runs"))], problems=["disk nearly full"],
        inbox=[InboxEntry(file="half.yaml", stage="unfinished", message="export is missing")],
    ))  # fmt: skip
    for part in ("step 3 of 9, loss 0.5000, about 4 min left", "Held", "disk too small", "the loss became nan",
                 "another job runs", "disk nearly full", "half.yaml", "export is missing"):  # fmt: skip
        assert part in text


def test_hostile_text_stays_text() -> None:
    job = JobView(id="1-a", name="a", state=State.FAILED, message="<script>|\x1b[31m`x`\n# heading")
    text = as_markdown(page(jobs=[job], inbox=[InboxEntry(file="a|b<c>", stage="settling")]))
    assert "<script>" not in text
    assert "\x1b" not in text
    assert "\n# heading" not in text
    assert "a\\|b&lt;c&gt;" in text


def test_a_long_queue_is_cut_and_counted() -> None:
    waiting = [(ticket(n), Waiting(kind="slot", text="x")) for n in range(1, QUEUE_LISTED + 6)]
    value = as_json(page(waiting=waiting))
    assert (len(value["queued"]), value["queued_more"]) == (QUEUE_LISTED, 5)
    assert "and 985 more" in as_markdown(page(waiting=waiting))
    json.dumps(value, allow_nan=False)


def test_a_full_inbox_is_cut_and_counted(harness: Harness) -> None:
    inbox = [InboxEntry(file=f"{number}.yaml", stage="settling") for number in range(30)]
    assert "and 10 more" in as_markdown(page(inbox=inbox))
    assert "and 15 more" in as_markdown(page(inbox=inbox, inbox_more=5))
    for number in range(QUEUE_LISTED + 5):
        (harness.root.inbox / f"{number:05}.yaml").touch()
    harness.tick()
    value = read_json(harness.root.queue_json)
    assert (len(value["inbox"]), value["inbox_more"]) == (QUEUE_LISTED, 5)
    assert value["inbox"][0]["file"] == "00000.yaml"


def test_a_long_queue_is_not_read_from_the_disk_for_it(root: DataRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1, 6):
        put(root, "queue", ticket(number))
    put(root, "held", ticket(6))
    opened: list[str] = []
    real = query.read
    monkeypatch.setattr(query, "read", lambda path: opened.append(path.parent.name) or real(path))
    waiting = [(ticket(number), Waiting(kind="slot", text="x")) for number in range(1, 6)]
    write_pages(root, daemon="running", problems=(), inbox=(), inbox_more=0, waiting=waiting)
    assert opened == ["held"]
    value = read_json(root.queue_json)
    assert (len(value["queued"]), len(value["held"])) == (5, 1)


def test_the_files_follow_the_daemon(harness: Harness) -> None:
    drop(harness.root, "half.yaml", "version: 1\n")
    harness.tick()
    harness.tick(3)
    value = read_json(harness.root.queue_json)
    assert value["daemon"] == "running"
    assert value["inbox"][0]["stage"] == "unfinished"
    assert "half.yaml" in harness.root.status_page.read_text()
    drop(harness.root, "good.yaml", spec_text("good"))
    harness.until_in("done")
    harness.tick(3)
    assert read_json(harness.root.queue_json)["ended"][0]["name"] == "good"
    assert read_json(harness.root.state / "daemon.json")["state"] == "running"
