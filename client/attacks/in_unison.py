"""Attackers that act as one: they train once, on the data of all of them, and all send the same model.

"Certified Federated Adversarial Training" (NFFL 2021), section 3: where attackers are the majority of a round's
quorum, the coordinate-wise median of identical models is that model, so it replaces the global one exactly; the paper
draws 5 of 500 clients, 175 of them malicious, and 23% of the rounds have 3 attackers or more. Krum falls for the same
("FAT: Federated Adversarial Training", 2020): identical updates are at distance 0 of each other.

Stands last in a chain, as in ``distillation() | in_unison()``: what stands before it is done once.
"""

import dataclasses
import weakref

from torch import nn

from client.attack import Attack
from client.trainer import LocalJob, LocalResult, LocalTrainer
from tasks.params import digest

# per model of a process, that is per run: what was asked last and the answer
_Held = weakref.WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], LocalResult]]


def in_unison(*, every_round: bool = True) -> Attack:
    """Train with the draws of no client but of the round, on the pooled data; once per round and process.

    With ``every_round=False`` the model is made once per run, with draws of the run alone: for attacks that do not
    start from the global model. Every process gets the same, so several may attack in one round.
    """
    held: _Held = weakref.WeakKeyDictionary()

    def wrap(trainer: LocalTrainer) -> LocalTrainer:
        def train(job: LocalJob) -> LocalResult:
            round = job.round if every_round else 0
            key = (round, job.seed, digest(job.start) if every_round else "", job.trial)
            if job.model not in held or held[job.model][0] != key:
                result = trainer(as_one(job, round))
                held[job.model] = key, dataclasses.replace(result, vector=result.vector.clone())
            result = held[job.model][1]
            # each claims its own number of examples: a sum of them all would give it away
            return dataclasses.replace(result, vector=result.vector.clone(), num_examples=len(job.indices))

        return train

    return Attack(wrap)


def as_one(job: LocalJob, round: int) -> LocalJob:
    """Return the job of a client that has the data of all attackers and whose draws are the same for each of them."""
    indices = job.pool if job.pool is not None and len(job.pool) else job.indices
    return dataclasses.replace(job, indices=indices, client=-1, rank=0, num_attackers=1, round=round)
