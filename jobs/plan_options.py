"""The options of `sae plan`. Apart from what uses them, for each command of the command line reads them."""

from argparse import ArgumentParser, ArgumentTypeError
from typing import Final

# GB/s. NVLink: measured between two H200s. The others are line rates: PCIe 4.0 with 16 lanes, a host with eight
# InfiniBand adapters of 400 Gb/s, a host with 100 Gb/s of Ethernet.
RATES: Final = {"nvlink": 300.0, "pcie": 31.5, "infiniband": 400.0, "ethernet": 12.5}


def add_options(parser: ArgumentParser) -> None:
    """Adds them, each with its default: those of an H200, but for the 80 GB that most GPUs of its kind have."""
    names = ", ".join(RATES)
    parser.add_argument("--d-model", type=_whole, metavar="D", help="width at the hook; else the subject's config says")
    parser.add_argument("--gpus", type=_whole, nargs="+", default=[1, 8, 64], help="numbers to choose a mesh for")
    parser.add_argument("--gpus-per-host", type=_whole, default=8, metavar="N", help="%(default)s")
    parser.add_argument("--gpu-gb", type=_positive, default=80.0, metavar="GB", help="memory of a GPU (%(default)s)")
    parser.add_argument("--dead", type=_share, default=0.1, help="share of the latents that are dead (%(default)s)")
    parser.add_argument("--tflops", type=_positive, default=650.0, help="rate of large products (%(default)s)")
    parser.add_argument("--memory-rate", type=_positive, default=2900.0, metavar="GB/s", help="in use (%(default)s)")
    parser.add_argument("--link", type=_rate, default="nvlink", help=f"within a host: {names}, or GB/s of a GPU")
    parser.add_argument("--network", type=_rate, default="infiniband", help="between hosts: the same, or a host's GB/s")
    parser.add_argument("--cores", type=_whole, default=16, metavar="N", help="for the lake's steps (%(default)s)")
    encoders = "GPUs that encode; 0: the cores do (cluster.encode_actors)"
    parser.add_argument("--encode-gpus", type=_count, metavar="N", help=encoders)
    parser.add_argument("--tokens", type=_whole, metavar="N", help="of the corpus, where the lake does not hold it yet")
    parser.add_argument("--json", action="store_true", help="print one JSON object, in bytes and seconds")


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"got {text!r}; expected a whole number from 1 on")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _whole(text)


def _positive(text: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"got {text!r}; expected a number above 0")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"got {text!r}; expected a share from 0 to 1")
    return value


def _rate(text: str) -> float:
    return RATES[text] if text in RATES else _positive(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
