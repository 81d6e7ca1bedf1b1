"""FLIP's local training: benign clients invert triggers and harden their models against them.

Source: FLIP, "A Provable Defense Framework for Backdoor Mitigation in Federated Learning" (Zhang, Tao, Xu, Cheng, An,
Liu, Feng, Shen, Chen, Ma, Zhang; ICLR 2023), algorithm 1 and appendix A.1, and the authors' released code. The parts
are in `client/flip/`; the class distances and triggers of a client live in its state, from round to round.
"""

import math
from typing import Literal

import torch

from client.flip.distances import ClassDistances
from client.flip.hardening import Hardening, HardeningSettings
from client.flip.techniques import inverter
from client.flip.triggers import InversionSettings, Precision, check_inputs
from client.trainer import LocalJob, LocalResult
from tasks.errors import SpecError
from tasks.model import SeededDropout, set_dropout_generator

Technique = Literal["neural_cleanse", "neuron_stimulation", "oracle", "random_white", "random_colour"]


def flip(
    job: LocalJob,
    *,
    variant: Literal["paper", "released"] = "paper",
    inversion: Literal[
        "neural_cleanse", "neuron_stimulation", "oracle", "random_white", "random_colour"
    ] = "neural_cleanse",
    lr: float | None = None,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    epochs: int = 10,
    steps: int = 110,
    batch_size: int = 64,
    min_images: int | None = None,
    portion: float = 0.5,
    extra: int = 64,
    samples: int = 8,
    warm_samples: int = 1,
    threshold: float = 0.9,
    warm_steps: int = 400,
    first_steps: int = 200,
    second_steps: int = 50,
    alpha: float = 1e-3,
    second_alpha: float = 1e-2,
    max_size: float = 98.0,
    random_pairs: float = 0.3,
    pairs_at_once: int = 5,
    order: Literal["farthest", "closest"] = "farthest",
    warm_each_round: bool = False,
    early_exit: int = 0,
    precision: Precision = "float32",
) -> LocalResult:
    """Train `epochs` passes over the client's data, at most `steps` batches, hardening pairs of classes on the way.

    The numbers are FLIP's for MNIST, but for the variant ``paper``, whose SGD has rate 0.01 (with the paper's 0.1
    and momentum, models diverge within a round); ``released`` has Adam at 0.01. `min_images` is 5 on the client, or 1
    in a batch. `samples` is how many images of a class a trigger is sought on (variant ``paper``); `max_size` the L1
    norm above which a trigger is not used. `pairs_at_once` pairs are sought as one batch; `precision` is that of the
    model while they are sought (bfloat16: triggers are tried on the exact model before they count).
    """
    released = variant == "released"
    fewest = (1 if released else 5) if min_images is None else min_images
    counts = (epochs, steps, fewest, extra, samples, warm_samples, warm_steps, first_steps, second_steps, early_exit)
    shares = (portion, random_pairs, threshold)
    rates = (lr or 0.0, momentum, weight_decay, alpha, second_alpha)
    if min(*counts, *rates, *shares, max_size) < 0 or max(shares) > 1 or min(batch_size, pairs_at_once) < 1:
        raise SpecError(
            "flip wants counts and rates of at least 0, batch_size and pairs_at_once of at least 1, shares in [0, 1]"
        )
    check_inputs(job.dataset.batch("train", job.indices[:1])[0])
    settings = HardeningSettings(
        variant=variant,
        batch_size=batch_size,
        limit=min(1 if job.trial else steps, epochs * math.ceil(len(job.indices) / batch_size)),
        min_images=fewest,
        portion=portion,
        extra=extra,
        samples=samples,
        warm_samples=warm_samples,
        warm_steps=min(warm_steps, 1) if job.trial else warm_steps,
        first_steps=first_steps,
        second_steps=second_steps,
        alpha=alpha,
        second_alpha=second_alpha,
        max_size=max_size,
        random_pairs=random_pairs,
        pairs_at_once=pairs_at_once,
        order=order,
        warm_each_round=warm_each_round,
    )
    job.model.train()
    if any(isinstance(module, SeededDropout) for module in job.model.modules()):
        set_dropout_generator(job.model, job.generator("dropout"))
    distances = ClassDistances.load(job.state, job.dataset.num_classes, job.dataset.input_shape)
    found = InversionSettings(threshold=threshold, early_exit=early_exit, precision=precision)
    search = inverter(inversion, found, job)
    work = Hardening(job, settings, distances, search, _optimizer(job, released, lr, momentum, weight_decay))
    work.run()
    distances.save(job.state)
    loss = float(torch.stack(work.losses).mean()) if work.losses else 0.0
    return LocalResult(job.vector, len(job.indices), loss, metrics=work.metrics())


def _optimizer(
    job: LocalJob, released: bool, lr: float | None, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return the variant's optimiser, fresh in every round."""
    parameters = list(job.model.parameters())
    if released:
        return torch.optim.Adam(parameters, lr=0.01 if lr is None else lr, betas=(0.5, 0.9))
    return torch.optim.SGD(parameters, lr=0.01 if lr is None else lr, momentum=momentum, weight_decay=weight_decay)
