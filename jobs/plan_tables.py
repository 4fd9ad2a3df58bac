"""How `sae plan` shows its figures: a few short tables, or one JSON object."""

import io
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

Titled = tuple[str, Table]


def show(report: Mapping[str, Any], as_json: bool) -> None:
    """Prints a report on standard output."""
    if as_json:
        print(json.dumps(report))
        return
    buffer = io.StringIO()
    console = Console(file=buffer, width=shutil.get_terminal_size().columns if sys.stdout.isatty() else 120)
    titled = [one for training in report["train"] for one in _training(training)]
    for title, table in (*titled, _written(report["lake"]), _taken(report["lake"])):
        buffer.write(f"{title}\n")
        console.print(table)
        console.print()
    print("\n".join(line.rstrip() for line in buffer.getvalue().rstrip().splitlines()))


def _training(of: Mapping[str, Any]) -> Iterator[Titled]:
    yield _summary(of)
    yield _memory(of)
    if of["transfers"]:
        yield _communication(of)
    yield _time(of)
    if of["choices"]:
        yield _choices(of)


def _summary(of: Mapping[str, Any]) -> Titled:
    d, n, k = of["d_model"], of["n_latents"], of["k"]
    table = _table("", "")
    checkpoints, operations = of["checkpoints"], of["flops"]
    if of["autoencoders"] > 1:
        table.add_row("one of several", f"{of['autoencoders']}, each whole on one GPU; those that share one add up")
    table.add_row("parameters", f"{of['parameters']:,}")
    table.add_row("steps", f"{of['steps']:,} of {of['batch_tokens']:,} tokens, {of['tokens']:,} tokens in all")
    table.add_row("rows of a replica in a step", f"{of['rows']:,}")
    for name, count in operations.items():
        if count:
            table.add_row(f"{name}, all ranks, a step", f"{count / 1e12:,.3f} TFLOP")
    table.add_row("checkpoints", f"{checkpoints['written']:,} of {_gb(checkpoints['bytes'])}")
    table.add_row("  of which are kept, at most", f"{checkpoints['kept']:,}, {_gb(checkpoints['kept_bytes'])} on disk")
    return f"train {of['autoencoder']}: d {d:,}, n {n:,}, k {k}, on tp {of['tp']} x dp {of['dp']}", table


def _memory(of: Mapping[str, Any]) -> Titled:
    table = _table("", ">GB")
    for name, size in of["memory"].items():
        table.add_row(name, _number(size / 1e9, 3))
    if of["subject_parameters"] is None:
        table.add_row("subject model", "not counted")
    table.add_row("together", _number(of["memory_bytes"] / 1e9, 3))
    table.add_row("the GPU has", _number(of["gpu_bytes"] / 1e9, 0))
    return "GPU memory of a rank", table


def _communication(of: Mapping[str, Any]) -> Titled:
    table = _table("", "collective", "over", ">result, MB", ">sent by a rank, MB", ">ms")
    for one in of["transfers"]:
        over = f"{one['over']}, {one['ranks']} ranks"
        sizes = (_number(size / 1e6, 1) for size in (one["size"], one["sent"]))
        table.add_row(one["what"], one["operation"], over, *sizes, _number(1e3 * one["seconds"], 2))
    sent = sum(one["sent"] for one in of["transfers"])
    time = sum(one["seconds"] for one in of["transfers"])
    table.add_row("together", "", "", "", _number(sent / 1e6, 1), _number(1e3 * time, 2))
    return "communication of a step", table


def _time(of: Mapping[str, Any]) -> Titled:
    table = _table("", ">ms")
    for name, time in of["seconds"].items():
        label = f"{name}, {of['dead']:.0%} of the latents dead" if name == "AuxK" else name
        table.add_row(label, _number(1e3 * time, 2))
    if of["subject_parameters"] is None:
        table.add_row("subject model", "not counted")
    table.add_row("together", _number(1e3 * of["step_seconds"], 2))
    table.add_row("tokens/s", _number(of["tokens_per_second"], 0))
    table.add_row("hours of training", _number(of["steps"] * of["step_seconds"] / 3600, 2))
    return "time of a step: an estimate from the H200 measurements of 2026-11-23, as if nothing overlapped", table


def _choices(of: Mapping[str, Any]) -> Titled:
    headers = (">GPUs", ">tp", ">dp", ">rows", ">GB a GPU", ">MB sent", ">ms to send", ">ms a step", ">tokens/s", "why")
    table = _table(*headers)
    for one in of["choices"]:
        table.add_row(str(one["gpus"]), *_choice(one), one["why"])
    return "the mesh to choose: the smallest tp that fits, all the rest dp", table


def _choice(one: Mapping[str, Any]) -> list[str]:
    if one["tp"] is None:
        return ["-"] * 8
    return [
        str(one["tp"]),
        str(one["dp"]),
        f"{one['rows']:,}",
        _number(one["memory_bytes"] / 1e9, 1),
        _number(sum(transfer["sent"] for transfer in one["transfers"]) / 1e6, 1),
        _number(1e3 * sum(transfer["seconds"] for transfer in one["transfers"]), 2),
        _number(1e3 * one["step_seconds"], 2),
        _number(one["tokens_per_second"], 0),
    ]


def _written(of: Mapping[str, Any]) -> Titled:
    really = (">really", ">really", ">really") if _any_really(of) else ()
    columns = [(">rows", *really[:1]), (">MB", *really[1:2]), (">files", *really[2:])]
    table = _table("", "", *(header for group in columns for header in group))
    for step in of["steps"]:
        done = step["really"]["tables"] if step["really"] else {}
        # What is there may be more than is planned: a copy by token, for one, that another command made.
        for at, name in enumerate(step["tables"] | done):
            cells = zip(_sizes(step["tables"].get(name)), _sizes(done.get(name)), strict=True)
            table.add_row(
                "" if at else _name(of, step), name, *(cell for pair in cells for cell in pair[: 1 + bool(really)])
            )
    tokens = f"{of['tokens']:,} tokens"
    of_what = f"the corpus' {tokens}" if of["corpus_known"] else f"a corpus of {tokens}, for it is not tokenized yet"
    return f"what the lake's steps write, at most, for {of_what}", table


def _taken(of: Mapping[str, Any]) -> Titled:
    really = [">really"] if _any_really(of) else []
    table = _table("", ">GB of memory", ">GB of a GPU", ">core-hours", ">GPU-hours", ">seconds", *really)
    for step in of["steps"]:
        gpu = (step["gpu_memory"] / 1e9, step["gpu_seconds"] / 3600) if step["gpu_seconds"] else (None, None)
        done = step["really"]["seconds"] if step["really"] else None
        table.add_row(
            _name(of, step),
            _number(step["memory"] / 1e9, 2),
            _known(gpu[0], 2),
            _number(step["core_seconds"] / 3600, 4),
            _known(gpu[1], 4),
            _number(step["seconds"], 1),
            *([_known(done, 1)] if really else []),
        )
    gpus = f", encoding on GPUs: {of['gpus']}" if of["gpus"] else ", without a GPU"
    lacking = "" if of["subject_counted"] else "; subject model not counted"
    return (
        f"what they take, on {of['cores']} cores{gpus}{lacking}; an estimate from what was measured by 2026-11-24",
        table,
    )


def _any_really(of: Mapping[str, Any]) -> bool:
    return any(step["really"] for step in of["steps"])


def _name(of: Mapping[str, Any], step: Mapping[str, Any]) -> str:
    several = len({one["autoencoder"] for one in of["steps"]} - {None}) > 1
    return f"{step['step']} {step['autoencoder']}" if several and step["autoencoder"] else str(step["step"])


def _sizes(table: Mapping[str, int] | None) -> tuple[str, str, str]:
    if table is None:
        return "-", "-", "-"
    return f"{table['rows']:,}", _number(table["bytes"] / 1e6, 3), f"{table['files']:,}"


def _known(value: float | None, digits: int) -> str:
    return "-" if value is None else _number(value, digits)


def _table(*headers: str) -> Table:
    """Of columns by their headers; those with > are set to the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=any(headers))
    for header in headers:
        table.add_column(header.removeprefix(">"), justify="right" if header.startswith(">") else "left")
    return table


def _gb(size: float) -> str:
    return f"{_number(size / 1e9, 3)} GB"


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"
