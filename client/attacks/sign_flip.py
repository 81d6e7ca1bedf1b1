"""Sign flipping: send the update in the opposite direction (Li et al., RSA, AAAI 2019)."""

from client.attack import Attack, change_update


def sign_flip(*, factor: float = 1.0) -> Attack:
    """Send minus `factor` times the honest update."""
    return change_update(lambda update, job: update * -factor)
