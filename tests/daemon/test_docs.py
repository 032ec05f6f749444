"""What scripts may rely on is documented, all of it."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
from dropforge.daemon.control import Action, Switch
from dropforge.daemon.names import JOB_FILE_NAMES
from dropforge.daemon.queue import FOLDERS, Ticket
from dropforge.daemon.states_page import states_page
from dropforge.errors import Reason
from dropforge.paths import DataRoot
from dropforge.states import State

ROOT = Path(__file__).resolve().parents[2]
CONTRACT = (ROOT / "docs" / "reference" / "folder-contract.md").read_text(encoding="utf-8")


def test_the_states_page_is_current() -> None:
    assert (ROOT / "docs" / "reference" / "states.md").read_text(encoding="utf-8") == states_page(), "run `make docs`"


def test_every_state_and_reason_has_its_line() -> None:
    page = states_page()
    for name in (*State, *Reason):
        assert f"| `{name}`" in page


@pytest.mark.parametrize("folder", sorted({*DataRoot.FOLDERS, *FOLDERS}))
def test_every_folder_is_in_the_contract(folder: str) -> None:
    assert f"`{folder}/" in CONTRACT


def section(title: str) -> str:
    return CONTRACT.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_every_control_file_is_in_the_contract_with_where_it_works() -> None:
    rows = dict(re.findall(r"^\| `(?:<id>\.)?([a-z]+)` \|([^|]*)\|", section("Asking something"), re.M))
    for action in Action:
        assert re.findall(r"`([a-z]+)`", rows[action]) == list(action.folders)
    assert set(Switch) <= set(rows)


def events_in_the_source() -> set[str]:
    """First arguments of all calls of `event`; a wrapper that passes its own argument on has no constant there."""
    calls = (
        node
        for path in (ROOT / "appliance" / "dropforge").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "event"
    )
    return {call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)}


def test_every_event_is_in_the_contract_and_none_is_invented() -> None:
    table = CONTRACT[CONTRACT.index("| action |") : CONTRACT.index("## Asking something")]
    assert set(re.findall(r"^\| `([a-z_]+)`", table, re.M)) == events_in_the_source()


def test_every_field_of_a_ticket_is_in_the_contract() -> None:
    for field in fields(Ticket):
        assert f"`{field.name}`" in CONTRACT


def test_names_of_specs_in_job_folders() -> None:
    assert JOB_FILE_NAMES == ("job.yaml", "job.yml", "job.json", "job.toml")
