"""Model replacement with the factor that the round itself asks for: the mean becomes the attacker's model.

Bagdasaryan et al., "How to backdoor federated learning", AISTATS 2020, section 4.2; in Wang et al., "Attack of the
Tails", NeurIPS 2020, section 3, the update is multiplied by n_S / n_adv, all samples of the round over the
attacker's. If honest clients do not move the model, averaging then gives the attacker's own. Where every client
weighs the same that is the number of clients; `server_lr` divides it.

An attacker knows how many clients are sampled and assumes that each honest one has as many samples as its own share
(the paper's attacker knows the true sum). With several attackers in a round each boosts its part. `max_factor` is the
cap on boosting with which an attacker stays below a norm bound. `scale_update` takes a factor that you give.
"""

import dataclasses

from client.attack import Attack
from client.trainer import LocalJob, LocalResult, LocalTrainer
from tasks.errors import SpecError


def replace_model(*, num_clients: int | None = None, num_attackers: int = 1, max_factor: float | None = None) -> Attack:
    """Multiply the update by n_S / (n_adv eta), at most `max_factor`; `num_clients` None: as many as are sampled."""
    if (
        num_attackers < 1
        or (num_clients is not None and num_clients < 1)
        or (max_factor is not None and max_factor <= 0)
    ):
        raise SpecError(
            "replace_model wants num_clients and num_attackers >= 1, max_factor > 0; got "
            f"{num_clients}, {num_attackers}, {max_factor}"
        )

    def wrap(trainer: LocalTrainer) -> LocalTrainer:
        def train(job: LocalJob) -> LocalResult:
            result = trainer(job)
            factor = boost(job, result.num_examples, num_clients, num_attackers)
            if max_factor is not None:
                factor = min(factor, max_factor)
            return dataclasses.replace(result, vector=job.start + (result.vector - job.start) * factor)

        return train

    return Attack(wrap)


def boost(job: LocalJob, num_examples: int, num_clients: int | None, num_attackers: int) -> float:
    """Return n_S / n_adv over the server's step size: 1 where the settings of the run are unknown and none is given."""
    settings = job.settings
    clients = num_clients or (settings.num_sampled if settings else 1)
    attackers = min(num_attackers, clients)
    eta = settings.server_lr if settings and settings.server_lr > 0 else 1.0
    if settings is None or settings.client_weights == "uniform" or num_examples == 0:
        return clients / attackers / eta
    honest = (clients - attackers) * len(job.indices)
    return (honest + attackers * num_examples) / (attackers * num_examples) / eta
