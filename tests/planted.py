"""A subject model and an autoencoder that are built by hand, so that it is known what each atom fires on.

The model is a GPT-2 of one block whose streams hold three one-hot vectors: of the token, of its position, and of the
token before, which the block's only head copies. An atom is a sum of such entries and a bias.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from sae.activations import ReLU
from sae.jobs import checkpoints
from sae.jobs.lake import Lake
from sae.model import Autoencoder
from tests.models import byte_tokenizer

VOCABULARY, POSITIONS = 257, 32
WIDTH: Final = 2 * VOCABULARY + POSITIONS
HOOK: Final = "blocks.0.hook_resid_post"
_SHARP: Final = 400.0  # attention scores: what else is attended to is less than a float32 can tell


def token(number: int) -> int:
    """Where the stream tells the token."""
    return number


def position(pos: int) -> int:
    """Where it tells the position."""
    return VOCABULARY + pos


def before(number: int) -> int:
    """Where it tells the token before."""
    return VOCABULARY + POSITIONS + number


def planted_gpt2(folder: Path) -> Path:
    """Writes the model and its tokenizer."""
    config = GPT2Config(
        n_layer=1, n_embd=WIDTH, n_head=1, n_inner=4, n_positions=POSITIONS, vocab_size=VOCABULARY,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        parts = model.transformer
        tokens = torch.arange(VOCABULARY)
        parts.wte.weight[tokens, tokens] = 1
        parts.wpe.weight[torch.arange(POSITIONS), VOCABULARY + torch.arange(POSITIONS)] = 1
        _undo_norm(parts.h[0].ln_1)
        _look_back(parts.h[0].attn)
    model.save_pretrained(folder)
    byte_tokenizer(VOCABULARY).save_pretrained(folder)
    return folder


def _undo_norm(norm: Any) -> None:
    """A stream of two ones has always the same mean and deviation."""
    mean = 2 / WIDTH
    norm.weight.fill_((2 / WIDTH - mean**2 + norm.eps) ** 0.5)
    norm.bias.fill_(mean)


def _look_back(attention: Any) -> None:
    """Queries tell the position, keys the one behind theirs, and values the token: the token before is copied."""
    query, key, value = (slice(at * WIDTH, (at + 1) * WIDTH) for at in range(3))
    weight: Tensor = attention.c_attn.weight  # [in, out]
    pos, tokens = torch.arange(POSITIONS - 1), torch.arange(VOCABULARY)
    weight[:, query][position(1) + pos, position(1) + pos] = _SHARP * WIDTH**0.5
    weight[:, key][position(0) + pos, position(1) + pos] = 1
    weight[:, value][tokens, tokens] = 1
    attention.c_proj.weight[tokens, before(0) + tokens] = 1


Atom = tuple[Mapping[int, float], float]
"""Weights of the entries of the stream, and the bias."""


def commit(lake: Lake, name: str, atoms: Sequence[Atom], made_with: dict[str, Any]) -> None:
    """Puts a fully trained autoencoder with these atoms into a lake."""
    autoencoder = Autoencoder(len(atoms), WIDTH, ReLU())
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.zero_()
        for atom, (weights, bias) in enumerate(atoms):
            autoencoder.latent_bias[atom] = bias
            for entry, weight in weights.items():
                autoencoder.encoder.weight[atom, entry] = weight
        autoencoder.decoder_rows.copy_(autoencoder.encoder.weight)
    tensors = {key: value for key, value in autoencoder.state_dict().items() if isinstance(value, Tensor)}
    everything = [range(len(atoms))]
    with lake.transaction("train") as transaction:
        files = {
            kind: [
                checkpoints.write_tensors(
                    transaction, table, name, {prefix + k: v for k, v in tensors.items()}, everything
                )
            ]
            for kind, table, prefix in (("model", "checkpoints", ""), ("state", "training_states", "autoencoder."))
        }
        state = {
            "model": made_with["subject.model"], "hook": HOOK, "masked_positions": [], "made_with": made_with,
            "corpus": "texts", "config": json.loads(json.dumps(autoencoder.config())), "d_model": WIDTH,
            "n_latents": len(atoms), "k": None, "step": 1, "tokens": 1, "complete": True, "checkpoints": [files],
        }  # fmt: skip
        transaction.set(f"autoencoder/{name}", state)
