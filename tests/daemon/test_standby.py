"""Two daemons, one data root: the second starts nothing, says why, and takes over; also where locks cannot be trusted."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from daemon_harness import FAKE_RUNNER, FAST, DaemonProcess, Harness, drop, places, spec_text, wait_until
from dropforge.daemon import standby
from dropforge.daemon.loop import Daemon
from dropforge.daemon.mounts import is_on_network, kind_of
from dropforge.daemon.process import ProcessId
from dropforge.daemon.singleton import Singleton, daemon_is_alive, read_heartbeat, write_heartbeat
from dropforge.daemon.standby import serve
from dropforge.errors import EnvironmentFault
from dropforge.files import read_json, regular_files, sha256_file, write_json
from dropforge.paths import DataRoot
from dropforge.spec_check import check


def snapshot(root: DataRoot) -> dict[str, str]:
    return {
        str(path.relative_to(root.path)): sha256_file(path)
        for path in regular_files(root.path)
        if path.name != "daemon.log"
    }


def make(root: DataRoot) -> Daemon:
    return Daemon(root, options=FAST, check=check, runner_command=FAKE_RUNNER)


def test_it_starts_nothing_and_writes_nothing_and_then_takes_over(root: DataRoot, caplog) -> None:
    """Two daemons on one root: test 18."""
    with Harness(root):
        drop(root, "job.yaml")
        before = snapshot(root)
        child = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM))
        child.start()
        assert serve(lambda: make(root), look_seconds=0.05) == 128 + signal.SIGTERM
        child.join()
        assert snapshot(root) == before
        assert places(root) == {}
    said = [record.message for record in caplog.records if "standing by" in record.message]
    assert len(said) == 1, "said once, not at every look"
    assert f"process {os.getpid()} on {os.uname().nodename}" in said[0] and "[daemon-running]" in said[0]


def test_it_takes_over_when_the_first_one_is_killed(root: DataRoot) -> None:
    first = DaemonProcess(root)
    wait_until(lambda: daemon_is_alive(root))
    threading.Timer(0.5, first.kill).start()
    threading.Timer(0.6, lambda: drop(root, "job.yaml", spec_text("after"))).start()
    ended = threading.Thread(
        target=lambda: wait_until(lambda: places(root).get("done")) or os.kill(os.getpid(), signal.SIGINT)
    )
    ended.start()
    assert serve(lambda: make(root), look_seconds=0.05) == 128 + signal.SIGINT
    ended.join()
    first.child.communicate()
    assert list(places(root)) == ["done"]


def test_another_fault_is_not_waited_out(root: DataRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby, "LOOK_SECONDS", 0.01)
    write_json(root.state / "layout.json", {"layout": 99, "dropforge": "9.9"})
    with pytest.raises(EnvironmentFault) as caught:
        serve(lambda: make(root))
    assert caught.value.code == "data-root-newer"


class OtherHost:
    """A daemon on another machine, whose lock this machine cannot see: it only beats."""

    def __init__(self, root: DataRoot, *, alive: bool) -> None:
        self.root, self.alive, self.seconds = root, alive, 0.0
        self.identity = ProcessId(pid=4711, start_time=1, boot_id="of another machine").as_json()
        self.beat("running")

    def beat(self, state: str) -> None:
        write_heartbeat(self.root, state=state, problems=[], running=[], queued=0)
        value = read_json(self.root.state / "daemon.json")
        write_json(self.root.state / "daemon.json",
                   {**value, "process": self.identity, "host": "elsewhere", "updated": f"at {self.seconds}"})  # fmt: skip

    def wait(self, seconds: float) -> None:
        self.seconds += seconds
        if self.alive and self.seconds % 5 == 0:
            self.beat("running")


def test_on_a_network_mount_a_living_heartbeat_refuses(root: DataRoot) -> None:
    other = OtherHost(root, alive=True)
    with pytest.raises(EnvironmentFault) as caught, Singleton(root, on_network=lambda root: True, wait=other.wait):
        pass
    assert caught.value.code == "daemon-running"
    assert "4711 on elsewhere" in str(caught.value)
    assert read_heartbeat(root)["process"] == other.identity, "its heartbeat was left alone"


def test_on_a_network_mount_a_dead_heartbeat_is_taken_over_after_its_time(root: DataRoot) -> None:
    other = OtherHost(root, alive=False)
    with Singleton(root, on_network=lambda root: True, wait=other.wait):
        assert 10 <= other.seconds <= 20
    other = OtherHost(root, alive=False)
    other.beat("stopped")
    with Singleton(root, on_network=lambda root: True, wait=other.wait):
        assert other.seconds <= 1, "it said that it stopped"


def test_on_a_network_mount_of_two_that_start_together_one_refuses(root: DataRoot) -> None:
    def wait(seconds: float) -> None:
        OtherHost(root, alive=False)  # it wrote its first beat a moment after ours

    with pytest.raises(EnvironmentFault), Singleton(root, on_network=lambda root: True, wait=wait):
        pass


MOUNTS = r"""22 1 0:21 / / rw - overlay overlay rw
30 22 0:30 / /data rw - ext4 /dev/sda1 rw
31 30 0:31 / /data/with\040space rw - nfs4 server:/x rw
32 30 0:32 / /data/share rw - fuse.sshfs host:/ rw
33 30 0:33 / /data/twice rw - nfs server:/y rw
34 30 0:34 / /data/twice rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("folder", "kind", "network"),
    [("/data/x/y", "ext4", False), ("/elsewhere", "overlay", False), ("/data/with space/a", "nfs4", True),
     ("/data/share", "fuse.sshfs", True), ("/data/twice", "tmpfs", False), ("/database", "overlay", False)],
)  # fmt: skip
def test_kinds_of_mounts(tmp_path: Path, folder: str, kind: str, network: bool) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(MOUNTS)
    assert kind_of(Path(folder), mountinfo=mountinfo) == kind
    assert is_on_network(Path(folder), mountinfo=mountinfo) is network


def test_a_lease_of_another_machine_is_not_believed(root: DataRoot) -> None:
    """The data root moved to another host: the pid in the lease is somebody else's here (test 19)."""
    drop(root, "long.yaml", spec_text("steps-40 delay-20 save-3"))
    with DaemonProcess(root) as daemon:
        wait_until(lambda: places(root).get("running") and root.run(places(root)["running"][0]).metrics.exists())
        run = root.run(places(root)["running"][0])
        os.kill(read_json(run.lease)["process"]["pid"], signal.SIGKILL)
        daemon.kill()
    bystander = ProcessId.of(os.getpid())
    assert bystander is not None
    lease = read_json(run.lease)
    write_json(run.lease, {**lease, "process": replace(bystander, boot_id="of the old host").as_json()})
    with Harness(root) as harness:  # it would have killed this very process
        harness.until_in("done")


def test_a_signal_at_any_moment_ends_it_with_its_status(root: DataRoot) -> None:
    """Also while a daemon is being made, before it listens itself."""

    def slow_to_make() -> Daemon:
        os.kill(os.getpid(), signal.SIGTERM)
        return make(root)

    assert serve(slow_to_make) == 128 + signal.SIGTERM
    assert not daemon_is_alive(root)
