from __future__ import annotations

import http.client
import re
import socket
from dataclasses import replace

import pytest
from daemon_harness import FAST, Harness, drop, spec_text
from dropforge.daemon.metrics_page import Numbers, as_text
from dropforge.paths import DataRoot


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(port: int, path: str = "/metrics", host: str = "localhost") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", path, headers={"Host": host})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_every_line_is_in_the_format_and_hostile_labels_are_escaped() -> None:
    numbers = Numbers(jobs={"queue": 3}, ended={"succeeded": 2}, inbox=1, problems=0, disk_free=5, memory_available=None,
                      running=[{"id": 'a"b\\c\nd', "step": 4, "loss": 0.5, "eta_seconds": None, "epoch": "many"}])  # fmt: skip
    text = as_text(numbers)
    sample = re.compile(r'dropforge_[a-z_]+(\{[a-z]+="([^"\\\n]|\\.)*"\})? [0-9.e+-]+')
    for line in text.splitlines():
        assert line.startswith(("# HELP ", "# TYPE ")) or sample.fullmatch(line), line
    assert 'dropforge_jobs{folder="queue"} 3' in text
    assert 'dropforge_job_step{id="a\\"b\\\\c\\nd"} 4' in text
    assert "memory_available" not in text
    assert "job_epoch" not in text


def test_the_page_is_served_on_loopback_alone(root: DataRoot) -> None:
    port = free_port()
    with Harness(root, options=replace(FAST, metrics_port=port)) as harness:
        drop(root, "a.yaml", spec_text("plain"))
        harness.until_in("done")
        harness.tick(3, times=2)
        status, text = get(port)
        assert status == 200
        assert 'dropforge_jobs_ended_total{state="succeeded"} 1' in text
        assert re.search(r"^dropforge_disk_free_bytes [1-9]", text, re.M)
        assert get(port, "/")[0] == 404
        assert get(port, host="evil.example")[0] == 403
        listening = harness.daemon._metrics._server.server_address
        assert listening[0] == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        get(port)


def test_a_port_that_is_taken_is_a_problem_and_not_the_end(root: DataRoot) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with Harness(root, options=replace(FAST, metrics_port=taken.getsockname()[1])) as harness:
            assert any(message.startswith("metrics") for message in harness.daemon._faults.messages)
            drop(root, "a.yaml")
            harness.until_in("done")


def test_it_is_off_by_default(harness: Harness) -> None:
    assert not harness.daemon._metrics.on
