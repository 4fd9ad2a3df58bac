"""The autoencoder: its definition on one device, in plain torch.

latents = activation(encoder(x - pre_bias) + latent_bias);  recons = decoder(latents) + pre_bias

Shapes: B rows, d = d_model features, n = n_latents latents, k selected latents per row.
Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sae.activations import Activation, Identity, Own, ReLU, TopK, made
from sae.collectives import Group, sum_backward, sum_forward
from sae.kernels.decode import decode
from sae.kernels.exact import encode_exact, round_encoder, takes_rounded
from sae.kernels.scatter import sparse_t_matmul
from sae.kernels.topk import Selected, topk
from sae.matryoshka import Nested
from sae.mesh import Mesh
from sae.products import rounded_product
from sae.schemas.errors import AutoencoderError

__all__ = ["Autoencoder", "Identity", "Info", "Nonzeros", "ReLU", "TopK", "check_tensors"]

Info = dict[str, Tensor]
"""What `preprocess` took out and decoding puts back: empty, or mean and std, each [..., 1]."""

NORMALIZE_EPS = 1e-5

# Dense latents that are made at once to find those that are not zero: 512 MB in float32.
_DENSE: Final = 1 << 27


class Nonzeros(NamedTuple):
    """The strictly positive latents of a batch, ordered by (row, latent); three tensors of one length."""

    row: Tensor
    latent: Tensor
    value: Tensor


class _Linear(nn.Module):
    """A weight without a bias, drawn as torch's linear layer draws it."""

    def __init__(self, n_latents: int, d_model: int, *, transposed: bool) -> None:
        super().__init__()
        rows = torch.empty(n_latents, d_model).uniform_(-1, 1) / d_model**0.5
        self.weight = nn.Parameter(rows.T if transposed else rows)


class Autoencoder(nn.Module):
    """Sparse autoencoder with any activation, tied or not, with or without input normalisation.

    With `normalize`, each row is centred and divided by its standard deviation (unbiased, plus 1e-5)
    before encoding, and this is undone after decoding.

    It may be one of several equal shards: then n_latents is what this rank holds, `tp` are the ranks that hold all
    between them in order of their latents, and dense latents are the shard's own, of which k in all are selected.

    Trained with `nested` prefixes, each of them reconstructs by itself too. What it reconstructs has the width d_out,
    which is d_model but for a transcoder.

    Raises AutoencoderError for sizes that cannot be.
    """

    rounds: bool = False
    """Whether dense latents are made, and reconstruct, by products in bfloat16; for training on a GPU."""
    stats_last_nonzero: Tensor
    latents_activation_frequency: Tensor
    latents_mean_square: Tensor

    def __init__(
        self,
        n_latents: int,
        d_model: int,
        activation: Activation | None = None,
        tied: bool = False,
        normalize: bool = False,
        tp: Group | None = None,
        nested: Nested | None = None,
        d_out: int | None = None,
    ) -> None:
        super().__init__()
        self.activation: Activation = activation if activation is not None else ReLU()
        self.tp = tp if tp is not None else Group()
        self.nested = nested if nested is not None else Nested()
        _check_sizes(n_latents, d_model)
        self.activation.check(n_latents, self.tp.size)
        self.nested.check(n_latents * self.tp.size)
        self._of_shard = self.activation.on_shard(self.tp.size)
        self.n_latents = n_latents
        self.d_model = d_model
        self.d_out = d_out if d_out is not None else d_model
        self.tied = tied
        self.normalize = normalize
        self.pre_bias = nn.Parameter(torch.zeros(d_model))
        self.encoder = _Linear(n_latents, d_model, transposed=False)
        self.latent_bias = nn.Parameter(torch.zeros(n_latents))
        # [d, n] as published, but stored latent by latent: sparse decoding reads whole rows.
        self.decoder = None if tied else _Linear(n_latents, self.d_out, transposed=True)
        self.register_buffer("stats_last_nonzero", torch.zeros(n_latents, dtype=torch.int64))
        self.register_buffer("latents_activation_frequency", torch.ones(n_latents))
        self.register_buffer("latents_mean_square", torch.zeros(n_latents))
        own = self.activation.tensors(n_latents)
        self._own_names = tuple(own)
        for name, tensor in own.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def like(self, n_latents: int, tp: Group) -> Self:
        """An autoencoder that is this one but for the number of latents and the ranks; its weights are drawn."""
        return type(self)(n_latents, self.d_model, self.activation, self.tied, self.normalize, tp, self.nested)

    @property
    def output_bias(self) -> Tensor:
        """What reconstructions [..., d] begin from."""
        return self.pre_bias

    @property
    def own(self) -> Own:
        """The tensors that the activation needs."""
        return {name: getattr(self, name) for name in self._own_names}

    @property
    def decoder_rows(self) -> Tensor:
        """The dictionary [n, d], one row per latent: the encoder itself when tied."""
        return self.encoder.weight if self.decoder is None else self.decoder.weight.T

    @property
    def decoder_rows_grad(self) -> Tensor | None:
        """The gradient of `decoder_rows` [n, d], or None before backward."""
        if self.decoder is None:
            return self.encoder.weight.grad
        grad = self.decoder.weight.grad
        return None if grad is None else grad.T

    def preprocess(self, x: Tensor) -> tuple[Tensor, Info]:
        """Normalise x [..., d] where the model does so; the second result undoes it in decoding.

        Raises AutoencoderError when x has another width.
        """
        self._check_width(x)
        if not self.normalize:
            return x, {}
        mean = x.mean(dim=-1, keepdim=True)
        centred = x - mean
        # The standard deviation of centred rows, in a sixth of the time that std takes.
        std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / (self.d_model - 1) ** 0.5
        return centred / (std + NORMALIZE_EPS), {"mean": mean, "std": std}

    def seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of raw x [..., d], in the space that the model encodes: what goes in, and what is to come out."""
        x, _ = self.preprocess(x)
        return x, x

    def expected(self, x: Tensor) -> Tensor:
        """What is to come out [..., d] of raw x."""
        return x

    def add_bypass(self, recons: Tensor, x: Tensor) -> Tensor:
        """recons [..., d] with what of preprocessed x [..., d] goes into them beside the latents."""
        return recons

    def encode_pre_act(self, x: Tensor, latent_slice: slice = slice(None)) -> Tensor:
        """Pre-activations [..., n] (or those of the slice) of x [..., d], which is already preprocessed."""
        self._check_width(x)
        weight, bias = self.encoder.weight[latent_slice], self.latent_bias[latent_slice]
        centred = x - sum_backward(self.pre_bias, self.tp)
        if self.rounds:
            return rounded_product(centred, weight.T) + bias
        return nn.functional.linear(centred, weight, bias)

    def encode(self, x: Tensor) -> tuple[Tensor, Info]:
        """Latents [..., n], dense, of raw x [..., d]."""
        x, info = self.preprocess(x)
        return self.activate(self.encode_pre_act(x)), info

    def activate(self, pre_act: Tensor) -> Tensor:
        """Latents [..., n], dense, of pre-activations [..., n]."""
        if self.tp.size == 1 or not isinstance(self.activation, TopK):
            return self._of_shard(pre_act, self.own)
        rows = pre_act.reshape(-1, self.n_latents)
        values, indices = self.select(rows, self.activation.k)
        values = torch.where(values.isneginf(), 0, self.activation.postact(values))
        return torch.zeros_like(rows).scatter(1, indices, values).view(pre_act.shape)

    def activate_to_train(self, pre_act: Tensor, mesh: Mesh) -> Tensor:
        """The same in a training step on a mesh, of the pre-activations [B, n] of all its rows."""
        if isinstance(self.activation, TopK):
            return self.activate(pre_act)
        return self._of_shard.train(pre_act, self.own, mesh)

    def select(self, pre_act: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Values and indices of the k largest pre-activations [B, n] of each row; the smaller latent wins a tie.

        Of a shard, candidates that others have beaten come with the value -infinity.
        """
        values, indices = topk(pre_act, min(k, pre_act.shape[1]))
        if self.tp.size == 1:
            return values, indices
        indices, order = indices.sort(dim=1)
        return won(self.tp, values.gather(1, order), k), indices

    def recombine(self, latents: Tensor) -> Tensor:
        """Reconstructions [..., d] of dense latents [..., n], in the space that the model encodes."""
        return sum_forward(self.product(latents, self.decoder_rows), self.tp) + self.output_bias

    def product(self, latents: Tensor, rows: Tensor) -> Tensor:
        """Dense latents [..., m] times as many decoder rows [m, d]."""
        return rounded_product(latents, rows) if self.rounds else latents @ rows

    def recombine_sparse(self, values: Tensor, indices: Tensor) -> Tensor:
        """The same [B, d] of sparse latents, values and indices [B, k]."""
        return sum_forward(decode(values, indices, self.decoder_rows), self.tp) + self.output_bias

    def encode_topk(self, x: Tensor) -> tuple[Tensor, Tensor, Info]:
        """Values [B, k] and indices [B, k] int64 of the selected latents of raw x [B, d].

        Values are descending pre-activations through the post-activation, so some may be zero. Gradients
        reach the parameters through the selected latents only, and never x.

        Raises AutoencoderError when the activation is not TopK.
        """
        if not isinstance(self.activation, TopK):
            raise AutoencoderError(
                f"encode_topk was called on an autoencoder with activation {self.activation.name}; "
                f"it needs TopK: use encode or nonzeros"
            )
        x, info = self.preprocess(x)
        with torch.no_grad():
            values, latents = self._selected(x, self.activation.k, None)
            order = values.nan_to_num(-torch.inf, torch.inf, -torch.inf).sort(dim=1, descending=True, stable=True)[1]
            values, indices = values.gather(1, order), latents.long().gather(1, order)
        return self.activation.postact(self.attach(x, values, indices)), indices, info

    def attach(self, x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        """Return pre-activations computed without a graph, [B, k], as differentiable ones.

        x [B, d] is preprocessed; values must be encode_pre_act(x) at indices [B, k]. The backward pass is
        sparse: only the chosen latents are touched. x gets no gradient.
        """
        parameters = sum_backward(self.pre_bias, self.tp), self.encoder.weight, self.latent_bias
        attached = _SelectedPreActs.apply(x, *parameters, values, indices)  # type: ignore[no-untyped-call]
        return cast(Tensor, attached)

    @torch.no_grad()
    def nonzeros(self, x: Tensor, rounded_encoder: Tensor | None = None) -> Nonzeros:
        """The strictly positive latents of raw x [B, d], whatever the activation.

        For many batches with the same weights, pass what `rounded_encoder` returned: else it is made for each.
        """
        if not isinstance(self.activation, TopK):
            return self._dense_nonzeros(x)
        x, _ = self.preprocess(x)
        values, indices = self._selected(x, self.activation.k, rounded_encoder)
        values = self.activation.postact(values)
        row, column = (values > 0).nonzero(as_tuple=True)
        return Nonzeros(row, indices[row, column].long(), values[row, column])

    def _dense_nonzeros(self, x: Tensor) -> Nonzeros:
        at_once = max(1, _DENSE // self.n_latents)
        parts = []
        for first, rows in enumerate(x.split(at_once)):
            latents, _ = self.encode(rows)
            row, latent = (latents > 0).nonzero(as_tuple=True)
            parts.append(Nonzeros(row + first * at_once, latent, latents[row, latent]))
        return Nonzeros(*map(torch.cat, zip(*parts, strict=True)))

    def rounded_encoder(self) -> Tensor | None:
        """What `nonzeros` needs of the encoder beside its weights on a GPU, and None where it needs nothing.

        To be made anew when the weights have changed.
        """
        if not isinstance(self.activation, TopK) or not takes_rounded(self.encoder.weight):
            return None
        return round_encoder(self.encoder.weight)

    def _selected(self, x: Tensor, k: int, rounded_encoder: Tensor | None) -> Selected:
        """The k largest pre-activations [B, k] of preprocessed x [B, d], by ascending latent."""
        self._check_width(x)
        if self.tp.size > 1:
            raise AutoencoderError("a shard was asked to encode by itself: use select or activate, or the whole one")
        return encode_exact(x - self.pre_bias, self.encoder.weight, self.latent_bias, k, rounded_encoder)

    def decode(self, latents: Tensor, info: Info | None = None) -> Tensor:
        """Reconstructions [..., d] of dense latents [..., n], in the space of the raw input.

        Raises AutoencoderError when the model normalises and info of `preprocess` is missing.
        """
        return self._undo(self.recombine(latents), info)

    def decode_sparse(self, values: Tensor, indices: Tensor, info: Info | None = None) -> Tensor:
        """Reconstructions [B, d] of sparse latents, values and indices [B, k]; see `decode`."""
        return self._undo(self.recombine_sparse(values, indices), info)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pre-activations [..., n], latents [..., n] and reconstructions [..., d] of raw x [..., d].

        Changes no statistics.
        """
        x, info = self.preprocess(x)
        pre_act = self.encode_pre_act(x)
        latents = self.activate(pre_act)
        return pre_act, latents, self.decode(latents, info)

    def config(self) -> dict[str, Any]:
        """All that `from_config` needs, as JSON values."""
        state = self.activation.state
        return {
            "n_latents": self.n_latents * self.tp.size,
            "d_model": self.d_model,
            "activation": self.activation.name,
            "k": state.get("k"),
            "postact": state.get("postact_fn"),
            "normalize": self.normalize,
            "tied": self.tied,
            **({"activation_state": state} if state.keys() - {"k", "postact_fn"} else {}),
            **({"prefixes": list(self.nested.sizes)} if self.nested.sizes else {}),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build an untrained autoencoder from `config`; load its tensors with load_state_dict.

        Raises AutoencoderError when a key is missing or a value is not allowed.
        """
        missing = {"n_latents", "d_model", "activation", "normalize", "tied"} - config.keys()
        if missing:
            raise AutoencoderError(f"autoencoder config lacks {_names(missing)}: it was not written by this project")
        return cls(**cls._given(config))

    @staticmethod
    def _given(config: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `__init__` that a config names."""
        state = {"k": config.get("k"), "postact_fn": config.get("postact") or "ReLU"}
        return {
            **{name: config[name] for name in ("n_latents", "d_model", "tied", "normalize")},
            "activation": made(config["activation"], {**state, **config.get("activation_state", {})}),
            "nested": Nested(tuple(config.get("prefixes", ()))),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers alone, each contiguous, under their published names."""
        return {name: tensor.contiguous() for name, tensor in super().state_dict().items()}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Parameters, buffers and activation, as published.

        `tied` and `normalize` are added only where the published format could not tell them.
        """
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        state[prefix + "activation"] = self.activation.name
        state[prefix + "activation_state_dict"] = self.activation.state
        if self.tied:
            state[prefix + "tied"] = True
        if self.normalize != isinstance(self.activation, TopK):
            state[prefix + "normalize"] = self.normalize
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load tensors of `state_dict` or `tensors`.

        Raises AutoencoderError in one line when keys or shapes do not fit (always strictly).
        """
        tensors = {name: value for name, value in state_dict.items() if name not in _METADATA}
        check_tensors(tensors, {name: value.shape for name, value in super().state_dict().items()})
        return super().load_state_dict(tensors, strict=strict, assign=assign)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> Autoencoder:
        """Build an autoencoder from the published format; the caller's mapping is left as it was.

        The activation is ReLU where none is named; input normalisation follows the key `normalize`
        and, where that is absent, holds for TopK. Parameters keep the stored floating-point type.

        Raises AutoencoderError when a key is missing or unknown or a shape does not fit.
        """
        state = dict(state_dict)
        tied = bool(state.get("tied", _TIED_ALIAS in state))
        state.pop(_TIED_ALIAS, None)
        weight = state.get("encoder.weight")
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise AutoencoderError(
                "state dict has no encoder.weight [n_latents, d_model]: it does not hold an autoencoder"
            )
        activation = made(state.get("activation", ReLU.name), state.get("activation_state_dict", {}))
        normalize = bool(state.get("normalize", isinstance(activation, TopK)))
        autoencoder = cls(weight.shape[0], weight.shape[1], activation, tied, normalize).to(weight.dtype)
        for name, buffer in autoencoder.named_buffers():
            state.setdefault(name, buffer)
        autoencoder.load_state_dict(state)
        return autoencoder

    def _undo(self, recons: Tensor, info: Info | None) -> Tensor:
        if not self.normalize:
            return recons
        if not info:
            raise AutoencoderError(
                "decoding was called without info on an autoencoder that normalises its input: "
                "pass the info that encode or preprocess returned"
            )
        return recons * info["std"] + info["mean"]

    def _check_width(self, x: Tensor) -> None:
        if x.ndim == 0 or x.shape[-1] != self.d_model:
            width = x.shape[-1] if x.ndim else "none"
            raise AutoencoderError(
                f"input has width {width}, the autoencoder has d_model {self.d_model}: "
                f"it was probably trained on another subject model or hook"
            )


def won(group: Group, values: Tensor, k: int) -> Tensor:
    """Of each rank's candidates [B, c], by ascending latent, keep the k largest of all ranks; others: -infinity.

    Of equal ones the smaller latent wins: that of the lower rank, and among a rank's own the first. Exact, whatever
    ranks the winners are on.
    """
    if group.size == 1 and values.shape[1] <= k:
        return values
    (rows, c), everyone = values.shape, group.gather(values)
    candidates = everyone.view(group.size, rows, c).transpose(0, 1).reshape(rows, group.size * c)
    _, winners = topk(candidates, min(k, candidates.shape[1]))
    winning = torch.zeros_like(candidates, dtype=torch.bool).scatter_(1, winners.long(), True)
    return values.masked_fill(~winning[:, group.share(winning.shape[1])], -torch.inf)


class _SelectedPreActs(torch.autograd.Function):
    """Pre-activations at chosen latents: computed beforehand, differentiated here."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, pre_bias: Tensor, weight: Tensor, bias: Tensor, values: Tensor, indices: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, pre_bias, weight, indices)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, pre_bias, weight, indices = ctx.saved_tensors
        n = weight.shape[0]
        # A product with ones rather than scatter_add: no atomics, so the same bits in every run.
        grad_bias = sparse_t_matmul(grad, indices, grad.new_ones(grad.shape[0], 1), n).squeeze(1)
        grad_weight = sparse_t_matmul(grad, indices, x - pre_bias, n)
        return None, -(grad_bias @ weight), grad_weight, grad_bias, None, None


_METADATA = {"activation", "activation_state_dict", "tied", "normalize"}
_TIED_ALIAS = "decoder.linear.weight"


def _names(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _check_sizes(n_latents: int, d_model: int) -> None:
    if n_latents < 1 or d_model < 1:
        raise AutoencoderError(f"n_latents is {n_latents} and d_model is {d_model}: both must be at least 1")


def check_tensors(tensors: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> None:
    """Raise AutoencoderError unless tensors has exactly these names with these shapes."""
    missing, unknown = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys()
    if missing:
        raise AutoencoderError(f"state dict lacks {_names(missing)}: the checkpoint is incomplete or of another kind")
    if unknown:
        raise AutoencoderError(f"state dict has unknown keys {_names(unknown)}: the checkpoint is of another kind")
    for name, shape in shapes.items():
        if not isinstance(tensors[name], Tensor) or tensors[name].shape != shape:
            found = list(getattr(tensors[name], "shape", [])) or type(tensors[name]).__name__
            raise AutoencoderError(
                f"state dict has {name} of shape {found}, expected {list(shape)}: "
                f"the checkpoint is damaged or belongs to another autoencoder"
            )
