"""EPUB books: one row per chapter, as plain text in reading order, with the standard library alone.

A book is a ZIP file; META-INF/container.xml names the package file, whose spine lists the chapters (EPUB 3.3).
"""

from __future__ import annotations

import posixpath
import re
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

from dropforge.data.rows import Row
from dropforge.errors import DataError

MAX_CHAPTER_BYTES = 200_000_000
"""A chapter that unpacks to more is refused: such files are made to fill memory."""
_BLOCKS = {
    "p", "div", "br", "h1", "h2", "h3", "h4", "h5", "h6", "li", "tr", "blockquote", "section", "article", "pre", "hr",
}  # fmt: skip
_SILENT = {"script", "style", "head", "template"}


def read_epub(path: Path, file: str) -> Iterator[Row]:
    """Rows with the columns `text` and `chapter` (the file inside the book). Raises DataError data-parse."""
    try:
        with zipfile.ZipFile(path) as book:
            number = 0
            for name in _spine(book, file):
                text = _text(_member(book, name, file).decode("utf-8", errors="replace"))
                if text:
                    number += 1
                    yield Row(file=file, number=number, fields={"text": text, "chapter": name})
    except (zipfile.BadZipFile, KeyError, OSError, ElementTree.ParseError, RuntimeError) as error:
        raise _broken(file, str(error)) from error


def _spine(book: zipfile.ZipFile, file: str) -> list[str]:
    """Names of the chapters inside the ZIP file, in reading order."""
    container = _xml(_member(book, "META-INF/container.xml", file), file)
    package_name = next((item.get("full-path") for item in container.iter() if _tag(item) == "rootfile"), None)
    if package_name is None:
        raise _broken(file, "META-INF/container.xml names no package")
    package = _xml(_member(book, package_name, file), file)
    if any(name.endswith("encryption.xml") for name in book.namelist()) and "rights.xml" in str(book.namelist()):
        raise _broken(file, "the book is encrypted")
    items = {item.get("id"): item for item in package.iter() if _tag(item) == "item"}
    chapters = []
    for reference in package.iter():
        item = items.get(reference.get("idref")) if _tag(reference) == "itemref" else None
        if item is not None and "html" in (item.get("media-type") or ""):
            href = unquote(item.get("href") or "")
            chapters.append(posixpath.normpath(posixpath.join(posixpath.dirname(package_name), href)))
    return chapters


def _member(book: zipfile.ZipFile, name: str, file: str) -> bytes:
    if book.getinfo(name).file_size > MAX_CHAPTER_BYTES:
        raise _broken(file, f"{name} unpacks to more than {MAX_CHAPTER_BYTES // 10**6} MB")
    return book.read(name)


def _xml(content: bytes, file: str) -> ElementTree.Element:
    if b"<!ENTITY" in content:
        raise _broken(file, "its XML defines entities, which books do not need and which can fill memory")
    return ElementTree.fromstring(content)


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


class _Chapter(HTMLParser):
    """Collects text; block elements end a paragraph."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent += tag in _SILENT
        if tag in _BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self._silent = max(0, self._silent - (tag in _SILENT))
        if tag in _BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.parts.append(re.sub(r"\s+", " ", data))


def _text(html: str) -> str:
    chapter = _Chapter()
    chapter.feed(html)
    chapter.close()
    paragraphs = (paragraph.strip() for paragraph in "".join(chapter.parts).split("\n\n"))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _broken(file: str, why: str) -> DataError:
    return DataError(
        f"{file} cannot be read", code="data-parse", where=file, why=f"not an EPUB book, or damaged: {why}",
        fix="convert it to .txt",
    )  # fmt: skip
