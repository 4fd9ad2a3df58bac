"""Tiny, randomly initialised Hugging Face folders that TransformerBridge boots in a moment."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Zwölf Boxkämpfer jagen Viktor; naïve café owners paid 1234 yen.",
    "We hold these truths to be self-evident, that all are created equal.",
]


def tiny_gpt2(
    folder: Path,
    n_layer: int = 2,
    d: int = 32,
    vocab: int = 320,
    n_ctx: int = 64,
    seed: int = 0,
    n_head: int = 2,
) -> Path:
    """Write a GPT-2 of `n_layer` blocks and width `d`, with a byte-level BPE, into `folder`; return it."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(vocab)
    config = GPT2Config(
        n_layer=n_layer,
        n_embd=d,
        n_head=n_head,
        n_positions=n_ctx,
        vocab_size=vocab,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_llama(
    folder: Path,
    n_layer: int = 2,
    d: int = 32,
    vocab: int = 320,
    n_ctx: int = 64,
    seed: int = 0,
    n_head: int = 4,
) -> Path:
    """As `tiny_gpt2`, with rotary positions, RMS norm, a gated MLP and two heads for each key and value.

    Neither "llama" nor "gemma" may be in the folder's name: transformer_lens dispatches on it.
    """
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(vocab)
    config = LlamaConfig(
        num_hidden_layers=n_layer,
        hidden_size=d,
        intermediate_size=2 * d,
        num_attention_heads=n_head,
        num_key_value_heads=n_head // 2,
        max_position_embeddings=n_ctx,
        vocab_size=vocab,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer(vocab: int = 320) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocab` (more than 256) tokens; id 0 is `<|endoftext|>`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, unk_token=end, pad_token=end)
