"""Encodes a text that somebody types, with the subject and the weights that made an autoencoder's latents."""

from dataclasses import dataclass
from threading import Lock
from typing import Any, Final

import torch

from sae.jobs import checkpoints, cluster, contexts
from sae.jobs.lake import Lake, Snapshot
from sae.model import Autoencoder
from sae.schemas.errors import AutoencoderError, ConfigError
from sae.schemas.site import Encoded, Typed
from sae.subject import Subject
from sae.transcoder import from_config

_ATOMS: Final = 20  # of a token
_SECTION: Final = "subject."


@dataclass(frozen=True)
class _Loaded:
    subject: Subject
    autoencoder: Autoencoder
    vocabulary: list[str]
    longest: int


class SentenceEncoder:
    """Holds the subjects and autoencoders of a lake that were asked for; encodes one text at a time."""

    def __init__(self, lake: Lake) -> None:
        self._lake = lake
        self._busy = Lock()
        self._subjects: dict[str, Subject] = {}
        self._loaded: dict[str, _Loaded] = {}
        snapshot = lake.snapshot()
        names = [key.removeprefix("encode/") for key in sorted(snapshot.properties) if key.startswith("encode/")]
        for name in names:
            self._loaded[name] = self._load(snapshot, name)

    @torch.inference_mode()
    def encode(self, typed: Typed) -> Encoded:
        """Of a text; raises ConfigError where it is too long, or the autoencoder is not of this lake."""
        loaded = self._loaded.get(typed.autoencoder)
        if loaded is None:
            raise ConfigError(f"autoencoder: no {typed.autoencoder} is loaded; {', '.join(self._loaded) or 'none'} are")
        with self._busy:
            token_ids = loaded.subject.tokenizer(typed.text, add_special_tokens=False)["input_ids"]
            if not 0 < len(token_ids) <= loaded.longest:
                raise ConfigError(
                    f"text: has {len(token_ids):,} tokens; expected 1 to {loaded.longest:,}, as many as a context has"
                )
            atoms, acts = _most_active(loaded, torch.tensor([token_ids]))
        return Encoded(tokens=[loaded.vocabulary[number] for number in token_ids], atoms=atoms, acts=acts)

    def _load(self, snapshot: Snapshot, name: str) -> _Loaded:
        state = checkpoints.state_of(snapshot, name)
        encoded_with = snapshot.properties[f"encode/{name}"]["checkpoint"]
        place = checkpoints.find(snapshot, name, encoded_with)
        if place is None:
            raise AutoencoderError(
                f"autoencoder {name}: the weights that encoded it ({encoded_with}) are no longer kept; without "
                "--subject its atoms are shown all the same"
            )
        shards, prefix = place
        autoencoder = from_config(state["config"])
        tensors = checkpoints.read(self._lake, snapshot, shards, prefix=prefix)
        autoencoder.load_state_dict({**autoencoder.state_dict(), **tensors})
        subject = self._subject(state["made_with"])
        checkpoints.check_fit(autoencoder, subject, name)
        corpus = state["corpus"]
        width = contexts.state_of(snapshot, corpus)["context_length"]
        words = self._lake.read(snapshot.select("vocabulary", corpus=corpus), ["token_id", "token"])
        return _Loaded(
            subject, autoencoder.eval().to(subject.device), words.sort_by("token_id")["token"].to_pylist(), width
        )

    def _subject(self, made_with: dict[str, Any]) -> Subject:
        given = {key.removeprefix(_SECTION): made_with[key] for key in sorted(made_with) if key.startswith(_SECTION)}
        if str(given) not in self._subjects:
            self._subjects[str(given)] = Subject.load(**given, device=cluster.use_device(1))
        return self._subjects[str(given)]


def _most_active(loaded: _Loaded, token_ids: torch.Tensor) -> tuple[list[list[int]], list[list[float]]]:
    """Atoms and activations of each token of a context [1, T]; none at masked positions."""
    n = token_ids.shape[1]
    vectors = loaded.subject.activations(token_ids)[0].float()
    found = loaded.autoencoder.nonzeros(vectors)
    masked = set(loaded.subject.masked_positions)
    atoms: list[list[int]] = [[] for _ in range(n)]
    acts: list[list[float]] = [[] for _ in range(n)]
    order = torch.argsort(found.value, descending=True, stable=True)
    rows = (found.row[order].tolist(), found.latent[order].tolist(), found.value[order].tolist())
    for row, latent, value in zip(*rows, strict=True):
        if row not in masked and len(atoms[row]) < _ATOMS:
            atoms[row].append(latent)
            acts[row].append(value)
    return atoms, acts
