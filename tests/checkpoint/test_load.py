"""A checkpoint of another model is refused by name and changes nothing; all else is taken over."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from shardopt import NAdam, Parameter
from shardopt.checkpoint import Checkpointer, load, save
from shardopt.checkpoint.format.manifest import MANIFEST_NAME
from shardopt.checkpoint.format.reader import Reader
from shardopt.errors import (
    CheckpointError,
    CheckpointWarning,
    DamagedCheckpointError,
    NoGradientWarning,
    NonFiniteWarning,
    RankMismatchError,
)
from tests.checkpoint.make_golden import FOLDER, make_groups
from tests.support.damage import flip, params_of, refused_alike, standing
from tests.support.errors import (
    BOTH_WAYS,
    POLICY,
    assert_steps,
    errs,
    is_last,
    make_params,
    take_step,
    warned,
)
from tests.support.models import UP_TO_THREE_RANKS

pytestmark = [pytest.mark.mpi, UP_TO_THREE_RANKS]
GOLDEN = FOLDER / "v1-3"


def build(comm, params=None, **settings):
    return NAdam(make_params() if params is None else params, comm=comm, policy=POLICY, **settings)


@pytest.fixture
def path(comm, mpi_tmp_path):
    """A checkpoint of ``make_params()`` after two steps, the last with a loss scale."""
    with build(comm, lr=0.125) as opt:
        take_step(opt)
        opt.zero_grad()
        for param in params_of(opt):
            param.grad += 3.0
        opt.step(loss_scale=4.0)
        save(mpi_tmp_path / "a", opt, extra={"x": np.arange(3)})
    return mpi_tmp_path / "a"


def rename(params):
    params[1].name = "bias"
    return params


def reshape(params):
    params[0].data = params[0].data.reshape(3, 2)
    return params


def convert(params):
    params[2].data = params[2].data.astype(np.float32)
    return params


def flatten(params):
    params[0].data = params[0].data.reshape(-1)
    return params


def more(params):
    return [*params, Parameter(np.zeros(2), "z")]


OTHERS = {
    "name": (rename, "the model must have a parameter 'b', as in the checkpoint; got 'bias' inst"),
    "shape": (reshape, "shape of 'w' must be (2, 3), as in the checkpoint; got (3, 2)."),
    "flat": (flatten, "shape of 'w' must be (2, 3), as in the checkpoint; got (6,)."),
    "dtype": (convert, "dtype of 's' must be float64, as in the checkpoint; got float32."),
    "one more": (more, "the model must have 3 parameters, as in the checkpoint; got 4."),
    "one less": (lambda params: params[:-1], "must have 3 parameters, as in the checkpoint; got 2"),
    "groups": (
        lambda params: [{"params": params[:1]}, {"params": params[1:]}],
        "group of 'b' must be 0, as in the checkpoint; got 1.",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_model_is_refused_by_name(comm, path, other):
    change, told = OTHERS[other]
    with build(comm, change(make_params())) as opt:
        take_step(opt)
        before = standing(opt)
        with refused_alike(comm, CheckpointError, told):
            load(path, opt)
        with Checkpointer(path.parent) as saver:
            comm.Barrier()
            if comm.rank == 0:
                path.rename(path.parent / "step-000000000002")
            comm.Barrier()
            with refused_alike(comm, CheckpointError, told):
                saver.restore(opt)
        assert standing(opt) == before
        assert_steps(opt)


def test_a_group_more_in_the_checkpoint_is_refused(comm):
    groups = make_groups(3, start=0.5)
    params = [param for group in groups for param in group["params"]]
    told = "group of 'half' must be 1, as in the checkpoint; got 0."
    with build(comm, params) as opt, refused_alike(comm, CheckpointError, told):
        load(GOLDEN, opt)


def test_the_order_of_named_parameters_is_free(comm, path):
    with build(comm) as opt, build(comm, make_params()[::-1]) as turned:
        for each in (opt, turned):
            load(path, each)
            take_step(each)
        for param, other in zip(params_of(opt), reversed(params_of(turned)), strict=True):
            assert param.name == other.name
            assert param.data.tobytes() == other.data.tobytes()


@pytest.mark.parametrize("side", ["saved", "loaded"])
def test_without_names_order_takes_their_place(comm, path, mpi_tmp_path, side):
    unnamed = [Parameter(param.data) for param in make_params()]
    with build(comm) as opt:
        load(path, opt)
        with build(comm, unnamed) as other:
            with warned(comm, CheckpointWarning, "3 of the parameters, as they have"):
                load(path, other)
            if side == "saved":
                with warned(comm, CheckpointWarning):
                    save(mpi_tmp_path / "b", other)
                with warned(comm, CheckpointWarning, "3 of the parameters, as they have"):
                    load(mpi_tmp_path / "b", opt)
            for each in (opt, other):
                take_step(each)
            for param, twin in zip(params_of(opt), params_of(other), strict=True):
                assert param.data.tobytes() == twin.data.tobytes()


# -- what is no checkpoint -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nothing", "a file", "an empty folder", "an unfinished one"])
def test_what_is_no_checkpoint_is_refused(comm, path, kind):
    place = path.parent / "b"
    told, error = "hold a manifest.json; got none", DamagedCheckpointError
    if kind == "nothing":
        told, error = f"path must be a checkpoint; got '{place}', which does not exist.", None
    if comm.rank == 0:
        if kind == "a file":
            place.write_bytes(b"text")
        elif kind == "an empty folder":
            place.mkdir()
        elif kind == "an unfinished one":
            shutil.copytree(path, place)
            (place / MANIFEST_NAME).rename(place / f"{MANIFEST_NAME}.part")
    with build(comm) as opt:
        take_step(opt)
        before = standing(opt)
        with refused_alike(comm, error or CheckpointError, told):
            load(place, opt)
        with refused_alike(comm, error or CheckpointError):
            load(str(place), opt)
        assert standing(opt) == before
        load(path, opt)


@pytest.mark.parametrize("call", ["save", "load", "Checkpointer.save", "Checkpointer.restore"])
def test_a_state_is_no_optimizer(comm, path, mpi_tmp_path, call):
    state = {"state": {}}
    saver = Checkpointer(mpi_tmp_path)
    told = "opt must be an optimizer of shardopt; got a dict. Pass the optimizer itself"
    with refused_alike(comm, CheckpointError, told):
        match call:
            case "save":
                save(mpi_tmp_path / "new", state)
            case "load":
                load(path, state)
            case "Checkpointer.save":
                saver.save(1, state)
            case "Checkpointer.restore":
                saver.restore(state)


def test_all_ranks_must_load_the_same(comm, path):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    other = path.parent / "b"
    if comm.rank == 0:
        shutil.copytree(path, other)
    with build(comm) as opt:
        take_step(opt)
        before = standing(opt)
        with refused_alike(comm, RankMismatchError, "path must be the same on every rank; got"):
            load(other if is_last(comm) else path, opt)
        assert standing(opt) == before
        assert_steps(opt)


@BOTH_WAYS
def test_a_rank_may_write_the_path_otherwise(comm, path, alone):
    twisted = path.parent / "b" / ".." / "a" if errs(comm, alone) else path
    with build(comm) as opt:
        if comm.rank == 0:
            (path.parent / "b").mkdir()
        comm.Barrier()
        if alone and comm.size > 1:
            with refused_alike(comm, RankMismatchError, "path must be the same on every rank"):
                load(twisted, opt)
        else:
            load(twisted, opt)


def test_a_newer_version_is_refused_and_not_passed_over(comm, mpi_tmp_path):
    with build(comm) as opt:
        for number in (1, 2):
            take_step(opt)
            save(mpi_tmp_path / f"step-{number:012d}", opt)
        newest = mpi_tmp_path / "step-000000000002" / MANIFEST_NAME
        if comm.rank == 0:
            content = json.loads(newest.read_bytes().partition(b"\n")[2])
            content |= {"version": 5, "min_reader_version": 4}
            body = json.dumps(content).encode()
            line = json.dumps({"sha256": hashlib.sha256(body).hexdigest()})
            newest.write_bytes(line.encode() + b"\n" + body)
        before = standing(opt)
        told = "must be of format version 3 or older; got 4. Install a newer shardopt."
        with refused_alike(comm, CheckpointError, told):
            load(newest.parent, opt)
        with Checkpointer(mpi_tmp_path) as saver:
            with refused_alike(comm, CheckpointError, told):
                saver.restore(opt)
            assert standing(opt) == before
            assert saver.restore(opt, step=1).step == 1


# -- what was there before -------------------------------------------------------------------------


def loaded(comm, path):
    """What a fresh optimizer holds after loading, and after a step more."""
    with build(comm) as opt:
        load(path, opt)
        held = values(opt)
        take_step(opt)
        return held, values(opt)


def values(opt):
    return [param.data.tobytes() for param in params_of(opt)]


@BOTH_WAYS
def test_replaced_parameters_are_superseded(comm, path, alone):
    held, stepped = loaded(comm, path)
    with build(comm) as opt:
        take_step(opt)
        if errs(comm, alone):
            for param in params_of(opt):
                param.data = param.data * 0 + 7
        load(path, opt)
        assert values(opt) == held
        take_step(opt)
        assert values(opt) == stepped
        assert opt.last_step.copied_nbytes == 0


def test_replaced_parameters_stay_when_nothing_was_loaded(comm, path):
    with build(comm) as opt:
        new = [param.data * 0 + 7 for param in params_of(opt)]
        for param, array in zip(params_of(opt), new, strict=True):
            param.data = array
        comm.Barrier()
        if comm.rank == 0:
            (path / "surplus").touch()
        comm.Barrier()
        with refused_alike(comm, DamagedCheckpointError, "surplus, too"):
            load(path, opt)
        assert all(p.data is array for p, array in zip(params_of(opt), new, strict=True))
        take_step(opt)
        assert all((param.data > 6.9).all() for param in params_of(opt))


@pytest.mark.parametrize("grads", ["none", "some", "replaced", "after zero_grad"])
def test_gradients_stay_as_they_were(comm, path, grads):
    held, stepped = loaded(comm, path)
    with build(comm) as opt:
        opt.zero_grad(set_to_none=grads == "none")
        for param in params_of(opt) if grads in ("some", "replaced") else ():
            if grads == "replaced":
                param.grad = param.data * 0 + 1
            else:
                param.grad += 1
        mine = [param.grad for param in params_of(opt)]
        load(path, opt)
        assert values(opt) == held
        assert all(p.grad is grad for p, grad in zip(params_of(opt), mine, strict=True))
        if grads in ("some", "replaced"):  # as take_step has them
            opt.step()
            assert values(opt) == stepped
        elif grads == "none":
            with warned(comm, NoGradientWarning):
                opt.step()
            assert values(opt) == held
        else:
            take_step(opt)
            assert values(opt) == stepped


def test_the_report_of_the_last_step_is_of_the_checkpoint(comm, path):
    with build(comm) as opt:
        take_step(opt)
        assert load(path, opt).extra["x"].tolist() == [0, 1, 2]
        assert (opt.last_step.step, opt.last_step.loss_scale) == (2, 4.0)
        assert opt.param_groups[0]["lr"] == 0.125
        take_step(opt)
        assert opt.last_step.step == 3


def test_a_poisoned_parameter_is_forgotten(comm, path):
    with build(comm) as opt:
        for param in params_of(opt):
            param.grad += np.nan
        with warned(comm, NonFiniteWarning):
            opt.step()
        assert opt.last_step.poisoned_param == "w"
        load(path, opt)
        assert opt.last_step.poisoned_param is None
        assert all(np.isfinite(param.data).all() for param in params_of(opt))
        assert_steps(opt)


def test_views_stay_in_the_windows(comm, path):
    """Who holds ``param.data`` sees what is loaded, as after a step."""
    with build(comm) as opt:
        views = [param.data for param in params_of(opt)]
        load(path, opt)
        for param, view in zip(params_of(opt), views, strict=True):
            assert np.shares_memory(param.data, view)
            assert param.data.tobytes() == view.tobytes()


def test_the_same_optimizer_may_load_again_and_again(comm, path):
    with build(comm) as opt:
        seen = []
        for _ in range(3):
            load(path, opt)
            seen.append(values(opt))
            take_step(opt)
            seen.append(values(opt))
        assert seen[:2] * 3 == seen


def test_a_name_that_safetensors_reserves_is_refused(comm, path):
    params = [Parameter(np.ones(3), "__metadata__")]
    with (
        build(comm, params) as opt,
        refused_alike(
            comm, CheckpointError, "names of tensors must be unique in a file; got '__metadata__'"
        ),
    ):
        save(path.parent / "b", opt)
    assert sorted(place.name for place in path.parent.iterdir()) == ["a"]


@pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "stepped"])
def test_a_checkpoint_that_changes_while_it_is_loaded_is_found(comm, path, monkeypatch, stepped):
    """Between the readings: the optimizer may hold parts of it, but nobody goes on unawares."""
    name = sorted(place.name for place in path.iterdir())[-1]
    size = (path / name).stat().st_size
    read, calls = Reader.read, []

    def changed(self, *args):
        calls.append(args)
        comm.Barrier()
        if len(calls) == 3 and comm.rank == 0:
            for byte in range(4096, size):
                flip(name, 8 * byte)(path)
        comm.Barrier()
        return read(self, *args)

    with build(comm) as opt:
        if stepped:
            take_step(opt)
        with monkeypatch.context() as patch:
            patch.setattr(Reader, "read", changed)
            told = ("as it changed while it was loaded", f"chunk 0 of file {name}", "load another")
            with refused_alike(comm, DamagedCheckpointError, *told):
                load(path, opt)
            assert len(calls) == 3  # extra, and the two readings
        if comm.rank == 0:
            for byte in range(4096, size):
                flip(name, 8 * byte)(path)
        comm.Barrier()
        load(path, opt)
        assert_steps(opt)
