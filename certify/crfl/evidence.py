"""What is known of the released model's prediction of each test point, before anything is said of the training."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from certify.bounds import Floats, VoteBounds
from certify.linear import LinearModel
from certify.network import Network
from certify.smoothing.exact import exact_bounds, exact_votes
from certify.smoothing.votes import ModelForm, Votes, inputs_sha256
from tasks.errors import CertificationError

Kind = Literal["votes", "margins"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Evidence:
    """Per point: a label (ABSTAINED without one), and bounds of its votes or its distance to another label.

    "votes" have `pa_lower` and `pb_upper` under noise `sigma`; "margins" have `shift_lower`, the l2 distance in
    parameters within which the model without noise keeps the label.
    """

    kind: Kind
    method: str
    label: NDArray[np.int64]
    bounds: Mapping[str, Floats]
    model_sha256: str
    data_sha256: str
    sigma: float = 0.0
    alpha: float = 0.0
    num_points: int = 1  # how many points share alpha
    seed: int | None = None
    counts: NDArray[np.int64] | None = None
    independent_trainings: bool = False  # whether every vote is of a model trained anew, with noise of its own
    trainings: tuple[str, ...] = ()  # hashes of those models, one per vote
    form: ModelForm | None = None  # of the model; None: not known
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_votes(
        votes: Votes, bounds: VoteBounds, *, independent_trainings: bool = False, network: Network | None = None
    ) -> "Evidence":
        """Return the evidence of counted votes, their bounds made with `certify.bounds`.

        `network`, the model that voted, tells its form where the votes were read from a file. A plan draws noise
        around one model, so `independent_trainings` contradicts it: the marginal form refuses such evidence.
        """
        if not votes.complete:
            have, wanted = votes.num_draws, votes.plan.num_draws
            raise CertificationError(f"{have} of {wanted} draws are done; finish them, as bounds hold for all of them")
        plan = votes.plan
        if network is not None and network.sha256() != plan.model_sha256:
            raise CertificationError(f"the votes are of model {plan.model_sha256}, got network {network.sha256()}")
        drawn = {"num_draws": plan.num_draws, "noise": plan.noise, "stream": plan.stream}
        return Evidence(
            kind="votes", method=bounds.method, label=bounds.label, bounds=_pair(bounds), counts=votes.counts,
            model_sha256=plan.model_sha256, data_sha256=plan.inputs_sha256, sigma=plan.sigma, alpha=bounds.alpha,
            num_points=bounds.num_points, seed=plan.seed, independent_trainings=independent_trainings, parameters=drawn,
            form=votes.form if network is None else ModelForm.of(network),
        )  # fmt: skip

    @staticmethod
    def exact(network: Network, inputs: torch.Tensor, sigma: float) -> "Evidence":
        """Return the exact votes of a softmax regression under noise `sigma`."""
        bounds = exact_bounds(exact_votes(LinearModel.from_network(network), inputs, sigma))
        return Evidence(
            kind="votes", method=bounds.method, label=bounds.label, bounds=_pair(bounds), sigma=sigma,
            model_sha256=network.sha256(), data_sha256=inputs_sha256(inputs), num_points=len(bounds.label),
            form=ModelForm.of(network),
        )  # fmt: skip

    @staticmethod
    def margins(network: Network, inputs: torch.Tensor) -> "Evidence":
        """Return the margins of a softmax regression without noise."""
        label, shift = LinearModel.from_network(network).shifts_lower(inputs)
        return Evidence(
            kind="margins", method="margin", label=label, bounds={"shift_lower": shift}, num_points=len(label),
            model_sha256=network.sha256(), data_sha256=inputs_sha256(inputs), form=ModelForm.of(network),
        )  # fmt: skip

    @property
    def around_one_model(self) -> bool:
        """True where noise was drawn (or integrated) around the one model of `model_sha256`."""
        return "noise" in self.parameters or self.method.startswith("exact/") or self.kind == "margins"


def _pair(bounds: VoteBounds) -> dict[str, Floats]:
    return {"pa_lower": np.atleast_1d(bounds.pa_lower), "pb_upper": np.atleast_1d(bounds.pb_upper)}
