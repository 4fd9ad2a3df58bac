"""Figures equal a slow computation, one token after the other; the identity recovers everything and zero nothing."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae.activations import Activation, Identity, JumpReLU, ReLU, TopK
from sae.evaluation import distributions, reconstruction
from sae.evaluation.ablation import AblationSparsity, effective_fraction
from sae.evaluation.downstream import Downstream
from sae.evaluation.reconstruction import Principal, Reconstruction
from sae.losses import fvu
from sae.metrics import pca_fvu
from sae.model import Autoencoder
from sae.subject import Subject
from sae.transcoder import Transcoder
from tests.models import tiny_gpt2

D = 32
HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tiny_gpt2(tmp_path_factory.mktemp("evaluated") / "model", n_layer=2, d=D)
    return Subject.load(str(folder), HOOK, masked_positions=(0,))


def text() -> tuple[Tensor, Tensor]:
    """Five contexts, of which one has a single token."""
    lengths = torch.tensor([20, 7, 1, 20, 13])
    ids = torch.randint(1, 320, (5, 20), generator=torch.Generator().manual_seed(3))
    return ids.where(torch.arange(20) < lengths[:, None], 0), lengths


def drawn(activation: Activation, normalize: bool = True) -> Autoencoder:
    torch.manual_seed(1)
    model = Autoencoder(48, D, activation, normalize=normalize)
    with torch.no_grad():
        model.pre_bias.copy_(torch.randn(D) * 0.1)
        model.decoder_rows.copy_(torch.nn.functional.normalize(model.decoder_rows, dim=1))
        model.encoder.weight.copy_(model.decoder_rows * 0.7)
    return model


def kept(subject: Subject, token_ids: Tensor, lengths: Tensor) -> Tensor:
    return subject.activations(token_ids)[subject.keep_mask(lengths, token_ids.shape[1])].float()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("activation", [TopK(4), ReLU(), JumpReLU(0.1, 0.2)])
def test_reconstruction_equals_a_slow_computation(
    activation: Activation, normalize: bool, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconstruction, "_DENSE", 5 * 48)  # five rows at once
    model, x = drawn(activation, normalize), kept(subject, *text())
    sample = x[:9] + 0.1
    measured = Reconstruction(model, sample)
    for rows in x.split(16):
        measured.add(rows)
    found = measured.metrics()
    ins, outs, actives = [], [], []
    for row in x:
        with torch.no_grad():
            _, latents, recons = model(row[None])
        inner = model.seen(row[None])[1]
        ins.append((model.recombine(latents).detach().double()[0], inner.double()[0]))
        outs.append((recons.double()[0], row.double()))
        actives.append(latents[0] > 0)
    seen_mean = model.seen(sample)[1].double().mean(dim=0)
    for pairs, mean, suffix in ((ins, seen_mean, ""), (outs, sample.double().mean(dim=0), "_input")):
        errors = [float((recons - target).square().sum()) for recons, target in pairs]
        targets = torch.stack([target for _, target in pairs])
        expected = {
            "normalized_mse": np.mean(
                [error / float(t.square().sum()) for error, t in zip(errors, targets, strict=True)]
            ),
            "fvu": sum(errors) / float((targets - targets.mean(dim=0)).square().sum()),
            "fvu_train_mean": sum(errors) / float((targets - mean).square().sum()),
            "cosine": np.mean([float(r @ t / (r.norm() * t.norm())) for r, t in pairs]),
        }
        for name, value in expected.items():
            # Single rows and batches are summed in another order, in float32.
            assert found[name + suffix] == pytest.approx(value, rel=1e-5), name + suffix
    numbers = sorted(int(active.sum()) for active in actives)
    assert found["l0"] == pytest.approx(np.mean(numbers))
    for percent in (5, 25, 50, 75, 95):
        assert found[f"l0_p{percent:02}"] == np.percentile(numbers, percent, method="inverted_cdf")
    assert found["l0_max"] == numbers[-1]
    density = torch.stack(actives).double().mean(dim=0)
    assert torch.equal(measured.density, density)
    assert found["silent_fraction"] == float((density == 0).double().mean())
    assert found["dense_fraction"] == float((density > 0.1).double().mean())


def test_principal_components_are_those_of_the_whole_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    sample, x = (torch.randn(n, 8, generator=generator) * torch.arange(1, 9) + 3 for n in (50, 40))
    found = Principal(sample)
    for rows in x.split(7):
        found.add(rows)
    for k in (1, 3, 8):
        assert found.fvu(k) == pytest.approx(float(pca_fvu(sample, x, k)), abs=1e-12)


def losses(subject: Subject, ids: Tensor, changed: Tensor | None) -> list[Tensor]:
    """Log-probabilities [V] of each next token of one context, whose activations [T, d] are put in place."""
    logits = subject.logits(ids[None], None if changed is None else lambda acts: changed[None])[0].double()
    return [row - row.logsumexp(dim=0) for row in logits[:-1]]


@pytest.mark.parametrize("kind", ["topk", "transcoder"])
def test_losses_equal_a_slow_computation(kind: str, subject: Subject, tmp_path: Path) -> None:
    (token_ids, lengths), model = text(), drawn(TopK(4))
    if kind == "transcoder":
        given = {"output_hook": "blocks.1.hook_mlp_out", "masked_positions": (0,)}
        subject = Subject.load(subject.model, "blocks.1.hook_resid_mid", **given)  # type: ignore[arg-type]
        model = Transcoder(48, D, D, TopK(4), skip=True)
        assert isinstance(model, Transcoder)
        with torch.no_grad():
            model.post_bias.fill_(0.1)
    mean = torch.linspace(-1, 1, D)
    measured = Downstream(subject, model, mean)
    for rows in (slice(0, 2), slice(2, 5)):
        measured.add(token_ids[rows], lengths[rows])
    sums: dict[str, float] = {"clean": 0, "reconstructed": 0, "zero_ablated": 0, "mean_ablated": 0, "kl": 0}
    n = 0
    for ids, length in zip(token_ids, lengths.tolist(), strict=True):
        ids = ids[:length]
        with torch.no_grad():
            acts = subject.activations(ids[None])[0]
            latents, info = model.encode(acts)
            by_name = {"reconstructed": model.decode(latents, info), "zero_ablated": torch.zeros(length, D)}
        by_name["mean_ablated"] = mean.expand(length, D)
        clean = losses(subject, ids, None)
        n += length - 1
        sums["clean"] -= float(sum(row[token] for row, token in zip(clean, ids[1:], strict=True)))
        for name, changed in by_name.items():
            changed = torch.cat([model.expected(acts)[:1], changed[1:]])  # position 0 is masked
            after = losses(subject, ids, changed)
            sums[name] -= float(sum(row[token] for row, token in zip(after, ids[1:], strict=True)))
            if name == "reconstructed":
                sums["kl"] += sum(float((p.exp() * (p - q)).sum()) for p, q in zip(clean, after, strict=True))
    found = measured.metrics()
    for name in ("clean", "reconstructed", "zero_ablated", "mean_ablated"):
        assert found[f"loss_{name}"] == pytest.approx(sums[name] / n, rel=1e-5), name
    assert found["kl_reconstructed"] == pytest.approx(sums["kl"] / n, rel=1e-3)
    zero, clean_loss = sums["zero_ablated"], sums["clean"]
    expected = (zero - sums["reconstructed"]) / (zero - clean_loss)
    assert found["loss_recovered"] == pytest.approx(expected, rel=1e-3)


def constant(identity: bool) -> Autoencoder:
    """Gives back what goes in, or nothing."""
    model = Autoencoder(D, D, Identity())
    with torch.no_grad():
        model.encoder.weight.copy_(torch.eye(D))
        model.decoder_rows.copy_(torch.eye(D) if identity else torch.zeros(D, D))
    return model


@pytest.mark.parametrize(("identity", "recovered"), [(True, 1.0), (False, 0.0)])
def test_the_identity_recovers_everything_and_zero_nothing(identity: bool, recovered: float, subject: Subject) -> None:
    (token_ids, lengths), model = text(), constant(identity)
    x = kept(subject, token_ids, lengths)
    measured, downstream = Reconstruction(model, x), Downstream(subject, model, x.mean(dim=0))
    measured.add(x)
    downstream.add(token_ids, lengths)
    found = {**measured.metrics(), **downstream.metrics()}
    assert found["loss_recovered"] == recovered
    if identity:
        assert found["loss_recovered_mean"] == 1
        assert found["kl_reconstructed"] == found["fvu"] == found["normalized_mse"] == found["fvu_input"] == 0
        assert found["loss_reconstructed"] == found["loss_clean"]
        assert found["cosine"] == pytest.approx(1)
    else:
        assert found["loss_reconstructed"] == found["loss_zero_ablated"]
        assert found["normalized_mse"] == pytest.approx(1)
        assert found["cosine"] == 0
        assert found["fvu"] == pytest.approx(float(fvu(torch.zeros_like(x), x)), rel=1e-6)


def test_a_single_logit_has_the_least_effective_fraction_and_equal_ones_the_largest() -> None:
    change = torch.zeros(4, 10)
    assert effective_fraction(change) is None
    assert effective_fraction(change + 3) is None  # moves no probability
    change[1, 2] = -5
    assert effective_fraction(change) == pytest.approx(1 / 40)
    change[3, 7] = 5
    assert effective_fraction(change) == pytest.approx(2 / 40)
    signs = torch.tensor([1.0, -1.0]).repeat(5)
    alike = torch.cat([signs[:, None], torch.zeros(10, 1), -signs[:, None]], dim=1)
    assert effective_fraction(alike) == pytest.approx(2 / 3)


@pytest.mark.parametrize("normalize", [True, False])
def test_ablation_sparsity_equals_a_slow_computation(normalize: bool, subject: Subject) -> None:
    (token_ids, _), model, pos = text(), drawn(TopK(4), normalize), 3
    ids = token_ids[0]
    sparsity = AblationSparsity(subject, model, torch.Generator().manual_seed(0))
    sparsity.add(ids, pos, n=4)
    assert len(sparsity.fractions) == 4
    window = ids[: pos + 16]
    with torch.no_grad():
        acts = subject.activations(window[None])[0]
        _, latents, _ = model(acts[pos][None])
    expected = []
    for latent in latents[0].nonzero().flatten().tolist():
        changed = acts.clone()
        scale = float(acts[pos].std()) if normalize else 1.0
        changed[pos] -= latents[0, latent] * model.decoder_rows[latent].detach() * scale
        logits = [subject.logits(window[None], lambda _, acts=rows: acts[None])[0] for rows in (changed, acts)]  # type: ignore[misc]
        change = (logits[0] - logits[1])[pos:].double().numpy()
        change -= np.sort(change, axis=1)[:, [(change.shape[1] - 1) // 2]]
        expected.append(np.abs(change).sum() ** 2 / (change**2).sum() / change.size)
    assert sorted(sparsity.fractions) == pytest.approx(sorted(expected), rel=1e-2)
    assert sparsity.metrics()["ablation_sparsity"] == pytest.approx(np.mean(expected), rel=1e-2)


def test_nothing_is_told_where_nothing_was_ablated(subject: Subject) -> None:
    assert AblationSparsity(subject, drawn(TopK(4)), torch.Generator()).metrics() == {}


def counts(histogram: distributions.Histogram) -> list[tuple[float, float, int]]:
    return list(zip(*(column.tolist() for column in histogram), strict=True))


def test_histograms_count_every_value_once_in_bins_without_gaps() -> None:
    density = torch.tensor([0.0, 0.0, 1e-4, 0.0025, 0.3, 1.0], dtype=torch.float64)
    (zeros, *bins) = counts(distributions.by_logarithm(density))
    assert zeros == (0, 0, 2)
    assert sum(n for _, _, n in bins) == 4
    for value in density[2:].tolist():
        (n,) = (n for low, high, n in bins if low <= value < high)
        assert n == 1
    for one, other in itertools.pairwise(bins):
        assert one[1] == other[0]
        assert other[1] / other[0] == pytest.approx(10 ** (1 / distributions.PER_DECADE))
    assert counts(distributions.by_logarithm(torch.zeros(3, dtype=torch.float64))) == [(0, 0, 3)]
    values = torch.tensor([0.1, 0.1, 5.0], dtype=torch.float64)
    of_values = counts(distributions.in_equal_bins(values))
    assert (len(of_values), of_values[0][0], of_values[1][2], of_values[-1][2]) == (50, 0, 2, 1)
    assert of_values[-1][1] > 5
    of_numbers = counts(distributions.by_number(torch.tensor([0, 0, 3, 0, 1])))
    assert of_numbers == [(2, 3, 3), (3, 4, 0), (4, 5, 1)]
    wide = counts(distributions.by_number(torch.ones(1001, dtype=torch.int64)))
    assert len(wide) <= 50
    assert sum(n for _, _, n in wide) == 1001


@pytest.mark.slow
def test_figures_of_a_real_model_equal_a_slow_computation() -> None:
    subject: Any = Subject.load("smollm2", "blocks.4.hook_resid_pre", masked_positions=(0,))
    ids = subject.tokenizer("The capital of France is Paris, and that of Spain is", return_tensors="pt")["input_ids"]
    lengths = torch.tensor([ids.shape[1]])
    torch.manual_seed(0)
    model = Autoencoder(64, subject.d_model, TopK(8), normalize=True)
    downstream = Downstream(subject, model, torch.zeros(subject.d_model))
    downstream.add(ids, lengths)
    acts = subject.activations(ids)[0]
    with torch.no_grad():
        latents, info = model.encode(acts)
        changed = torch.cat([acts[:1], model.decode(latents, info)[1:]])
    found = downstream.metrics()
    for name, given in (("clean", None), ("reconstructed", changed)):
        rows = losses(subject, ids[0], given)
        expected = -sum(float(row[token]) for row, token in zip(rows, ids[0, 1:], strict=True)) / len(rows)
        assert math.isclose(found[f"loss_{name}"], expected, rel_tol=1e-4), name
    assert found["loss_zero_ablated"] == found["loss_mean_ablated"]
    assert found["loss_zero_ablated"] > found["loss_clean"]
