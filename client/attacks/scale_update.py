"""Model replacement: send the update times a factor (Bagdasaryan et al., AISTATS 2020, section 4.2; DBA's gamma)."""

from client.attack import Attack, change_update


def scale_update(*, factor: float = 10.0) -> Attack:
    """Multiply the update, batch-norm statistics included, by `factor`; n / eta replaces the mean of n clients."""
    return change_update(lambda update, job: update * factor)
