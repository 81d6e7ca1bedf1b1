"""Full float32 precision: asked for where certificates are computed, whatever the program allows, and given back."""

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from certify import precision
from certify.network import Network
from certify.pgd import pgd
from certify.precision import exact_arithmetic
from tasks.rng import generator

backends: Any = torch.backends


def asked() -> list[str]:
    return [switch.fp32_precision for switch in precision._switches()]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = asked()
    if not before:
        pytest.skip("this version of PyTorch has no fp32_precision of its own for each operation")
    yield
    backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for switch, value in zip(precision._switches(), before, strict=True):
        switch.fp32_precision = value


def test_convolutions_may_use_tf32_outside_and_not_inside() -> None:
    assert backends.cudnn.conv.fp32_precision == "tf32"  # PyTorch's default, which certificates cannot bear
    before = asked()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with exact_arithmetic():
            assert set(asked()) == {"ieee"}
            with exact_arithmetic():
                assert set(asked()) == {"ieee"}
            assert set(asked()) == {"ieee"}
    assert asked() == before


@pytest.mark.parametrize("level", ["high", "medium"])
def test_what_a_program_asked_for_comes_back(level: str) -> None:
    torch.set_float32_matmul_precision(level)
    before = asked()
    with contextlib.suppress(ZeroDivisionError), exact_arithmetic():
        assert set(asked()) == {"ieee"}
        raise ZeroDivisionError
    assert asked() == before
    assert torch.get_float32_matmul_precision() == level


def test_what_was_inherited_stays_inherited() -> None:
    for switch in precision._switches():
        switch.fp32_precision = "none"
    backends.fp32_precision = "tf32"
    assert set(asked()) == {"tf32"}
    with exact_arithmetic():
        assert set(asked()) == {"ieee"}
    assert set(asked()) == {"tf32"}
    backends.fp32_precision = "ieee"
    assert set(asked()) == {"ieee"}


def test_threads_share_one_block() -> None:
    before, inside, leave, seen = asked(), threading.Event(), threading.Event(), []

    def other() -> None:
        with exact_arithmetic():
            inside.set()
            leave.wait(60)
            seen.append(asked())

    thread = threading.Thread(target=other)
    with exact_arithmetic():
        thread.start()
        assert inside.wait(60)
    assert set(asked()) == {"ieee"}  # the other thread is still inside
    leave.set()
    thread.join()
    assert set(seen[0]) == {"ieee"}
    assert asked() == before


def test_networks_and_attacks_compute_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    real = torch.nn.functional.conv2d

    def conv2d(*given: object, **known: object) -> torch.Tensor:
        seen.append(set(asked()))
        return real(*given, **known)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    network = Network.from_module(
        nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)), (1, 3, 3)
    )
    points = torch.rand(4, 1, 3, 3, generator=generator(1, "points"))
    network.forward(points)
    inside: list[set[str]] = []

    def classifier(inputs: torch.Tensor) -> torch.Tensor:
        inside.append(set(asked()))
        return network.forward(inputs)

    pgd(classifier, points, torch.zeros(4, dtype=torch.long), eps=0.1, generator=generator(2, "pgd"), steps=2)
    assert seen
    assert all(each == {"ieee"} for each in seen + inside)


def test_autocast_does_not_reach_a_network() -> None:
    network = Network.from_module(nn.Sequential(nn.Linear(8, 3)), (8,))
    points = torch.rand(4, 8, generator=generator(1, "points"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network.forward(points), network.forward(points, dtype=torch.float32))
        assert network.forward(points).dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="TF32 is of CUDA devices, there is none here")
def test_a_cuda_convolution_agrees_with_float64() -> None:
    module = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64 * 36, 10))
    network = Network.from_module(module, (64, 8, 8)).to("cuda")
    points = torch.rand(32, 64, 8, 8, generator=generator(1, "points")).cuda()
    torch.testing.assert_close(
        network.forward(points).double(), network.forward(points, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )
