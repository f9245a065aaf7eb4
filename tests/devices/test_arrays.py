"""NumPy's front end takes CuPy's arrays, and refuses what it cannot train, by name."""

import numpy as np
import pytest

from shardopt.errors import PartitionError
from shardopt.numpy import NAdam, Parameter
from tests.support.arena_device import DeviceArray, arena_devices, fill, on_device, values_of
from tests.support.errors import POLICY

pytestmark = pytest.mark.mpi


class Foreign:
    """An array of another library on a GPU."""

    __module__ = "numba.cuda"
    shape, dtype = (3,), np.dtype(np.float32)

    @property
    def __cuda_array_interface__(self):
        return {"shape": (3,), "typestr": "<f4", "data": (0, False), "version": 3}


class Sparse:
    __module__ = "cupyx.scipy.sparse"
    shape, dtype = (3,), np.dtype(np.float32)

    def toarray(self):
        raise AssertionError


REFUSED = {
    "int": (lambda: on_device(np.arange(3)), r"data .* floating point; got dtype int64.*float32"),
    "complex": (lambda: on_device(np.ones(3, complex)), "floating point; got dtype complex128"),
    "bool": (lambda: on_device(np.ones(3, bool)), "floating point; got dtype bool"),
    "sparse": (Sparse, r"must be dense; got Sparse.*toarray"),
    "another library's": (
        Foreign,
        r"must be a NumPy or CuPy array; got a Foreign of numba.*cupy.asarray",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("role", ["data", "grad"])
def test_other_arrays_are_refused(comm, monkeypatch, role, name):
    make, message = REFUSED[name]
    message = message.replace("data ", f"{role} ")
    param = Parameter(on_device(np.ones(3, np.float32)), "w")
    with arena_devices(monkeypatch):
        if role == "data":
            with pytest.raises(PartitionError, match=message):
                NAdam([Parameter(make(), "w")], comm=comm, policy=POLICY)
            return
        opt = NAdam([param], comm=comm, policy=POLICY)
    param.grad = make()
    with pytest.raises(PartitionError, match=message):
        opt.step()
    opt.close()


def test_parameters_and_gradients_are_arrays_of_the_device(comm, monkeypatch):
    params = [Parameter(on_device(np.ones(shape, np.float32))) for shape in [(3, 2), (), (0,)]]
    with arena_devices(monkeypatch):
        opt = NAdam(params, comm=comm, policy=POLICY)
    shapes = [(3, 2), (), (0,)]
    for role in ("data", "grad"):
        arrays = [getattr(param, role) for param in params]
        assert all(isinstance(array, DeviceArray) for array in arrays)
        assert [array.shape for array in arrays] == shapes
    kept = params[0].data
    fill(params[0].grad, 1)
    opt.step()
    opt.zero_grad()
    assert not values_of(params[0].grad).any()
    opt.load_params({f"param{i}": on_device(np.full(shapes[i], 5.0)) for i in range(3)})
    assert (values_of(kept) == 5).all()
    opt.load_params({f"param{i}": np.full(shapes[i], 6, np.float32) for i in range(3)})
    assert (values_of(kept) == 6).all()
    opt.close()
    assert (values_of(params[0].data) == 6).all()
    assert params[0].grad is None


def test_parameters_of_the_host_and_a_device_are_refused(comm, monkeypatch):
    params = [Parameter(on_device(np.ones(3))), Parameter(np.ones(3))]
    with (
        arena_devices(monkeypatch),
        pytest.raises(PartitionError, match="must be on cuda:0, .*; got cpu"),
    ):
        NAdam(params, comm=comm, policy=POLICY)
