"""Pages of Markdown as tests read them: fenced blocks, the commands in them, tables and links."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple


class Block(NamedTuple):
    """A fenced block of a page, without its indentation."""

    language: str
    lines: list[str]

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)


@dataclass(frozen=True)
class Page:
    """One file."""

    path: Path

    @property
    def text(self) -> str:
        return self.path.read_text("utf-8")

    def blocks(self) -> list[Block]:
        """In order."""
        found = re.findall(r"^( *)```(\w+)\n(.*?)^ *```$", self.text, re.DOTALL | re.MULTILINE)
        return [
            Block(language, [line.removeprefix(indent) for line in body.splitlines()])
            for indent, language, body in found
        ]

    def of(self, language: str) -> list[str]:
        """The texts of the blocks of a language."""
        return [block.text for block in self.blocks() if block.language == language]

    def words(self, program: str) -> list[list[str]]:
        """Every command of a program in a bash block, as words after its name, up to where its output goes."""
        lines = (shlex.split(line, comments=True) for text in self.of("bash") for line in text.splitlines())
        return [
            list(takewhile(lambda word: word not in (">", "|"), line[1:])) for line in lines if line[:1] == [program]
        ]

    def links(self) -> list[str]:
        """Where its links lead that are relative, each with the #heading if there is one."""
        return re.findall(r"\]\(([^):]+)\)", self.text)

    def leads(self, link: str) -> bool:
        """Whether a link's file is there, and has the heading."""
        name, _, heading = link.partition("#")
        path = self.path.parent / name if name else self.path
        return path.exists() and (not heading or heading in Page(path).headings())

    def headings(self) -> list[str]:
        """As links name them."""
        titles = re.findall(r"^#+ (.*)$", self.text, re.MULTILINE)
        return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]

    def section(self, title: str) -> str:
        """What stands below a heading of the second level, up to the next one."""
        return self.text.split(f"\n## {title}\n")[1].split("\n## ")[0]

    def rows(self) -> Iterator[list[str]]:
        """The cells of each line of its tables."""
        for line in re.findall(r"^\| (.*) \|$", self.text, re.MULTILINE):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]


def code(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)
