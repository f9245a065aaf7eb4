"""What is saved comes back bit for bit, on any number of ranks, with any layout."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI

from shardopt import NAdam
from shardopt.checkpoint import load, save
from shardopt.errors import CheckpointError, CheckpointWarning
from tests.support.errors import BOTH_WAYS, errs, is_last, refused, warned
from tests.support.models import build, content, make_params, params_of, train

pytestmark = pytest.mark.mpi
BY_ORDER = "6 of the parameters, as they have"


def part_of(comm, num_ranks):
    """The first ``num_ranks`` ranks as a world of their own; None on the others."""
    part = comm.Split(0 if comm.rank < num_ranks else MPI.UNDEFINED)
    return None if part == MPI.COMM_NULL else part


@pytest.mark.parametrize("num_savers", [1, 2, 3, 4])
@pytest.mark.parametrize("num_loaders", [1, 2, 3, 4])
def test_any_number_of_ranks_loads_what_any_number_saved(
    comm, mpi_tmp_path, num_savers, num_loaders
):
    if max(num_savers, num_loaders) > comm.size:
        pytest.skip("needs more ranks")
    saved = None
    savers = part_of(comm, num_savers)
    if savers is not None:
        with build(savers, lr=0.05) as opt:
            train(opt, range(3))
            save(mpi_tmp_path / "a", opt, extra={"per_rank": savers.rank})
            saved = content(opt)
        savers.Free()
    comm.Barrier()
    loaders = part_of(comm, num_loaders)
    if loaders is not None:
        with build(loaders, seed=9, bucket_nbytes=70_000) as opt:
            assert load(mpi_tmp_path / "a", opt).extra == {"per_rank": list(range(num_savers))}
            assert content(opt) == saved
            assert opt.last_step.step == 3
            assert opt.param_groups[0]["lr"] == 0.05
        loaders.Free()


@settings(max_examples=12)
@given(
    sizes=st.lists(st.integers(0, 20_000), min_size=1, max_size=6),
    dtypes=st.lists(
        st.sampled_from(["float16", "bfloat16", "float32", "float64"]), min_size=6, max_size=6
    ),
    buckets=st.tuples(st.integers(1, 100_000), st.integers(1, 100_000)),
)
def test_any_layout_is_read_back(comm, mpi_tmp_path, sizes, dtypes, buckets):
    specs = [(f"p{i}", (n,), d) for i, (n, d) in enumerate(zip(sizes, dtypes, strict=False))]
    folder = comm.bcast(mpi_tmp_path / f"{len(list(mpi_tmp_path.iterdir()))}")
    with build(comm, 1, specs, buckets[0]) as opt, build(comm, 2, specs, buckets[1]) as other:
        train(opt, range(1))
        save(folder, opt)
        load(folder, other)
        assert content(opt) == content(other)


@pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "stepped"])
def test_training_goes_on_as_if_nothing_had_happened(comm, mpi_tmp_path, stepped):
    with build(comm) as opt, build(comm, seed=5) as resumed:
        train(opt, range(4))
        save(mpi_tmp_path / "a", opt)
        if stepped:
            train(resumed, range(50, 52))
        load(mpi_tmp_path / "a", resumed)
        for each in opt, resumed:
            train(each, range(4, 8))
        assert content(opt) == content(resumed)
        assert opt.last_step.step == resumed.last_step.step == 8


def test_an_optimizer_that_never_stepped_is_saved_too(comm, mpi_tmp_path):
    with build(comm) as opt, build(comm, seed=5) as other:
        save(mpi_tmp_path / "a", opt)
        load(mpi_tmp_path / "a", other)
        assert content(opt) == content(other)


def test_values_put_in_the_place_of_parameters_are_saved(comm, mpi_tmp_path):
    with build(comm) as opt, build(comm, seed=5) as other:
        train(opt, range(1))
        weight = params_of(opt)[0]
        if is_last(comm):
            weight.data = np.full(weight.data.shape, 7, np.float32)
        save(mpi_tmp_path / "a", opt)
        assert (weight.data == 7).all()
        load(mpi_tmp_path / "a", other)
        assert (params_of(other)[0].data == 7).all()
        train(opt, [1])
        train(other, [1])
        assert content(opt) == content(other)


def test_what_was_put_in_the_place_of_parameters_gives_way_to_a_checkpoint(comm, mpi_tmp_path):
    with build(comm) as opt, build(comm, seed=5) as other:
        save(mpi_tmp_path / "a", opt)
        for param in params_of(other):
            param.data = np.zeros_like(param.data)
        load(mpi_tmp_path / "a", other)
        assert content(opt) == content(other)
        train(other, range(1))
        train(opt, range(1))
        assert content(opt) == content(other)


def test_extra_comes_back_as_it_was(comm, mpi_tmp_path):
    extra = {
        "epoch": 3,
        "ratio": 0.1,
        "lost": float("-inf"),
        "big": 1 << 127,
        "text": "größer",
        "none": None,
        "flags": [True, False],
        "pair": (1, [2.5, {"deep": "x"}]),
        7: "a key that is no string",
        "$float": "a key that looks like one of ours",
        "average": np.arange(6, dtype=np.float32).reshape(2, 3),
        "mask": np.array([True, False]),
        "wave": np.array([1 + 2j]),
        "scalar": np.float64(0.1),
        "per_rank": {"rank": comm.rank, "draws": np.full(comm.rank, comm.rank)},
    }
    with build(comm) as opt:
        save(mpi_tmp_path / "a", opt, extra=extra)
        loaded = load(mpi_tmp_path / "a", opt).extra
    assert list(loaded) == list(extra)  # in its order, too
    for key in ("average", "mask", "wave"):
        value = loaded.pop(key)
        assert value.dtype == extra[key].dtype
        np.testing.assert_array_equal(value, extra.pop(key))
    for rank, entry in enumerate(loaded.pop("per_rank")):
        assert entry["rank"] == rank
        np.testing.assert_array_equal(entry["draws"], np.full(rank, rank))
    del extra["per_rank"]
    extra["scalar"] = 0.1
    assert repr(loaded) == repr(extra)


def test_extra_is_rank_0s_but_for_what_is_per_rank(comm, mpi_tmp_path):
    with build(comm) as opt:
        save(mpi_tmp_path / "a", opt, extra={"from": comm.rank})
        assert load(mpi_tmp_path / "a", opt).extra == {"from": 0}
        save(mpi_tmp_path / "b", opt)
        assert load(mpi_tmp_path / "b", opt).extra is None
        save(mpi_tmp_path / "c", opt, extra={"per_rank": 5} if is_last(comm) else {})
        assert load(mpi_tmp_path / "c", opt).extra == {"per_rank": [None] * (comm.size - 1) + [5]}


@BOTH_WAYS
@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, np.array([None]), [0, {"y": print}]],
    ids=["object", "set", "array of objects", "function"],
)
def test_what_cannot_be_saved_is_refused(comm, mpi_tmp_path, value, alone):
    extra = {"per_rank": {"x": value if errs(comm, alone) else 0}}
    with build(comm) as opt:
        with refused(comm, CheckpointError, "extra['per_rank']['x']", alone=alone):
            save(mpi_tmp_path / "a", opt, extra=extra)
        assert comm.bcast(list(mpi_tmp_path.iterdir())) == []
        save(mpi_tmp_path / "a", opt)


def test_nothing_is_overwritten(comm, mpi_tmp_path):
    with build(comm) as opt:
        train(opt, range(1))
        save(mpi_tmp_path / "a", opt)
        saved = content(opt)
        train(opt, range(1, 2))
        with refused(comm, CheckpointError, "path must not exist"):
            save(mpi_tmp_path / "a", opt)
        assert comm.bcast([path.name for path in mpi_tmp_path.iterdir()]) == ["a"]
        load(mpi_tmp_path / "a", opt)
        assert content(opt) == saved


def test_folders_above_are_made(comm, mpi_tmp_path):
    with build(comm) as opt:
        save(mpi_tmp_path / "new" / "er" / "a", opt)
        assert load(str(mpi_tmp_path / "new" / "er" / "a"), opt).extra is None


def test_files_are_the_same_bytes_every_time(comm, mpi_tmp_path):
    with build(comm) as opt:
        train(opt, range(1))
        save(mpi_tmp_path / "a", opt, extra={"x": np.arange(3)})
        save(mpi_tmp_path / "b", opt, extra={"x": np.arange(3)})
    name = f"rank-{comm.rank:05d}-of-{comm.size:05d}.safetensors"
    assert (mpi_tmp_path / "a" / name).read_bytes() == (mpi_tmp_path / "b" / name).read_bytes()


def test_parameters_without_names_are_matched_by_position(comm, mpi_tmp_path):
    nameless = make_params(5)
    for param in nameless:
        param.name = None
    with build(comm) as opt, NAdam(nameless, comm=comm) as other:
        train(opt, range(2))
        save(mpi_tmp_path / "a", opt)
        with warned(comm, CheckpointWarning, BY_ORDER):
            report = load(mpi_tmp_path / "a", other).report
        assert report.matched_by_order == len(nameless)
        assert [p.data.tobytes() for p in params_of(opt)] == [p.data.tobytes() for p in nameless]
        train(opt, range(2, 3))
        train(other, range(2, 3))
        with warned(comm, CheckpointWarning, "6 of 6 parameters have no names"):
            save(mpi_tmp_path / "b", other)
        save(mpi_tmp_path / "c", other)  # one warning is enough
        train(opt, range(3, 4))
        with warned(comm, CheckpointWarning, BY_ORDER):
            load(mpi_tmp_path / "b", opt)
        assert [p.data.tobytes() for p in params_of(opt)] == [p.data.tobytes() for p in nameless]


def test_names_that_would_be_others_in_a_file(comm, mpi_tmp_path):
    specs = [("w", (3,), "float32"), ("w::exp_avg", (3,), "float32")]
    with build(comm, specs=specs) as opt:
        with pytest.raises(CheckpointError, match="names of tensors must be unique in a file"):
            save(mpi_tmp_path / "a", opt)
        assert comm.bcast(list(mpi_tmp_path.iterdir())) == []
        train(opt, range(1))
