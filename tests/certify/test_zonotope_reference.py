"""Our zonotopes against those of IBM's Adversarial Robustness Toolbox, and its known unsoundness, where installed.

pip install adversarial-robustness-toolbox "numpy<2.4"; the definition compared is DeepZ's upper bound of z_q - z_y with
an input box clipped to [0, 1].
"""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from certify.network import Network
from certify.zonotope import check
from tasks.model import initialise
from tasks.rng import generator

pytestmark = pytest.mark.reference
try:
    from art.estimators.certification.deep_z import PytorchDeepZ  # type: ignore[import-not-found]
except ImportError:
    pytest.skip("needs adversarial-robustness-toolbox", allow_module_level=True)


class Flattening(nn.Module):
    """Convolutions and linear layers with the flattening inside `forward`, the only form ART follows."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        for number, part in enumerate(parts):
            self.add_module(f"part{number}", part)

    def forward(self, values: Tensor) -> Tensor:
        for part in self.children():
            values = part(values.flatten(1) if isinstance(part, nn.Linear) else values)
        return values

    def network(self, shape: tuple[int, ...]) -> Network:
        parts = list(self.children())
        first = next(number for number, part in enumerate(parts) if isinstance(part, nn.Linear))
        return Network.from_module(nn.Sequential(*parts[:first], nn.Flatten(), *parts[first:]), shape)


def art(module: nn.Module, shape: tuple[int, ...], classes: int) -> Any:
    """Return ART's estimator of a copy, as it leaves its hooks on the model."""
    return PytorchDeepZ(
        model=copy.deepcopy(module), loss=nn.CrossEntropyLoss(), input_shape=shape, nb_classes=classes,
        clip_values=(0, 1), device_type="cpu",
    )  # fmt: skip


def margins(zonotope: Any, sample: Tensor, label: int, eps: float) -> np.ndarray:
    center, errors = zonotope.pre_process(cent=sample.numpy().copy(), eps=np.eye(sample.numel()) * eps)
    with torch.no_grad():
        output, errors = zonotope.model.forward(eps=errors, cent=center[None])
    output, errors = output.numpy(), errors.numpy()
    return output - output[label] + np.abs(errors - errors[:, label : label + 1]).sum(0)


@pytest.mark.parametrize("eps", [0.02, 0.1, 0.25])
@pytest.mark.parametrize("padding", [0, 1])
def test_bounds_equal_art(eps: float, padding: int) -> None:
    size = {0: 4, 1: 7}[padding]
    parts = (nn.Conv2d(1, 4, 4, 2, padding), nn.ReLU(), nn.Conv2d(4, 6, 3, 1, padding), nn.ReLU())
    head = (nn.Linear(6 * size * size, 20), nn.ReLU(), nn.Linear(20, 4))
    module = Flattening(*parts, *head)
    initialise(module, generator(3))
    zonotope = art(module, (1, 14, 14), 4)
    inputs = torch.rand(4, 1, 14, 14, generator=generator(4))
    inputs[:, :, :4] = 0
    labels = torch.arange(4)
    found = check(module.network((1, 14, 14)), inputs, labels, eps=eps).margins_upper
    for sample, label in enumerate(labels.tolist()):
        expected = margins(zonotope, inputs[sample], label, eps)
        other = np.arange(4) != label
        np.testing.assert_allclose(found[sample].numpy()[other], expected[other], rtol=5e-5, atol=5e-5)


def test_art_certifies_what_is_broken_and_we_do_not() -> None:
    """A ReLU whose upper end is exactly 0 passes unchanged through ART, which certifies what x = 0.125 breaks."""
    module = Flattening(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2))
    first, _, last = module.children()
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0], [-1.0]]))  # type: ignore[operator]
        last.weight.copy_(torch.tensor([[10.0, 10.0], [0.0, 0.0]]))  # type: ignore[operator]
        first.bias.zero_()  # type: ignore[operator]
        last.bias.copy_(torch.tensor([-0.5, 0.0]))  # type: ignore[operator]
    broken = module(torch.tensor([[0.125]]))[0]
    assert broken[0] > broken[1]
    zonotope = art(module, (1,), 2)
    center, errors = zonotope.pre_process(cent=np.zeros((1,), dtype=np.float32), eps=np.eye(1) * 0.125)
    assert zonotope.certify(cent=center[None], eps=errors, prediction=1)
    assert not check(module.network((1,)), torch.zeros(1, 1), torch.tensor([1]), eps=0.125).certified.any()
