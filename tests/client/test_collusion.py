"""What every colluding attack keeps to; attacks are discovered, so a new file is tested without a line here."""

import inspect
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import client.collusion
from client.collusion._geometry import BLOCK_COLUMNS
from tasks import spec
from tasks.errors import AggregationError, SpecError
from tasks.rng import generator

NAMES = sorted(path.stem for path in Path(client.collusion.__path__[0]).glob("[a-z]*.py"))
VARIANTS = [
    *(f"{name}()" for name in NAMES),
    'a_little_is_enough(z=1.5, direction="minus")',
    'min_max(perturbation="std")',
    'min_max(perturbation="sign")',
    'min_sum(perturbation="std")',
    'min_sum(perturbation="sign")',
    "inner_product_manipulation(epsilon=10.0)",
    "fang_trimmed_mean(factor=1.5)",
    "fang_krum(num_byzantine=1)",
]


def find(text: str) -> spec.Component:
    """Read an attack as a setting would name it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(spec.PACKAGES, "collusion", "client.collusion")
        return spec.resolve("collusion", text)


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "collusion"), dtype=dtype)


def craft(text: str, known: Tensor, f: int, n: int, seed: int = 7) -> Tensor:
    return find(text)(known, f, n, generator(seed, "attack"))


def test_all_attacks_are_found() -> None:
    assert {"a_little_is_enough", "inner_product_manipulation", "mimic", "min_max", "min_sum"} <= set(NAMES)
    assert {"fang_krum", "fang_trimmed_mean"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_that_of_an_attack(name: str) -> None:
    parameters = inspect.signature(find(f"{name}()").function).parameters.values()
    positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert positional == ["known", "num_attackers", "num_clients", "generator"]
    assert all(p.default is not p.empty for p in parameters if p.kind is p.KEYWORD_ONLY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("known_rows", [1, 2, 3, 8])
@pytest.mark.parametrize("text", VARIANTS)
def test_one_finite_row_per_attacker_and_input_untouched(text: str, known_rows: int, dtype: torch.dtype) -> None:
    known = normal(known_rows, 50, dtype=dtype)
    before = known.clone()
    sent = craft(text, known, 3, 11)
    assert sent.shape == (3, 50)
    assert sent.dtype == dtype
    assert torch.isfinite(sent).all()
    assert torch.equal(known, before)


@pytest.mark.parametrize("text", VARIANTS)
def test_what_is_sent_is_no_window_on_what_was_known(text: str) -> None:
    known = normal(8, 50)
    sent = craft(text, known, 3, 11).clone()
    again = craft(text, known, 3, 11)
    known.zero_()
    assert torch.equal(sent, again)


@pytest.mark.parametrize("text", VARIANTS)
def test_the_generator_alone_decides_and_the_global_one_is_left_alone(text: str) -> None:
    known, state = normal(8, 50), torch.random.get_rng_state()
    assert torch.equal(craft(text, known, 3, 11), craft(text, known, 3, 11))
    assert torch.equal(torch.random.get_rng_state(), state)
    draws = not torch.equal(craft(text, known, 3, 11), craft(text, known, 3, 11, seed=8))
    assert draws == text.startswith("fang_trimmed_mean")


@pytest.mark.parametrize("text", VARIANTS)
def test_no_attacker_sends_nothing(text: str) -> None:
    assert craft(text, normal(8, 50), 0, 8).shape == (0, 50)


@pytest.mark.parametrize("text", VARIANTS)
def test_attackers_who_know_nothing_are_told_what_they_need(text: str) -> None:
    with pytest.raises(AggregationError, match="at least one honest update"):
        craft(text, normal(0, 50), 3, 11)


@pytest.mark.parametrize("text", VARIANTS)
@pytest.mark.parametrize(
    ("known", "f", "n"),
    [
        (torch.zeros(5), 1, 6),
        (torch.zeros(5, 3, dtype=torch.int64), 1, 6),
        (torch.zeros(5, 3), 7, 6),
        (torch.zeros(5, 3), -1, 6),
        (torch.zeros(7, 3), 1, 6),
    ],
)
def test_impossible_rounds_are_refused(text: str, known: Tensor, f: int, n: int) -> None:
    with pytest.raises(AggregationError, match=r"wants a floating-point stack|attackers <= clients"):
        craft(text, known, f, n)


@pytest.mark.parametrize("scale", [1e30, 3e38, 1e-30, 0.0])
@pytest.mark.parametrize("known_rows", [1, 3, 8])
@pytest.mark.parametrize("text", VARIANTS)
def test_finite_at_the_ends_of_float32(text: str, known_rows: int, scale: float) -> None:
    known = normal(known_rows, 40).sign() * scale
    known[:, ::3] *= 0.5
    assert torch.isfinite(craft(text, known, 3, 11)).all()
    known[0] = normal(40, seed=5)  # one of ordinary size among the extreme
    assert torch.isfinite(craft(text, known, 3, 11)).all()


@pytest.mark.parametrize("scale", [1e300, 1e200, 1e-200, 1e-310])
@pytest.mark.parametrize("text", VARIANTS)
def test_finite_at_the_ends_of_float64(text: str, scale: float) -> None:
    assert torch.isfinite(craft(text, normal(8, 40, dtype=torch.float64) * scale, 3, 11)).all()


@pytest.mark.parametrize("text", VARIANTS)
def test_attacks_scale_with_the_updates(text: str) -> None:
    known = normal(8, 50) + 0.3
    for exponent in (-40, -3, 20):
        scaled = craft(text, known * 2.0**exponent, 3, 11)
        torch.testing.assert_close(scaled, craft(text, known, 3, 11) * 2.0**exponent, rtol=1e-6, atol=0)
    large = known.double() * 2.0**700
    torch.testing.assert_close(craft(text, large, 3, 11), craft(text, known.double(), 3, 11) * 2.0**700)


@pytest.mark.parametrize("text", VARIANTS)
def test_the_order_of_the_known_does_not_matter(text: str) -> None:
    known = normal(8, 50) + 0.3
    order = torch.randperm(8, generator=generator(3, "order"))
    torch.testing.assert_close(craft(text, known[order], 3, 11), craft(text, known, 3, 11))


@pytest.mark.parametrize("text", VARIANTS)
def test_blocks_of_columns_do_not_show(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = normal(8, 2 * BLOCK_COLUMNS + 17) + 0.1
    whole = craft(text, known, 1, 9)
    monkeypatch.setattr("client.collusion._geometry.BLOCK_COLUMNS", known.shape[1])
    torch.testing.assert_close(craft(text, known, 1, 9), whole, rtol=1e-5, atol=1e-6)  # one attacker: the same draws


@pytest.mark.parametrize("text", VARIANTS)
@given(
    known_rows=st.integers(1, 9),
    num_params=st.integers(0, 30),
    f=st.integers(0, 5),
    spare=st.integers(0, 4),
    power=st.integers(-20, 20),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_any_round_gives_finite_rows(
    text: str, known_rows: int, num_params: int, f: int, spare: int, power: int, seed: int
) -> None:
    n = max(2 * f + 3 + spare, known_rows)
    sent = craft(text, normal(known_rows, num_params, seed=seed).round(decimals=1) * 10.0**power, f, n)
    assert sent.shape == (f, num_params)
    assert torch.isfinite(sent).all()


@pytest.mark.parametrize(
    "text",
    ["inner_product_manipulation(epsilon=0)", "inner_product_manipulation(epsilon=-1.0)", "fang_trimmed_mean(factor=1)",
     "fang_krum(threshold=0.0)", "fang_krum(num_byzantine=-1)", 'min_max(perturbation="none")'],
)  # fmt: skip
def test_hyper_parameters_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(SpecError):
        craft(text, normal(8, 5), 3, 11)
