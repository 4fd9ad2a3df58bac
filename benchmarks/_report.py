"""Results as tables: on the screen, in `results/<date>.md`, and from a JSON object that another machine printed.

`python -m benchmarks._report step.json` appends the table of a saved output (its last line is the object).
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import shutil
import subprocess
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

Result = dict[str, Any]
"""What a benchmark prints as JSON: benchmark, command, machine, columns, table (cells as text) and rows (numbers)."""


def machine(device: torch.device) -> dict[str, str]:
    """Date, processor and versions."""
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "driver": _driver() if on_gpu else "none",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.splitlines()[0] if answer.returncode == 0 and answer.stdout else "unknown"


def milliseconds(timing: Mapping[str, Any]) -> str:
    """A cell: the median, or why there is none."""
    return f"{timing['median']:.2f}" if "median" in timing else str(timing.get("reason", "-"))


def spread(timing: Mapping[str, Any]) -> str:
    return f"{timing['p10']:.2f}-{timing['p90']:.2f}" if "median" in timing else "-"


def ratio(above: Mapping[str, Any], below: Mapping[str, Any]) -> str:
    return f"{above['median'] / below['median']:.2f}" if "median" in above and "median" in below else "-"


def rate(tokens: int, timing: Mapping[str, Any]) -> str:
    """Tokens a second."""
    return f"{tokens / timing['median'] * 1000:,.0f}" if "median" in timing else "-"


def markdown(columns: Sequence[str], table: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *table]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def section(result: Result) -> str:
    """The result as a piece of a Markdown file."""
    of = result["machine"]
    versions = f"torch {of['torch']}, triton {of['triton']}, driver {of['driver']}, Python {of['python']}"
    text = textwrap.fill(f"{of['date']}, {of['device']}, {versions}. {result['caption']}", 120, break_long_words=False)
    return f"## `{result['command']}`\n\n{text}\n\n{markdown(result['columns'], result['table'])}\n"


def finish(result: Result, save: str | Path | None, as_json: bool) -> None:
    """Print the result, append it to a file where asked, and print the JSON object last."""
    print(section(result), flush=True)
    if save is not None:
        append(result, Path(save))
    if as_json:
        print(json.dumps(result))


def append(result: Result, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['machine']['date']}.md"
    before = path.read_text("utf-8") if path.exists() else f"# {result['machine']['date']}\n"
    path.write_text(f"{before.rstrip()}\n\n{section(result)}", "utf-8")


def load(path: Path) -> Result:
    """The object in the last line of a saved output."""
    result: Result = json.loads(path.read_text("utf-8").splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="what a benchmark printed with --json")
    parser.add_argument("--save", metavar="FOLDER", type=Path, default=RESULTS)
    args = parser.parse_args()
    append(load(args.output), args.save)


if __name__ == "__main__":
    main()
