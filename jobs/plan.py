"""`sae plan`: what the steps of a run will cost, by arithmetic alone; nothing is loaded, started or written."""

import dataclasses
import math
from argparse import Namespace
from typing import Any, Final, NamedTuple

from sae.jobs import plan_lake
from sae.jobs.costs import Mesh, Rates, Sizes, flops, memory, seconds, transfer_seconds, transfers
from sae.jobs.lake_costs import Hosts
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError

FREE: Final = 0.1
"""Share of a GPU's memory left to the CUDA context, to NCCL's buffers and to fragments."""

_GB: Final = 1e9
_ITEM: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
_CACHED_ITEM: Final = 2
# Estimates that differ by less are not told apart.
_CLEARLY: Final = 0.95


class Hardware(NamedTuple):
    """cores, encode_gpus: those that the lake's steps may use together; of GPUs, None stands for one an actor."""

    gpu_bytes: float
    rates: Rates
    cores: int = 16
    encode_gpus: int | None = None

    @property
    def usable(self) -> float:
        return (1 - FREE) * self.gpu_bytes

    def hosts(self, config: Run) -> Hosts:
        """For the lake's steps."""
        gpus = self.encode_gpus
        if gpus is None:
            gpus = 0 if config.cluster.gpus_per_worker == 0 else config.cluster.encode_actors
        return Hosts(self.cores, gpus, self.rates)


class Subject(NamedTuple):
    """Of the subject model; where its config was not read, None stands for what is not known."""

    d_model: int
    parameters: int | None = None
    flops: int | None = None
    whole_flops: int | None = None


def plan(given: Namespace, config: Run) -> None:
    """Prints what the run's steps will cost, as tables or as one JSON object.

    Raises ConfigError where the arithmetic is not that of the config, SubjectError where the subject's config is not at
    hand and no width is given.
    """
    from sae.jobs import plan_tables

    rates = dataclasses.replace(
        Rates(),
        product=given.tflops * 1e12,
        subject=given.tflops * 1e12 * Rates.subject / Rates.product,
        moved=given.memory_rate * _GB,
        link=given.link * _GB,
        network=given.network * _GB,
        gpus_per_host=given.gpus_per_host,
    )
    hardware = Hardware(given.gpu_gb * _GB, rates, given.cores, given.encode_gpus)
    report = report_of(config, hardware, given.gpus, given.dead, given.d_model, given.tokens)
    plan_tables.show(report, as_json=given.json)


def report_of(
    config: Run,
    hardware: Hardware,
    gpus: list[int],
    dead: float = 0.1,
    d_model: int | None = None,
    tokens: int | None = None,
) -> dict[str, Any]:
    """All figures as plain JSON, in bytes and seconds.

    gpus: numbers of GPUs to choose a mesh for; dead: share of the latents that are dead; tokens: of the corpus, where
    the lake does not know.
    """
    subject = _subject(config) if d_model is None else Subject(d_model)
    several = config.each()
    return {
        "train": [_training(one, subject, hardware, gpus, dead, len(several)) for one in several],
        "lake": plan_lake.report_of(config, _costs_of(subject, config), hardware.hosts(config), tokens),
    }


def _subject(config: Run) -> Subject:
    from sae.subject_shape import subject_shape  # with transformers, which takes seconds to import

    subject = config.subject
    shape = subject_shape(subject.model, subject.hook, subject.layers, config.corpus.context_length)
    whole = subject_shape(subject.model, subject.hook, None, config.corpus.context_length)
    # Each weight is multiplied once; that of the embedding, where it is not the unembedding's too, is not.
    return Subject(shape.d_model, shape.parameters, shape.flops, 2 * whole.parameters)


def _costs_of(subject: Subject, config: Run) -> dict[str, int]:
    """Width, bytes and operations for a token; those that are not known are not counted."""
    size = (subject.parameters or 0) * _ITEM[config.subject.dtype]
    return {
        "d_model": subject.d_model,
        "subject": size,
        "subject_flops": subject.flops or 0,
        "whole_flops": subject.whole_flops or 0,
    }


def sizes_of(config: Run, subject: Subject, dead: float) -> Sizes:
    """What the arithmetic needs to know of a run's training."""
    shape, training = config.autoencoder, config.training
    if shape.activation != "topk" or shape.tied:
        raise ConfigError(
            f"autoencoder {shape.name}: sae plan knows the costs of activation topk with weights that are not tied; "
            "plan such a one of the same size"
        )
    live, item = training.source == "live", _ITEM[config.subject.dtype]
    return Sizes(
        batch=training.batch_tokens,
        d_model=subject.d_model,
        n_latents=shape.n_latents,
        k=shape.k,
        auxk=shape.auxk,
        dead=dead,
        ema=training.ema > 0,
        clip=training.clip_norm is not None,
        multi=training.multi_topk_coef > 0,
        buffered=training.buffer_tokens,
        lanes=training.lanes,
        vector_item=item if live else _CACHED_ITEM,
        subject=(subject.parameters or 0) * item,
        subject_flops=(subject.flops or 0) if live else 0,
    )


def _training(
    config: Run, subject: Subject, hardware: Hardware, gpus: list[int], dead: float, n_autoencoders: int
) -> dict[str, Any]:
    """Of several autoencoders each is trained by one rank, which gets the rows that all ranks read."""
    sizes = sizes_of(config, subject, dead)
    mesh = Mesh(config.cluster.tp, config.cluster.dp)
    if n_autoencoders > 1:
        sizes, mesh, gpus = dataclasses.replace(sizes, readers=mesh.ranks), Mesh(), []
    steps = -(-config.training.tokens // config.training.batch_tokens)
    return {
        "autoencoder": config.autoencoder.name,
        "autoencoders": n_autoencoders,
        "d_model": sizes.d_model,
        "n_latents": sizes.n_latents,
        "k": sizes.k,
        "parameters": sizes.parameters,
        "subject_parameters": subject.parameters,
        "steps": steps,
        "tokens": steps * sizes.batch,
        "batch_tokens": sizes.batch,
        "dead": dead,
        "flops": flops(sizes),
        "gpu_bytes": hardware.gpu_bytes,
        **_on(sizes, mesh, hardware.rates),
        "checkpoints": _checkpoints(config, sizes, steps),
        "choices": [_choice(sizes, n, hardware) for n in gpus],
    }


def _on(sizes: Sizes, mesh: Mesh, rates: Rates) -> dict[str, Any]:
    """What a step costs each rank of a mesh."""
    items, times = memory(sizes, mesh), seconds(sizes, mesh, rates)
    step = sum(times.values())
    return {
        "tp": mesh.tp,
        "dp": mesh.dp,
        "rows": sizes.rows(mesh),
        "memory": items,
        "memory_bytes": sum(items.values()),
        "transfers": [
            {**dataclasses.asdict(one), "sent": one.sent, "seconds": transfer_seconds(one, mesh, rates)}
            for one in transfers(sizes, mesh)
        ],
        "seconds": times,
        "step_seconds": step,
        "tokens_per_second": sizes.batch / step,
    }


def _checkpoints(config: Run, sizes: Sizes, steps: int) -> dict[str, int]:
    training, every = config.training, config.training.checkpoint_tokens
    total = steps * sizes.batch
    last = total // every > (total - sizes.batch) // every  # the last step commits in any case
    written = min(steps, total // every + (not last))
    kept = min(written, training.keep_checkpoints + (training.validation > 0))
    size = sizes.model_bytes + sizes.state_bytes
    return {"written": written, "kept": kept, "bytes": size, "kept_bytes": kept * size}


def _choice(sizes: Sizes, gpus: int, hardware: Hardware) -> dict[str, Any]:
    """The mesh for so many GPUs: the smallest tp that fits, and all the rest dp."""
    for of, parts in (("n_latents", sizes.n_latents), ("batch_tokens", sizes.batch)):
        if parts % gpus:
            return _no_choice(gpus, f"{gpus} does not divide {of} {parts}")
    meshes = _meshes(gpus, hardware.rates.gpus_per_host)
    tried = [_on(sizes, mesh, hardware.rates) for mesh in meshes]
    fitting = [one for one in tried if one["memory_bytes"] <= hardware.usable]
    if not fitting:
        return _no_choice(gpus, _lacking(tried[-1], hardware))
    chosen, fastest = fitting[0], min(fitting, key=lambda one: one["step_seconds"])
    smaller = tried[tried.index(chosen) - 1]
    why = "fits" if chosen is tried[0] else _lacking(smaller, hardware)
    if fastest["step_seconds"] < _CLEARLY * chosen["step_seconds"]:
        why += f"; tp {fastest['tp']} may take {1e3 * fastest['step_seconds']:.2f} ms"
    return {"gpus": gpus, **chosen, "why": why}


def _no_choice(gpus: int, why: str) -> dict[str, Any]:
    return {"gpus": gpus, "tp": None, "dp": None, "why": why}


def _lacking(on: dict[str, Any], hardware: Hardware) -> str:
    return f"tp {on['tp']} needs {on['memory_bytes'] / _GB:.1f} GB of {hardware.usable / _GB:g}"


def _meshes(gpus: int, gpus_per_host: int) -> list[Mesh]:
    """Those of so many GPUs with each tp group on one host, by ascending tp."""
    whole = math.gcd(gpus, gpus_per_host)
    return [Mesh(tp, gpus // tp) for tp in range(1, whole + 1) if whole % tp == 0]
