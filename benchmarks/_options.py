"""What the command lines of the GPU benchmarks share."""

import argparse
import sys

import torch

from benchmarks._report import RESULTS
from benchmarks._shapes import SHAPES, Shape


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shapes", type=Shape.parse, nargs="+", default=SHAPES, metavar="B,d,n,k")
    made.add_argument("--rounds", type=int, default=15, help="samples of each contender, at most")
    made.add_argument(
        "--budget", type=float, default=4.0, help="seconds a contender may take of a row, for its samples"
    )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the command, at tiny sizes"
    )
    made.add_argument("--save", metavar="FOLDER", nargs="?", const=RESULTS, help="append the table to <date>.md there")
    made.add_argument("--json", action="store_true", help="print one JSON object last")
    return made


def device(name: str) -> torch.device:
    """The device asked for; ends the program, as a success, where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        print("needs a CUDA device; --device cpu tries the command at the sizes of --shapes")
        sys.exit(0)
    return torch.device(name)
