"""The command line: `sae STEP run.yaml [--section.key value ...]`, and commands on a lake."""

import argparse
import functools
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from sae.jobs import storage
from sae.jobs.plan_options import add_options
from sae.jobs.progress import say
from sae.schemas import config as run_config
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError, SaeError

STEPS: Final = (
    "tokenize", "harvest", "train", "encode", "compact", "aggregate", "effects", "explain", "evaluate", "export",
)  # fmt: skip
# The others are done once for all of `autoencoders`.
_OF_ONE_AUTOENCODER: Final = frozenset({"encode", "compact", "aggregate", "effects", "explain", "evaluate", "export"})
# Some work hours before they find that they may not write.
_WRITES_LATE: Final = frozenset({"harvest", "train", "encode", "compact", "effects", "explain"})
_METAVARS: Final = {"step": "STEP", "config": "run.yaml", "lake": "LAKE", "source": "SOURCE"}
_INTERRUPTED: Final = 128 + signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> None:
    """Does what the arguments say, and exits with the status."""
    parser = _parser()
    given, rest = parser.parse_known_args(arguments)
    if not hasattr(given, "command"):
        parser.error("give a command")
    if rest and not hasattr(given, "config"):
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    given.overrides = rest
    sys.exit(_guarded(lambda: given.command(given)))


def program(*arguments: str) -> NoReturn:
    """Entry point of the `sae` program, and with a step's name of `python -m sae.jobs.STEP run.yaml`.

    It ends without the interpreter's teardown, in which DuckDB's bindings list what others still refer to.
    """
    status: object = 0
    try:
        main([*arguments, *sys.argv[1:]])
    except SystemExit as end:
        status = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def run_step(step: str, config: Run) -> None:
    """Runs one step in this process."""
    _module("cluster").check_folders_of_job(config, step)
    if step in _WRITES_LATE and storage.is_local(config.lake):
        storage.check_writable(config.lake)
    several = config.each() if step in _OF_ONE_AUTOENCODER else [config]
    with _module("cluster").kept():
        for one in several:
            if len(several) > 1:
                say(f"{step}: autoencoder {one.autoencoder.name}")
            _module(step).run(one)
    # Also when there was nothing to do: the command before may have been killed just before it did this.
    lake = _module("lake")
    lake.write_views(lake.Lake(config.lake))


def _guarded(command: Callable[[], Any]) -> int:
    """The exit status; errors that users can cause are told in one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        command()
    except SaeError as error:
        say(f"error: {error}")
        return 1
    except _foreign_errors() as error:
        reason = " ".join(str(error).split())[-400:]
        say(f"error: {type(error).__name__}: {reason}; if the lake's files are damaged, sae verify names them")
        return 1
    except KeyboardInterrupt:
        say("interrupted; nothing that was committed is lost, run the same command to go on")
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read the answer has seen enough; what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _foreign_errors() -> tuple[type[BaseException], ...]:
    """What DuckDB, Ray and Arrow raise on damaged files and lost machines, of those that are loaded."""
    names = {"duckdb": "Error", "ray.exceptions": "RayError", "pyarrow": "ArrowException"}
    return tuple(getattr(sys.modules[module], name) for module, name in names.items() if module in sys.modules)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sae", description="Sparse autoencoders as a data lake.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for step in STEPS:
        summary = f"step {step} of a run"
        of_step = _add(commands, step, summary, functools.partial(_run_one, step), "config")
        if step == "train":
            _add_resume(of_step)
        if step == "evaluate":
            what = "show autoencoders that are evaluated side by side, and evaluate none"
            of_step.add_argument("--compare", nargs="+", metavar="AUTOENCODER", help=what)
    _add_resume(_add(commands, "run", "all steps that are not yet done", _run_all, "config"))
    add_options(_add(commands, "plan", "what the steps will cost, before any is run", _plan, "config"))
    what = "take in an autoencoder that was trained elsewhere: docs/pretrained.md"
    importing = _add(commands, "import", what, _import, "config", "source")
    importing.add_argument("--offline", action="store_true", help="use only what was fetched before (SAE_OFFLINE=1)")
    submit = _add(commands, "submit", "a step as a job of a Ray cluster", _submit, "step", "config")
    submit.add_argument("--address", metavar="URL", help="the job API; http://127.0.0.1:8265 when absent")
    demo = commands.add_parser("demo", help="a small run from real text to answers, in ./demo")
    demo.set_defaults(command=lambda _: _module("demo").main(run_step))
    _add(commands, "status", "what a lake holds", _lake_command("status"), "lake")
    _add(commands, "verify", "read every file and compare it with its checksum", _lake_command("verify"), "lake")
    sql = _add(commands, "sql", "a query over a lake's tables", _lake_command("sql"), "lake")
    sql.add_argument("query", help="SQL, or - to read it from standard input")
    sql.add_argument("--format", choices=["table", "csv", "json", "parquet"], default="table")
    sql.add_argument("--version", type=int, help="lake version; the newest when absent")
    for key in ("atoms", "contexts"):
        only = f"show only these {key}, and open only the files that hold them"
        sql.add_argument(f"--{key}", type=int, nargs=2, metavar=("FIRST", "LAST"), help=only)
    _add_view(commands)
    what = "read exported files as their readers would, and name what is wrong"
    check = _add(commands, "validate", what, lambda given: _module("exports.check").validate(given))
    check.add_argument("folder", metavar="FOLDER", help="an export.folder, or an .html file")
    gc = _add(commands, "gc", "delete files that no reader of the newest version uses", _lake_command("gc"), "lake")
    gc.add_argument("--older-than", type=float, default=24.0, metavar="HOURS")
    drop = _add(commands, "drop", "take a part out of a lake", _lake_command("drop"), "lake")
    drop.add_argument("--latents", metavar="AUTOENCODER", help="its latents, statistics and examples")
    drop.add_argument("--run", metavar="CORPUS/NUMBER", help="with --latents: only those of a run")
    drop.add_argument("--by-token", action="store_true", help="with --latents: only their copy in the order of tokens")
    drop.add_argument("--autoencoder", metavar="AUTOENCODER", help="its latents, checkpoints and metrics")
    drop.add_argument("--corpus", help="its latents by all autoencoders, or by that of --latents")
    drop.add_argument("--with-text", action="store_true", help="with --corpus: also its text and all else of it")
    drop.add_argument("--contexts", metavar="FIRST:LAST", help="context ids: their text and all that was made of it")
    drop.add_argument("--doc", metavar="ID", type=int, help="the contexts of the document with this doc_id")
    return parser


def _add(
    commands: Any,
    name: str,
    summary: str,
    command: Callable[[argparse.Namespace], Any],
    *positionals: str,
) -> argparse.ArgumentParser:
    overrides = f"\n\nAny key of the config can be given as --KEY VALUE:\n{_keys()}" if "config" in positionals else ""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary + overrides.replace("%", "%%"),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for positional in positionals:
        choices = (*STEPS, "run") if positional == "step" else None
        parser.add_argument(positional, metavar=_METAVARS[positional], choices=choices)
    parser.set_defaults(command=command)
    return parser


def _add_view(commands: Any) -> None:
    what = "serve a lake, or a site that was exported, to a browser"
    view = _add(commands, "view", what, lambda given: _module("view").view(given), "lake")
    view.add_argument("--host", default="127.0.0.1", help="address to listen at; another one than this needs --token")
    view.add_argument("--port", type=int, default=7007, help="0 takes any that is free")
    token = "only readers who have it may read; a random one where none is given"
    view.add_argument("--token", nargs="?", const="random", help=token)
    view.add_argument("--subject", action="store_true", help="load the subject model, and encode what is typed")


def _add_resume(parser: argparse.ArgumentParser) -> None:
    what = "go on from the last checkpoint where there is one, which is what is done anyway"
    parser.add_argument("--resume", action="store_true", help=what)


def _keys() -> str:
    """The config's keys, each with its default."""
    lines = []
    for section, field in Run.model_fields.items():
        inner: Any = getattr(field.annotation, "model_fields", None)
        for key, leaf in (inner or {"": field}).items():
            default = "required" if leaf.is_required() else repr(leaf.default)
            lines.append(f"  {section}{'.' if key else ''}{key} ({default})")
    return "\n".join(lines)


def _module(name: str) -> Any:
    return importlib.import_module(f"sae.jobs.{name}")


def _lake_command(name: str) -> Callable[[argparse.Namespace], Any]:
    return lambda given: getattr(_module("lake_commands"), name)(given)


def _plan(given: argparse.Namespace) -> None:
    _module("plan").plan(given, _config(given))


def _import(given: argparse.Namespace) -> None:
    _module("importing").run(_config(given), given.source, given.offline)


def _submit(given: argparse.Namespace) -> None:
    from sae.jobs.submit import DEFAULT_ADDRESS, submit

    submit(given.step, given.config, given.overrides, _config(given), given.address or DEFAULT_ADDRESS)


def _run_one(step: str, given: argparse.Namespace) -> None:
    if getattr(given, "compare", None):
        _module("compare").compare(_config(given), given.compare)
        return
    run_step(step, _config(given))


def _run_all(given: argparse.Namespace) -> None:
    config = _config(given)
    with _module("cluster").kept():
        for step in STEPS:
            if step != "harvest" or config.training.source == "cached":
                run_step(step, config)


def _config(given: argparse.Namespace) -> Run:
    return load_config(given.config, _pairs(given.overrides))


def load_config(path: str, overrides: Sequence[tuple[str, str]] = ()) -> Run:
    """The run config of a YAML file."""
    try:
        text = storage.read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    return run_config.parse(text, overrides, path)


def _pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """`--key value` and `--key=value` as pairs."""
    pairs: list[tuple[str, str]] = []
    waiting = list(arguments)
    while waiting:
        key = waiting.pop(0)
        if not key.startswith("--") or key == "--":
            raise ConfigError(f"{key}: unexpected argument; overrides are given as --section.key value")
        key, given, value = key[2:].partition("=")
        if not given:
            if not waiting:
                raise ConfigError(f"--{key}: no value given; write --{key} VALUE")
            value = waiting.pop(0)
        pairs.append((key, value))
    return pairs


if __name__ == "__main__":
    program()
