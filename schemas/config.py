"""The run config: one YAML file describes a run and is validated whole before anything starts."""

import difflib
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from sae.schemas.errors import ConfigError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Subject(_Section):
    """The language model and the place in it where activations are read."""

    model: str = Field(min_length=1, description="a name or folder that transformer_lens boots, or smollm2")
    hook: str = Field(min_length=1, description="blocks.8.hook_resid_post, or LOCATION.LAYER")
    output_hook: str | None = Field(
        None, min_length=1, description="a later hook, for a transcoder: its latents of hook reconstruct what is there"
    )
    layers: Count | None = Field(None, description="load only the first N blocks")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    masked_positions: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="positions of a context (attention sinks) left out of training and of the tables"
    )


class Corpus(_Section):
    """The text: .txt, .jsonl(.gz, .zst, .xz) or .parquet files, local or in an object store."""

    name: Name
    paths: list[str] = Field(min_length=1)
    text: str = "text"
    id: str | None = None
    source: str | None = None
    context_length: Annotated[int, Field(ge=2, le=65536)] = 64
    prepend_bos: bool = False
    on_bad_row: Literal["stop", "skip"] = "stop"


class Autoencoder(_Section):
    """Shape and activation of the sparse autoencoder (Gao et al. 2024, section 2)."""

    name: Name
    n_latents: Count
    k: Count = 32
    auxk: Annotated[int, Field(ge=0)] = 256
    activation: Literal["topk", "batchtopk", "groupmax", "jumprelu", "relu"] = Field(
        "topk", description="k is of the first three; jumprelu needs training.l0_coef, relu training.l1_coef"
    )
    prefixes: tuple[Count, ...] = Field(
        (), description="Matryoshka: numbers of latents, ascending, of which the first so many reconstruct alone too"
    )
    bandwidth: float = Field(
        0.1, gt=0, description="of jumprelu: around a threshold, of the activations that move it while it is learned"
    )
    skip: bool = Field(False, description="of a transcoder: a linear map from hook to output_hook beside the latents")
    normalize: bool = True
    tied: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.selects and self.k > self.n_latents:
            raise ValueError(f"k is {self.k}, more than n_latents {self.n_latents}; choose k <= n_latents")
        if self.activation == "groupmax" and self.n_latents % self.k:
            raise ValueError(
                f"k is {self.k}, which does not divide n_latents {self.n_latents}; groupmax needs groups of one size"
            )
        bounds = (0, *self.prefixes, self.n_latents)
        if any(one >= other for one, other in pairwise(bounds)):
            raise ValueError(
                f"prefixes are {list(self.prefixes)}; give ascending numbers below n_latents, {self.n_latents}"
            )
        return self

    @property
    def selects(self) -> bool:
        """Whether k says how many latents are active."""
        return self.activation in ("topk", "batchtopk", "groupmax")


class Training(_Section):
    """Optimisation; all lengths are counted in tokens."""

    tokens: Count = 50_000_000
    batch_tokens: Annotated[int, Field(ge=2)] = 131_072
    lr: float = Field(1e-4, gt=0)
    warmup_tokens: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="course of the learning rate after the warm-up; linear and cosine end at zero"
    )
    decay_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="last part of the run over which a constant learning rate falls to zero"
    )
    auxk_coef: float = Field(1 / 32, ge=0)
    multi_topk_coef: float = Field(
        0.0, ge=0, description="weight of the loss with four times k latents (1/8 in the paper); 0: none"
    )
    l1_coef: float = Field(0.0, ge=0, description="weight of the L1 loss; for activation relu")
    l0_coef: float = Field(0.0, ge=0, description="weight of the number of active latents; for activation jumprelu")
    dead_tokens: Count = Field(10_000_000, description="tokens without firing after which a latent is dead")
    ema: Fraction = 0.999
    clip_norm: float | None = Field(None, gt=0)
    source: Literal["live", "cached"] = "live"
    buffer_tokens: Count = Field(262_144, description="tokens that are shuffled together")
    harvest_batch: Count | None = Field(
        None,
        description="contexts in one forward pass of the subject; where absent, 16 on a CPU and on a GPU as many as "
        "have 65,536 tokens",
    )
    lanes: Count | None = Field(
        None,
        description="parts of the corpus that are read beside each other, for each rank to take some; as many as "
        "ranks where absent. A training keeps those that it began with",
    )
    validation: Fraction = Field(0.02, description="part of the documents held out of training")
    validation_tokens: Count = 16_384
    checkpoint_tokens: Count = 10_000_000
    keep_checkpoints: Count = Field(2, description="last checkpoints that are kept, beside the best one")
    max_failures: Annotated[int, Field(ge=0)] = Field(
        3, description="how often lost workers or nodes are replaced without a checkpoint in between"
    )
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()


class Encode(_Section):
    """How the corpus becomes latent rows. Only batch_contexts may change between two commands."""

    batch_contexts: Count | None = Field(None, description="as training.harvest_batch")
    run_tokens: Count = Field(262_144, description="tokens in one sorted run, the unit of work and of retry")
    bin_width: float = Field(0.2, gt=0, description="width of a histogram bin, in activation units")
    examples: Annotated[int, Field(ge=1, le=1000)] = Field(50, description="top and random examples an atom")
    weights: Literal["average", "plain"] = Field(
        "average", description="of evaluate too: the weights' moving average, or what they were after the last step"
    )
    checkpoint: Literal["last", "best"] = Field(
        "last",
        description="of evaluate too: the last one, or of those that are kept the one with the least held-out FVU",
    )


class Compact(_Section):
    file_rows: Count = Field(50_000_000, description="rows aimed at in one file of an atom range")
    memory_mb: Annotated[int, Field(ge=100)] = Field(800, description="memory of a task; each processor runs one")
    by_token: bool = Field(
        False, description="also keep a copy of every run in the order of tokens, and the tokens as arrays"
    )


class Effects(_Section):
    """What is known of an atom's effects. Where kinds, ranks or votes change, all are made anew."""

    atoms: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None = Field(
        None, description="first and last atom, both included; all when absent"
    )
    kinds: tuple[Literal["top", "random"], ...] = Field(("top", "random"), min_length=1)
    ranks: Count = Field(10, description="examples of each kind, the first ones")
    votes: Count = Field(10, description="tokens in each list of those that an atom raises or lowers most")
    logits: Count = Field(20, description="tokens that a decoder row raises most, and as many that it lowers most")
    neighbours: Count = Field(20, description="atoms that point where an atom points, and as many that fire with it")
    batch_contexts: Count | None = Field(None, description="as training.harvest_batch")
    unit_examples: Count = Field(1024, description="examples aimed at in one file, the unit of work and of retry")


class Explain(_Section):
    """N2G explanations. Where a key changes that decides what they are, all are made anew."""

    atoms: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None = Field(
        None, description="first and last atom, both included; all when absent"
    )
    kinds: tuple[Literal["top", "random"], ...] = Field(("top", "random"), min_length=1)
    ranks: Count = Field(10, description="examples of each kind that patterns are made from, the first ones")
    threshold: float = Field(
        0.5, gt=0, le=1, description="share of an example's activation that its shortest end must have"
    )
    saliency: float = Field(0.5, gt=0, le=1, description="share that a token must carry to stay in a pattern")
    length: Annotated[int, Field(ge=1, le=256)] = Field(16, description="tokens of an example that are tried at most")
    gap: Annotated[int, Field(ge=0, le=64)] = Field(
        8, description="tokens of any kind that may stand between two of a pattern; 0: as many as in the example"
    )
    padding: str | None = Field(
        None, min_length=1, description="a text of one token, which replaces others; the tokenizer's own where absent"
    )
    contexts: Count = Field(4096, description="contexts that explanations are measured on, drawn by the seed")
    batch_contexts: Count | None = Field(None, description="as training.harvest_batch; shorter ones fill as much")
    unit_atoms: Count = Field(512, description="atoms in one file, the unit of work and of retry")


class Evaluate(_Section):
    """What is measured on held-out text."""

    tokens: Count = Field(8_192, description="held-out tokens, of whole contexts")
    batch_contexts: Count = 8
    ablations: Annotated[int, Field(ge=0)] = Field(
        32, description="latents that are ablated, to see how sparse their effects on the logits are; 0: none"
    )
    labels: tuple[str, ...] = Field(
        (), description="columns of the corpus that tell the class of a document, for probes; read from its files"
    )
    probe_latents: tuple[Count, ...] = Field((1, 5), description="latents of a probe")
    probe_documents: Count = Field(400, description="labelled documents, drawn at random; of each its first context")
    report: str | None = Field(
        None,
        min_length=1,
        description="an HTML file, with {name} for the autoencoder; in the lake, reports/evaluation-NAME.html, where "
        "absent",
    )


class Export(_Section):
    format: Literal[
        "openai", "site", "html", "saedashboard", "neuronpedia", "saelens", "sparsify", "openai-weights"
    ] = Field(
        "openai",
        description="openai: the reference viewer's JSON; site: a folder with the viewer and its data; html: the same "
        "in one file, for a handful of atoms; saedashboard, neuronpedia: files of these programs; saelens, sparsify, "
        "openai-weights: the autoencoder's weights, as these programs and the published ones have them",
    )
    folder: str = "viewer-data"
    atoms: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None = Field(
        None, description="first and last atom, both included; all when absent"
    )
    pick: tuple[Annotated[int, Field(ge=0)], ...] = Field((), max_length=20, description="for html: single atoms")
    path: str | None = Field(
        None, description="folder of one autoencoder; where absent, one that the format's readers find"
    )
    decimals: Annotated[int, Field(ge=1, le=9)] = 4
    warning: str | None = Field(
        None, description="for site, html: what is said before the first page; a site keeps it until another is given"
    )


class Cluster(_Section):
    address: str = Field("local", description="local, auto, or the address of a Ray head")
    tp: Count = Field(1, description="workers that share the latents of one autoencoder")
    dp: Count = Field(1, description="workers, or groups of tp, that share the rows of a batch")
    timeout_s: float = Field(60.0, gt=0, description="after which a worker stops waiting for another one")
    gpus_per_worker: float | None = Field(
        None, ge=0, description="GPUs of each worker; where absent, one if the cluster has any as the step begins"
    )
    harvest_actors: Count = 1
    encode_actors: Count = 1


class Run(_Section):
    """One run: every step reads the same file."""

    lake: str = Field(min_length=1)
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    subject: Subject
    corpus: Corpus
    autoencoder: Autoencoder
    autoencoders: tuple[Autoencoder, ...] = Field(
        (), description="several to train from the same batches, in the place of autoencoder"
    )
    training: Training = Training()
    encode: Encode = Encode()
    compact: Compact = Compact()
    evaluate: Evaluate = Evaluate()
    effects: Effects = Effects()
    explain: Explain = Explain()
    export: Export = Export()
    cluster: Cluster = Cluster()

    @model_validator(mode="before")
    @classmethod
    def _one_or_several(cls, values: Any) -> Any:
        """`autoencoder` is the first of `autoencoders`, whichever of the two is given."""
        if not isinstance(values, dict) or "autoencoders" not in values:
            return values
        if values["autoencoders"] in ([], ()):  # as in a config that was written out whole
            if "autoencoder" not in values:
                raise ValueError("autoencoders: got []; list should have at least 1 item")
            return values
        several = values["autoencoders"]
        if not isinstance(several, list | tuple):
            return values
        if values.get("autoencoder", several[0]) != several[0]:
            raise ValueError("autoencoder and autoencoders are both given; give one of them")
        return {**values, "autoencoder": several[0]}

    def each(self) -> list["Run"]:
        """The same run for each of its autoencoders alone."""
        several = self.autoencoders or (self.autoencoder,)
        return [self.model_copy(update={"autoencoder": one, "autoencoders": ()}) for one in several]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [one.name for one in self.autoencoders]
        if len(set(names)) < len(names):
            raise ValueError(f"autoencoders: the names {', '.join(names)} are not all different; rename one")
        self._check_mesh()
        self._check_transcoder()
        if len(names) > 1 and self.evaluate.report is not None and "{name}" not in self.evaluate.report:
            raise ValueError(
                f"evaluate.report is {self.evaluate.report}, one file for {len(names)} autoencoders; put {{name}} in it"
            )
        kept = set(range(self.corpus.context_length)) - set(self.subject.masked_positions)
        if not kept:
            raise ValueError(
                f"subject.masked_positions {list(self.subject.masked_positions)} leaves no token of a context of "
                f"{self.corpus.context_length}; mask fewer positions"
            )
        activations = {one.activation for one in self.autoencoders or (self.autoencoder,)}
        for key, activation in (("l1_coef", "relu"), ("l0_coef", "jumprelu"), ("multi_topk_coef", "topk")):
            others = sorted(activations - {activation})
            if others and getattr(self.training, key) > 0:
                raise ValueError(
                    f"training.{key} is for autoencoder.activation {activation}; with {others[0]} it must be 0"
                )
        if self.training.decay_fraction > 0 and self.training.schedule != "constant":
            raise ValueError(
                f"training.decay_fraction is for training.schedule constant; {self.training.schedule} falls over the "
                "whole run by itself, with it decay_fraction must be 0"
            )
        if self.training.batch_tokens > self.training.tokens:
            raise ValueError(
                f"training.batch_tokens is {self.training.batch_tokens}, more than training.tokens "
                f"{self.training.tokens}; lower it or train on more tokens"
            )
        return self

    def _check_transcoder(self) -> None:
        for one in self.autoencoders or (self.autoencoder,):
            if self.subject.output_hook is None and one.skip:
                raise ValueError(f"autoencoder.skip of {one.name} is for transcoders; give subject.output_hook too")
            if self.subject.output_hook is not None and one.tied:
                raise ValueError(
                    f"autoencoder.tied of {one.name} can't be true with subject.output_hook: a transcoder's encoder "
                    "and decoder are of other places"
                )

    def _check_mesh(self) -> None:
        tp, dp, batch = self.cluster.tp, self.cluster.dp, self.training.batch_tokens
        for one in self.autoencoders or (self.autoencoder,):
            # Of several, each is trained whole on one worker.
            if len(self.autoencoders) < 2 and one.n_latents % (tp * dp):
                raise ValueError(
                    f"cluster.tp {tp} times cluster.dp {dp} does not divide n_latents {one.n_latents} of {one.name}; "
                    "choose n_latents a multiple of it"
                )
        for parts, of in ((tp * dp, "cluster.tp times cluster.dp"), (self.training.lanes or 1, "training.lanes")):
            if batch % parts:
                raise ValueError(f"training.batch_tokens: {batch} is not divisible by {of}, {parts}; make it so")


def parse(text: str, overrides: Sequence[tuple[str, str]] = (), source: str = "config") -> Run:
    """The validated config of a YAML text, with `section.key` overrides put over it.

    Raises ConfigError with one line for each fault: key, value given, what is allowed.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {_one_line(str(error))}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected sections such as 'subject:', got {_shown(values)}")
    for key, value in overrides:
        _override(values, key, value)
    try:
        return Run.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {line}" for line in _fault_lines(error))) from None


def _override(values: dict[str, Any], key: str, text: str) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--{key}: {section} is a single value, not a section")
        values = inner
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--{key}: {text!r} is not a valid YAML value; quote it") from None


def _fault_lines(error: ValidationError) -> Iterator[str]:
    for fault in _told(error):
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            yield f"{key}: unknown key; {_allowed_keys(fault['loc'])}"
        elif fault["type"] == "missing":
            yield f"{key}: missing; it must be given"
        elif fault["type"] == "value_error":
            yield f"{key + ': ' if key else ''}{fault['ctx']['error']}"
        else:
            expected = fault["msg"].replace("Input should be", "expected")
            expected = f"{expected[0].lower()}{expected[1:]}".replace("tuple", "list")
            yield f"{key}: got {_shown(fault['input'])}; {expected}"


def _told(error: ValidationError) -> list[ErrorDetails]:
    """The faults of a config, each once: those of `autoencoders` are also its first one's and the whole list's."""
    faults = error.errors(include_url=False)
    if any(fault["loc"][:1] == ("autoencoders",) for fault in faults):
        faults = [fault for fault in faults if fault["loc"][:1] != ("autoencoder",)]
    inner = [fault for fault in faults if fault["loc"][:1] == ("autoencoders",) and len(fault["loc"]) > 1]
    return [fault for fault in faults if not inner or fault["loc"] != ("autoencoders",)]


def _allowed_keys(location: tuple[int | str, ...]) -> str:
    section: type[BaseModel] = Run
    for part in location[:-1]:
        if isinstance(part, int):  # a place in a list
            continue
        annotation = section.model_fields[part].annotation
        annotation = next(iter(get_args(annotation)), annotation)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return "no keys are allowed here"
        section = annotation
    allowed = list(section.model_fields)
    near = difflib.get_close_matches(str(location[-1]), allowed, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}allowed: {', '.join(allowed)}"


def in_yaml(value: object) -> str:
    """A value of plain JSON as a user writes it: null, true and false in the place of Python's names."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _shown(value: object) -> str:
    of_yaml = value is None or isinstance(value, bool)
    return _one_line(in_yaml(value) if of_yaml else repr(value))[:80]


def _one_line(text: str) -> str:
    return " ".join(text.split())
