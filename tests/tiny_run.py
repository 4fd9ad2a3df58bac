"""A tiny real run: a GPT-2 of two blocks, short texts, and the steps of the command line on a lake of its own."""

import io
import json
import random
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sae.jobs import cli
from sae.jobs.lake import connect
from tests.models import tiny_gpt2

NAME, CORPUS = "tiny", "texts"
CONTEXT_LENGTH = 32
# What the rows of each table are ordered by, so that two lakes can be compared row by row.
ORDER = {
    "documents": "corpus, doc_id",
    "contexts": "corpus, context_id",
    "vocabulary": "corpus, token_id",
    "latents": "atom, context_id, pos",
    "moments": "corpus, run, atom",
    "histograms": "corpus, run, atom, bin",
    "top": "corpus, run, atom, act desc, context_id",
    "samples": "corpus, run, atom, context_id, pos",
    "atoms": "atom",
    "examples": "atom, kind, rank",
    "metrics": "phase, step, metric",
    "runs": "corpus, run",
}
WORDS = "the quick brown fox paid yen naïve café truths Zwölf dog self-evident lazy owners 1234 of"


class Result(NamedTuple):
    """What a command of the command line gave."""

    code: int
    stderr: str
    stdout: str

    @property
    def lines(self) -> list[str]:
        return self.stderr.splitlines()


def sae(*arguments: str | Path) -> Result:
    """Runs `sae ARGUMENTS` in this process."""
    stderr, stdout = io.StringIO(), io.StringIO()
    code = None
    with redirect_stderr(stderr), redirect_stdout(stdout):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = exit_.code
    assert isinstance(code, int), "the command line always ends with an exit status"
    return Result(code, stderr.getvalue(), stdout.getvalue())


@dataclass(frozen=True)
class Lab:
    """A lake folder with the config of the tiny run; commands act on that lake."""

    folder: Path
    lake: Path

    @property
    def config(self) -> Path:
        return self.folder / "run.yaml"

    def sae(self, step: str, **overrides: Any) -> Result:
        """Runs a step; `section__key=value` overrides the config."""
        places = {"lake": str(self.lake), "export__folder": str(self.lake.parent / "viewer")}
        flags = [f"--{key.replace('__', '.')}={json.dumps(value)}" for key, value in {**places, **overrides}.items()]
        return sae(step, self.config, *flags)

    def done(self, step: str, **overrides: Any) -> Result:
        """Runs a step that must succeed."""
        result = self.sae(step, **overrides)
        assert result.code == 0, result.stderr
        return result

    def query(self, sql: str) -> Result:
        """Asks the lake through `sae sql`."""
        return sae("sql", self.lake, sql)

    def copy(self, parent: Path) -> "Lab":
        """The same lake in another place, free to be changed."""
        shutil.copytree(self.lake, parent / "lake")
        return Lab(self.folder, parent / "lake")

    def without_lake(self, parent: Path) -> "Lab":
        return Lab(self.folder, parent / "lake")

    def bytes(self) -> dict[str, bytes]:
        """Every file in the lake's folder, orphans and temporary files too."""
        return {str(path.relative_to(self.lake)): path.read_bytes() for path in self.lake.rglob("*") if path.is_file()}


def write_texts(folder: Path, n: int = 30, seed: int = 0) -> None:
    """Documents of all lengths, from a single token to several contexts with a tail."""
    folder.mkdir()
    draw = random.Random(seed)
    for number in range(n):
        words = draw.choices(WORDS.split(), k=1 + draw.randrange(120))
        (folder / f"{number:03}.txt").write_text(" ".join(words) if number else "a", encoding="utf-8")


def tiny_config(folder: Path) -> dict[str, Any]:
    """The run config as plain values; some settings are small only so that there are several of each thing."""
    return {
        "lake": str(folder / "lake"),
        "seed": 7,
        "subject": {"model": str(folder / "model"), "hook": "blocks.1.hook_resid_pre", "masked_positions": [0]},
        "corpus": {"name": CORPUS, "paths": [str(folder / "texts/*.txt")], "context_length": CONTEXT_LENGTH},
        "autoencoder": {"name": NAME, "n_latents": 64, "k": 4, "auxk": 8},
        "training": {
            "tokens": 6400,
            "batch_tokens": 64,
            "lr": 2e-3,
            "buffer_tokens": 600,
            "harvest_batch": 4,
            "dead_tokens": 1000,
            "ema": 0.9,
            "validation": 0.1,
            "checkpoint_tokens": 640,
        },
        "encode": {"run_tokens": 1024, "bin_width": 0.2},
        "compact": {"file_rows": 5000},
        "evaluate": {"tokens": 256},
    }


def make_lab(folder: Path, n_texts: int = 30) -> Lab:
    """The tiny run in a folder, with no lake yet."""
    tiny_gpt2(folder / "model", n_layer=2, d=32, n_ctx=64)
    write_texts(folder / "texts", n_texts)
    (folder / "run.yaml").write_text(yaml.safe_dump(tiny_config(folder)))
    return Lab(folder, folder / "lake")


def rows(lake: Path, table: str) -> list[tuple[Any, ...]]:
    """All rows and columns of a table, in order."""
    return connect(str(lake)).sql(f"select * from {table} order by {ORDER[table]}").fetchall()
