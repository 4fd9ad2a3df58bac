"""What an export of an autoencoder is made from, as its manifest says it."""

import hashlib
import importlib.metadata
import json
from typing import Any, Final

import sae
from sae.jobs.lake import Range, Snapshot
from sae.schemas.errors import ConfigError, IncompleteError
from sae.schemas.origin import SIGN_CONVENTION

_MORE: Final = ("effects", "logits", "neighbours", "explanations")  # which need not be there
_PACKAGES: Final = ("duckdb", "torch", "transformer_lens")
_OF_STATE: Final = ("model", "hook", "masked_positions", "n_latents", "k")


def state_of(snapshot: Snapshot, name: str) -> dict[str, Any]:
    """The property of a trained autoencoder, whose checkpoints need not be readable.

    Raises IncompleteError where there is none.
    """
    state: dict[str, Any] | None = snapshot.properties.get(f"autoencoder/{name}")
    if state is None:
        others = [key.removeprefix("autoencoder/") for key in snapshot.properties if key.startswith("autoencoder/")]
        raise IncompleteError(
            f"autoencoder {name}: not in this lake (it has: {', '.join(others) or 'none'}); run sae train first"
        )
    return state


def merged_from(snapshot: Snapshot, name: str) -> list[str]:
    """Identity of the encoded runs that the autoencoder's atoms were merged from.

    Raises IncompleteError where nothing is merged, or other runs were since.
    """
    merged: list[str] | None = snapshot.properties.get(f"aggregate/{name}")
    if merged is None or merged != sorted(file.sha256 for file in snapshot.select("moments", autoencoder=name)):
        state = "not made" if merged is None else "older than its encoded runs"
        raise IncompleteError(f"autoencoder {name}: its atoms are {state}; run sae aggregate first")
    return merged


def digest(merged: list[str]) -> str:
    """Short hash of such an identity."""
    return hashlib.sha256(json.dumps(merged).encode()).hexdigest()[:12]


def origin(snapshot: Snapshot, name: str, atoms: Range | None, **made_with: Any) -> dict[str, Any]:
    """The fields of schemas.origin.Origin, with `source`: a hash of them, of the atoms and of what they are made with.

    Raises IncompleteError where the autoencoder has no atoms yet, ConfigError where it has not those.
    """
    state = state_of(snapshot, name)
    merged = merged_from(snapshot, name)
    encoding = snapshot.properties[f"encode/{name}"]
    moments = snapshot.select("moments", autoencoder=name)
    described = {
        "autoencoder": name,
        "checkpoint": encoding["checkpoint"],
        "bin_width": encoding["bin_width"],
        **{key: state[key] for key in _OF_STATE},
        "trained_tokens": state["tokens"],
        "corpora": sorted({file.corpus for file in moments if file.corpus}),
        "n_tokens": sum(file.tokens for file in moments),
        "atoms": _range(name, atoms, state["n_latents"]),
        "sign_convention": SIGN_CONVENTION,
    }
    more = sorted(file.sha256 for table in _MORE for file in snapshot.select(table, autoencoder=name))
    source = json.dumps([described, merged, more, made_with], sort_keys=True)
    return {
        "source": hashlib.sha256(source.encode()).hexdigest(),
        "lake_version": snapshot.version,
        # A job's copy of the working directory is not an installed package.
        "versions": {"sae": sae.__version__} | {name: importlib.metadata.version(name) for name in _PACKAGES},
        **described,
    }


def votes(snapshot: Snapshot, name: str) -> int:
    """Tokens in each list of votes of the autoencoder's effects, 0 where there are none."""
    if not snapshot.select("effects", autoencoder=name):
        return 0
    found: int = snapshot.properties[f"effects/{name}"]["votes"]
    return found


def _range(name: str, atoms: Range | None, n_latents: int) -> Range:
    first, last = atoms or (0, n_latents - 1)
    if not first <= last < n_latents:
        raise ConfigError(
            f"export.atoms: got {first} to {last}; autoencoder {name} has atoms 0 to {n_latents - 1}, give the first "
            "and the last that you want"
        )
    return first, last
