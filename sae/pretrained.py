"""Pretrained models as files: their config, tokenizer, identity and booting, with errors in one line."""

import copy
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.model_registry.registry_io import resolve_model_alias
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from sae.schemas.errors import SubjectError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

CONTEXT_LIMIT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
)
WEIGHT_FILES = ("*.safetensors", "*.bin")
SAMPLE_BYTES = 1 << 16


def load_tokenizer(model: str) -> Any:
    """Load the tokenizer of `model` without its weights.

    Raises:
        SubjectError: the model is not found, or has no tokenizer.
    """
    with _model_errors(model), _LoadReport():
        return AutoTokenizer.from_pretrained(_source(model))


def model_context_limit(model: str) -> int:
    """Return the longest context of `model`, in tokens, as its config says.

    Raises:
        SubjectError: the model is not found, or its config names no limit.
    """
    return context_limit(model, load_config(model))


def token_strings(tokenizer: Any) -> list[str]:
    """Decode each token id on its own. Bytes that are not UTF-8 on their own come out as U+FFFD."""
    ids = range(len(tokenizer))
    texts = tokenizer.batch_decode([[i] for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # SentencePiece tokenizers strip the space of a text's first token, and each token here is the first.
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    return [
        f" {text}" if piece and piece.startswith("\u2581") and not text.startswith(" ") else text
        for piece, text in zip(pieces, texts, strict=True)
    ]


def boot(model: str, config: PretrainedConfig, layers: int | None, dtype: str, device: str, tokenizer: Any) -> Any:
    """Boot `model`, or its first `layers` blocks, as a TransformerBridge in evaluation mode.

    Raises:
        SubjectError: a file is missing or damaged, or holds not all weights.
    """
    overrides = None
    if layers is not None:
        key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        overrides = {key: layers}
        if isinstance(getattr(config, "layer_types", None), list):
            overrides["layer_types"] = config.layer_types[:layers]
    with _model_errors(model), _LoadReport() as report:
        bridge = TransformerBridge.boot_transformers(
            _source(model),
            hf_config_overrides=overrides,
            dtype=DTYPES[dtype],
            device=device,
            tokenizer=copy.deepcopy(tokenizer),  # the bridge sets its padding and special tokens
        )
    if report.missing:
        raise SubjectError(
            f"subject model {model}: its files lack the weights {', '.join(report.missing[:3])}; they "
            "would be "
            "random. Fetch the model anew"
        )
    return bridge.eval().requires_grad_(False)


def _source(model: str) -> str:
    if model == "smollm2":
        from sae.smollm2 import smollm2_folder

        return str(smollm2_folder())
    return resolve_model_alias(model) or model


def load_config(model: str) -> PretrainedConfig:
    """Load the config of `model`: "smollm2", a folder or a hub name."""
    with _model_errors(model), _LoadReport():
        config: PretrainedConfig = AutoConfig.from_pretrained(_source(model))
    return config


def context_limit(model: str, config: PretrainedConfig) -> int:
    """Return the longest context that `config` allows; `model` is for the error."""
    text = config.get_text_config()
    limit = next((value for key in CONTEXT_LIMIT_KEYS if (value := getattr(text, key, None))), None)
    if limit is None:
        raise SubjectError(
            f"subject model {model}: its config names no context limit (looked for "
            f"{', '.join(CONTEXT_LIMIT_KEYS)}); add one to its config.json"
        )
    return int(limit)


def weights_identity(model: str, config: PretrainedConfig) -> dict[str, Any]:
    """What names these weights: a hub model's commit, or samples of a local folder's files, wherever it "
    "lies.
    """
    folder = Path(_source(model))
    if not folder.is_dir():
        return {"name": _source(model), "commit": getattr(config, "_commit_hash", None)}
    settings = json.loads((folder / "config.json").read_bytes())
    settings.pop("transformers_version", None)
    files = sorted(path for pattern in WEIGHT_FILES for path in folder.glob(pattern))
    return {
        "config": sha256(json.dumps(settings, sort_keys=True).encode()),
        "weights": [(path.name, path.stat().st_size, _sample_digest(path)) for path in files],
    }


def _sample_digest(path: Path) -> str:
    # Equal shapes make equal sizes; both ends of the file tell retrained weights apart, and cost nothing.
    with path.open("rb") as file:
        head = file.read(SAMPLE_BYTES)
        file.seek(max(path.stat().st_size - SAMPLE_BYTES, 0))
        return sha256(head + file.read())


def sha256(data: bytes) -> str:
    """Return the hex digest of `data`."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def _model_errors(model: str) -> Iterator[None]:
    """Turn whatever loading a model raises into one line."""
    try:
        yield
    except SubjectError:
        raise
    except Exception as error:  # transformers, safetensors and the hub client share no base class
        found = " ".join(str(error).split())[:200] or type(error).__name__
        if Path(model).is_dir():
            raise SubjectError(
                f"subject model {model}: this folder does not load ({found}); expected config.json, "
                "tokenizer and weights as save_pretrained writes them"
            ) from error
        raise SubjectError(
            f"subject model {model!r}: no folder here has this name, and it does not load from the "
            f"Hugging Face hub or its cache ({found}); give a folder, a hub name, or smollm2"
        ) from error


class _LoadReport(logging.Handler):
    """Silences transformers while it loads, but notes the weights it says it had to invent."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.missing: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        rows = (line.split("|") for line in record.getMessage().splitlines())
        self.missing += [row[0].strip() for row in rows if len(row) > 1 and "MISSING" in row[1]]

    def __enter__(self) -> "_LoadReport":
        log = transformers.utils.logging
        self.verbosity, self.progress = log.get_verbosity(), log.is_progress_bar_enabled()
        log.set_verbosity_warning()
        log.disable_progress_bar()
        log.disable_default_handler()
        log.add_handler(self)
        return self

    def __exit__(self, *_: object) -> None:
        log = transformers.utils.logging
        log.remove_handler(self)
        log.enable_default_handler()
        log.set_verbosity(self.verbosity)
        if self.progress:
            log.enable_progress_bar()
