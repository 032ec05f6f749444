from __future__ import annotations

import pytest
from dropforge.daemon.names import is_ignored, is_job_folder, is_spec_file, printable, slug


@pytest.mark.parametrize(
    "name",
    [".job.yaml", ".job.yaml.swp", "job.yaml~", "job.yaml.part", "job.yaml.crdownload", "job.yaml.tmp", "#job.yaml#",
     "job.yaml.filepart", "rsync.job.yaml", "~syncthing~job.yaml", ".job.yaml.Xa91bQ", "JOB.YAML.PART"],
)  # fmt: skip
def test_temporary_names_are_left_alone(name: str) -> None:
    assert is_ignored(name)


@pytest.mark.parametrize("name", ["job.yaml", "Job.YML", "a b.json", "x.toml", "party.yaml", "attempt.json"])
def test_job_names_are_taken(name: str) -> None:
    assert not is_ignored(name)
    assert is_spec_file(name)


def test_folder_ending_decides() -> None:
    assert is_job_folder("support.JOB")
    assert not is_job_folder("support")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Support Bot!.yaml", "support-bot"), ("ä.yaml", "job"), ("x" * 90 + ".yaml", "x" * 40), ("-rf.yaml", "rf")],
)
def test_slug(name: str, expected: str) -> None:
    assert slug(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a\nb", "a\\nb"), ("\x1b[31mred", "\\x1b[31mred"), ("a\u202eb", "a\\u202eb"), ("\udcff.yaml", "\\udcff.yaml"),
     ("a\u2028b", "a\\u2028b"), ("plain name é", "plain name é")],
)  # fmt: skip
def test_hostile_characters_are_shown_escaped(name: str, expected: str) -> None:
    assert printable(name) == expected
    printable(name).encode("utf-8")


def test_long_names_are_cut() -> None:
    assert len(printable("x" * 500)) == 120
