"""Make elements.jsonl and elements.csv from the Elements Database (public domain).

    apt-get download dict-elements && dpkg-deb -x dict-elements_*.deb elements
    python examples/elements/build.py elements/usr/share/dictd/elements.dict.dz

Only the standard library. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

LAST = 103
"""Lawrencium. Later entries of the database carry provisional names (unnilquadium ...) that are no longer right."""

ENTRY = re.compile(r"^(?P<name>[a-z]+)\nSymbol: (?P<symbol>[A-Z][a-z]?)\nAtomic number: (?P<number>\d+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Element:
    name: str
    symbol: str
    number: int


def read_elements(path: Path) -> list[Element]:
    """The elements 1..LAST in order; ValueError when one is missing or a name, symbol or number appears twice."""
    with gzip.open(path, "rt", encoding="iso-8859-1") as stream:  # the database is older than UTF-8
        text = stream.read()
    found = [
        Element(name=match["name"], symbol=match["symbol"], number=int(match["number"]))
        for match in ENTRY.finditer(text)
    ]
    elements = sorted((element for element in found if element.number <= LAST), key=lambda element: element.number)
    if [element.number for element in elements] != list(range(1, LAST + 1)):
        raise ValueError(f"{path}: the elements 1 to {LAST} are not all there exactly once")
    if len({element.name for element in elements}) != LAST or len({element.symbol for element in elements}) != LAST:
        raise ValueError(f"{path}: a name or a symbol appears twice")
    return elements


def questions(element: Element) -> list[tuple[str, str]]:
    """Three questions with one right, short answer each."""
    name, symbol, number = element.name, element.symbol, str(element.number)
    return [
        (f"What is the chemical symbol of {name}?", symbol),
        (f"What is the atomic number of {name}?", number),
        (f"Which element has the symbol {symbol}?", name),
    ]


def write_chat(elements: list[Element], path: Path) -> int:
    """One conversation per line; returns the number of rows."""
    rows = [pair for element in elements for pair in questions(element)]
    if len({question for question, _ in rows}) != len(rows):
        raise ValueError("a question appears twice")
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for question, answer in rows:
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return len(rows)


def write_alpaca(elements: list[Element], path: Path) -> int:
    """The same facts as instruction, input, output; returns the number of rows."""
    rows = []
    for element in elements:
        rows.append(("Write the symbol of this element.", element.name, element.symbol))
        rows.append(("Write the name of the element with this symbol.", element.symbol, element.name))
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("instruction", "input", "output"))
        writer.writerows(rows)
    return len(rows)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Make elements.jsonl and elements.csv.")
    parser.add_argument("dictionary", type=Path, help="elements.dict.dz of Debian's package dict-elements")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    options = parser.parse_args(arguments)
    elements = read_elements(options.dictionary)
    for name, count in (
        ("elements.jsonl", write_chat(elements, options.out / "elements.jsonl")),
        ("elements.csv", write_alpaca(elements, options.out / "elements.csv")),
    ):
        print(f"{options.out / name}: {count} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
