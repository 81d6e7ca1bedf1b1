"""Models as vectors and on the wire: nothing is lost, nothing malformed gets in."""

import io

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tasks.params import Layout, bind, digest, model_vector
from tasks.rng import derive, generator
from tasks.wire import WireError, from_record, npy_header, to_record


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def test_layout_holds_parameters_then_float_buffers():
    layout = Layout.of(net())
    assert layout.names[-2:] == ("1.running_mean", "1.running_var")
    assert layout.num_trainable == sum(p.numel() for p in net().parameters())
    assert layout.num_params == layout.num_trainable + 4


def test_bind_makes_training_change_the_vector():
    model = net()
    layout, vector = Layout.of(model), model_vector(model)
    before = vector.clone()
    bind(model, layout, vector)
    model(torch.randn(5, 1, 4, 4, generator=generator(1))).sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(p.grad)
    assert not torch.equal(before[: layout.num_trainable], vector[: layout.num_trainable])
    assert not torch.equal(before[-4:], vector[-4:])  # batch-norm statistics moved too
    assert torch.equal(model_vector(model), vector)


def test_record_round_trip_is_exact_and_a_snapshot():
    layout = Layout.of(net())
    vector = torch.randn(layout.num_params, generator=generator(2))
    record, copy = to_record(vector, layout), vector.clone()
    vector.zero_()
    out = torch.empty(layout.num_params)
    from_record(record, layout, out)
    assert torch.equal(out, copy)
    assert {k: record[k].numpy().shape for k in record} == dict(zip(layout.names, layout.shapes, strict=True))


def test_our_bytes_are_numpys_bytes():
    for shape in [(), (1,), (3, 4), (2, 3, 4, 5)]:
        buffer = io.BytesIO()
        np.save(buffer, np.zeros(shape, np.float32))
        assert buffer.getvalue().startswith(npy_header(shape))


def test_fortran_order_is_read_right():
    layout = Layout(("a",), ((3, 4),), 12)
    values = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4))
    out = torch.empty(12)
    from_record(ArrayRecord({"a": Array(values)}), layout, out)
    assert out.tolist() == list(range(12))


def npz(values) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, values)
    return buffer.getvalue()


def broken(**changes):
    good = Array(np.zeros((3, 4), np.float32))
    fields = {"dtype": good.dtype, "shape": good.shape, "stype": good.stype, "data": good.data, **changes}
    return ArrayRecord({"a": Array(**fields)})


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (ArrayRecord({}), "missing \\['a'\\]"),
        (ArrayRecord({"b": Array(np.zeros((3, 4), np.float32))}), "unexpected \\['b'\\]"),
        (ArrayRecord({"a": Array(np.zeros((4, 3), np.float32))}), "shape \\(4, 3\\), wanted \\(3, 4\\)"),
        (ArrayRecord({"a": Array(np.zeros((3, 4)))}), "dtype float64"),
        (broken(data=b""), "cannot be read"),
        (broken(data=b"\x93NUMPY" + b"x" * 200), "cannot be read"),
        (broken(data=b"x" * 10_000), "carries 10000 bytes"),
        (broken(stype="pickle"), "serialised as 'pickle'"),
        (broken(shape=(3, 4), data=Array(np.zeros((4, 3), np.float32)).data), "holds float32 \\(4, 3\\)"),
        (broken(data=Array(np.zeros((3, 4), np.float32)).data[:-4]), "cannot be read"),
        (broken(data=npz(np.zeros((3, 4), np.float32))), "cannot be read"),
    ],
)
def test_malformed_arrays_are_refused_with_a_reason(record, says):
    with pytest.raises(WireError, match=says):
        from_record(record, Layout(("a",), ((3, 4),), 12), torch.empty(12))


@given(st.binary(max_size=300))
def test_no_bytes_get_past_the_reader_unless_they_are_a_whole_array(data):
    out = torch.full((12,), 7.0)
    try:
        from_record(broken(data=data), Layout(("a",), ((3, 4),), 12), out)
    except WireError:
        return
    assert np.load(io.BytesIO(data)).shape == (3, 4)


def test_digest_is_of_the_values():
    a = torch.randn(10, generator=generator(3))
    assert digest(a) == digest(a.clone())
    assert digest(a) != digest(torch.nextafter(a, a + 1))


def test_generators_are_stable_and_apart():
    assert derive(1, "client", 7, "round", 3) == derive(1, "client", 7, "round", 3)
    seeds = {derive(s, r, c, t) for s in range(3) for r in ("a", "b") for c in range(10) for t in range(10)}
    assert len(seeds) == 600
    before = torch.random.get_rng_state()
    generator(5, "x")
    assert torch.equal(before, torch.random.get_rng_state())
