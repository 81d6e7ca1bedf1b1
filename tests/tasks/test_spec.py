"""Components in text: what is read, what is refused, and what the refusal says."""

import pytest

from tasks import spec
from tasks.errors import SpecError


def test_resolve_binds_arguments():
    component = spec.resolve("schedule", "continuous(start=11, stop=100)")
    assert component.arguments == {"start": 11, "stop": 100}
    assert component().attackers(11, 2) == {0, 1}
    assert component().attackers(101, 2) == frozenset()


def test_text_of_a_component_reads_back():
    component = spec.resolve("attack", "patch_backdoor(target=3, size=(2, 2), value=0.5)")
    assert spec.resolve("attack", str(component)) == component


def test_chain_keeps_order():
    chain = spec.resolve_chain("attack", "label_flip(source=1, target=7) | scale_update(factor=3) | sign_flip()")
    assert [part.name for part in chain] == ["label_flip", "scale_update", "sign_flip"]
    assert spec.resolve_chain("attack", "  ") == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no_such()", "there are: .*continuous.*single_shot"),
        ("continuous(begin=1)", "no argument 'begin'; it has: start, stop, forced"),
        ("continuous(start='a')", "start must be int, got 'a'"),
        ("continuous(start=True)", "start must be int"),
        ("continuous(start=1.5)", "start must be int"),
        ("single_shot()", "needs rounds"),
        ("single_shot(rounds=(1, 'x'))", "rounds must be"),
        ("continuous(1)", "given by name"),
        ("continuous(start=1, start=2)", "start is given twice"),
        ("continuous(start=0x" + "f" * 4000 + ")", "more than 64 bits"),
        ("fixed_pool(size=-1" + "0" * 400 + ")", "more than 64 bits"),
        ("continuous(**{})", "given by name"),
        ("continuous(start=open('x'))", "must be a number"),
        ("continuous(", "cannot read"),
        ("1 + 2", "name\\(argument=value\\)"),
        ("a.b()", "name\\(argument=value\\)"),
        ("continuous() | fixed_pool()", "exactly one"),
    ],
)
def test_refusals_say_what_exists(text, says):
    with pytest.raises(SpecError, match=says):
        spec.resolve("schedule", text)


def test_not_a_number_is_no_float():
    with pytest.raises(SpecError, match="factor must be float"):
        spec.resolve("attack", "scale_update(factor=1e999)")


@pytest.mark.parametrize("kind", list(spec.PACKAGES))
def test_every_component_is_complete(kind):
    assert spec.names(kind), f"no components of kind {kind}"
    for name in spec.names(kind):
        function = spec.find(kind, name)
        assert function.__doc__, f"{kind} {name} has no docstring"
        spec.hyper_parameters(function)
