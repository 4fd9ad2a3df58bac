"""Launch settings of the kernels that are worth tuning: the ones that are shipped, and the ones to try elsewhere.

`python -m benchmarks.tune` measures the candidates on the GPU at hand and prints the entries of `shipped` for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

Settings = Mapping[str, int]
Capability = tuple[int, int]

A100: Capability = (8, 0)
H100: Capability = (9, 0)  # and H200


@dataclass(frozen=True)
class Op:
    """Settings of one op. All are candidates too, and a candidate must give the op's result but for rounding.

    shipped: for GPUs by compute capability; default: where nothing can be measured.
    """

    default: Settings
    shipped: Mapping[Capability, Settings]
    candidates: tuple[Settings, ...]


def _tile(rows: int, columns: int, warps: int, stages: int) -> Settings:
    return {"BM": rows, "BN": columns, "BAND": 8, "num_warps": warps, "num_stages": stages}


def _warps(*numbers: int) -> tuple[Settings, ...]:
    return tuple({"num_warps": number} for number in numbers)


def _rows(entries: int, features: int) -> Settings:
    """Entries of the gathered rows that a program takes together, and features of a row for each of its warps."""
    return {"ENTRIES": entries, "FEATURES": features}


def _entries(warps: int, tile: int) -> Settings:
    """Warps of a program that holds rows, and entries that it takes together; fewer of wide rows."""
    return {"TILE": tile, "num_warps": warps}


# Those of H100 were measured on an H200 (benchmarks/results) but for update_narrow, and update_wide only at 4096
# features; those of A100 were not measured: they are compiled for it, without spilled registers and within its shared
# memory.
OPS: Mapping[str, Op] = {
    # BN must divide 128, to which the output is padded.
    "product": Op(
        default=_tile(128, 128, 8, 3),
        shipped={H100: _tile(128, 128, 8, 3), A100: _tile(128, 128, 8, 3)},
        candidates=(
            _tile(128, 128, 8, 3),
            _tile(128, 128, 8, 4),
            _tile(128, 128, 4, 3),
            _tile(64, 128, 4, 4),
            _tile(128, 64, 4, 4),
            _tile(64, 64, 4, 3),  # fits where little shared memory is
        ),
    ),
    "bulk_product": Op(
        default=_tile(128, 256, 8, 3),
        shipped={H100: _tile(128, 256, 8, 3)},
        candidates=(
            _tile(128, 256, 8, 3),
            _tile(256, 128, 8, 3),
            _tile(128, 128, 8, 4),
            _tile(128, 128, 4, 3),
        ),
    ),
    "select_few": Op(_warps(1)[0], {H100: _warps(1)[0], A100: _warps(1)[0]}, _warps(1, 2, 4, 8)),
    "select": Op(_warps(8)[0], {H100: _warps(8)[0], A100: _warps(8)[0]}, _warps(4, 8, 16)),
    "select_most": Op(_warps(16)[0], {H100: _warps(16)[0], A100: _warps(16)[0]}, _warps(8, 16, 32)),
    "reconstruct": Op(
        default=_rows(8192, 256),
        shipped={H100: _rows(8192, 256), A100: _rows(8192, 256)},
        candidates=(_rows(8192, 256), _rows(4096, 256), _rows(8192, 512), _rows(16384, 256), _rows(4096, 128)),
    ),
    # Rows of up to 256, of up to 1024 and of more features.
    "update_narrow": Op(
        default=_entries(1, 4),
        shipped={H100: _entries(1, 4), A100: _entries(1, 4)},
        candidates=tuple(_entries(warps, tile) for warps in (1, 2) for tile in (2, 4)),
    ),
    "update": Op(
        default=_entries(4, 2),
        shipped={H100: _entries(4, 2), A100: _entries(4, 2)},
        candidates=tuple(_entries(warps, tile) for warps in (2, 4, 8) for tile in (1, 2, 4)),
    ),
    "update_wide": Op(
        default=_entries(16, 2),
        shipped={H100: _entries(32, 1), A100: _entries(16, 2)},
        candidates=tuple(_entries(warps, tile) for warps in (8, 16, 32) for tile in (1, 2, 4)),
    ),
}
