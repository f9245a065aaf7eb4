"""Loads of a part of a checkpoint: what fits, only the parameters, and under other names."""

import numpy as np
import pytest

from shardopt import NAdam, Parameter
from shardopt.checkpoint import Checkpointer, LoadReport, load, save
from shardopt.errors import CheckpointError, CheckpointWarning
from tests.support.damage import assert_refused, flip, refused_alike, standing
from tests.support.errors import POLICY, assert_steps, is_last, params_of, take_step, warned

pytestmark = pytest.mark.mpi
IGNORED = pytest.mark.filterwarnings("ignore::shardopt.errors.CheckpointWarning")
SPECS = {"a": ((300,), "float32"), "b": ((7, 11), "bfloat16"), "c": ((5,), "float64")}


def build(comm, specs=None, seed=0, **settings):
    rng = np.random.default_rng(seed)
    params = [
        Parameter(rng.standard_normal(shape).astype(np.dtype(dtype)), name)
        for name, (shape, dtype) in (specs or SPECS).items()
    ]
    return NAdam(params, lr=0.125, comm=comm, policy=POLICY, **settings)


def values(opt):
    return {param.name: param.data.tobytes() for param in params_of(opt)}


def state(opt):
    """Moments, masters and step counts by name."""
    return {
        param.name: {key: np.asarray(value).tobytes() for key, value in opt.state[param].items()}
        for param in params_of(opt)
    }


@pytest.fixture
def saved(comm, mpi_tmp_path):
    with build(comm) as opt:
        for _ in range(3):
            take_step(opt)
        save(mpi_tmp_path / "a", opt)
        return mpi_tmp_path / "a", values(opt), state(opt)


OTHER = {"a": ((300,), "float32"), "b": ((7, 12), "bfloat16"), "new": ((5,), "float64")}


@pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "stepped"])
def test_what_fits_is_loaded_and_the_rest_stays(comm, saved, stepped):
    path, saved_values, saved_state = saved
    with build(comm, OTHER, seed=1) as opt:
        if stepped:
            take_step(opt)
            take_step(opt)
        for param in params_of(opt):
            param.data[...] = param.data * 2  # which no step has adopted yet
        before, state_before = values(opt), state(opt)
        with warned(comm, CheckpointWarning, "not in the checkpoint, stay as they are: new"):
            report = load(path, opt, strict=False).report
        differs = {"b": "(7, 12) bfloat16 here, (7, 11) bfloat16 in the checkpoint"}
        assert report == LoadReport(("a",), ("new",), ("c",), differs)
        for line in ("only in the checkpoint, not loaded: c", "of another shape or dtype"):
            assert line in str(report)
        assert values(opt) == before | {"a": saved_values["a"]}
        kept = {name: state_before[name] for name in ("b", "new")}
        if stepped:  # else the masters follow the values that were written
            assert {name: s for name, s in state(opt).items() if name != "b"} == {
                "a": saved_state["a"],
                "new": kept["new"],
            }
        assert opt.last_step.step == 3
        assert_steps(opt)
        with refused_alike(comm, CheckpointError, "pass strict=False to load what fits"):
            load(path, opt)


@pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "stepped"])
def test_only_params_starts_moments_and_steps_anew(comm, saved, stepped):
    path, saved_values, saved_state = saved
    with build(comm, seed=1) as opt, build(comm, seed=1) as twin:
        if stepped:
            take_step(opt)
        opt.param_groups[0]["lr"] = 0.5
        assert load(path, opt, only="params").report.is_perfect
        assert opt.param_groups[0]["lr"] == 0.5
        assert values(opt) == saved_values
        for param in params_of(opt):
            entry = opt.state[param]
            assert entry["step"] == 0
            assert entry["mu_product"] == 1
            assert not entry["exp_avg"].any()
            assert not entry["exp_avg_sq"].any()
        assert state(opt)["b"]["master"] == saved_state["b"]["master"]
        load(path, twin)
        twin.param_groups[0]["lr"] = 0.5
        twin.reset_state()
        for each in opt, twin:
            take_step(each)
        for name in ("a", "c"):  # a reset starts masters anew, too
            assert values(opt)[name] == values(twin)[name]


def test_moments_that_were_written_before_the_first_step_are_moments_too(comm, saved):
    path, saved_values, _ = saved
    with build(comm, seed=1) as opt:
        written = {}
        for index, param in enumerate(params_of(opt)):
            wide = param.data.astype(np.float64 if param.name == "c" else np.float32)
            written[index] = {key: np.ones_like(wide) for key in ("exp_avg", "exp_avg_sq")}
            written[index] |= {"step": 0, "mu_product": 1.0}
            if param.name == "b":
                written[index]["master"] = wide
        opt.load_state_dict({**opt.state_dict(), "state": written})
        assert opt.state[params_of(opt)[0]]["exp_avg"].all()
        file = max(path.glob("*.safetensors"))
        assert_refused(comm, path, opt, flip(file.name, 8 * file.stat().st_size - 1))
        load(path, opt, only="params")
        assert values(opt) == saved_values
        for param in params_of(opt):
            assert not opt.state[param]["exp_avg"].any()
            assert not opt.state[param]["exp_avg_sq"].any()


def test_counts_that_were_written_stay_where_a_parameter_does(comm, saved):
    with build(comm, OTHER, seed=1) as opt:
        take_step(opt)
        new = params_of(opt)[2]
        opt.state[new] = {**opt.state[new], "step": 7}
        with warned(comm, CheckpointWarning, "not in the checkpoint, stay as they are: new"):
            load(saved[0], opt, strict=False)
        assert opt.state[new]["step"] == 7
        take_step(opt)
        assert opt.state[new]["step"] == 8


def test_other_groups_do_not_matter_to_parameters_alone(comm, saved):
    with build(comm) as opt:
        params = params_of(opt)
        groups = [{"params": params[:1]}, {"params": params[1:]}]
    with NAdam(groups, comm=comm, policy=POLICY) as opt:
        with refused_alike(comm, CheckpointError, "group of 'b' must be 0"):
            load(saved[0], opt)
        load(saved[0], opt, only="params")
        assert values(opt) == saved[1]
        with warned(comm, CheckpointWarning, "1 param groups there, 2 here: hyperparameters stay"):
            load(saved[0], opt, strict=False)
        assert state(opt) == saved[2]


RENAMES = {"dict": {"a": "x.a", "c": "x.c"}, "function": lambda n: n if n == "b" else f"x.{n}"}


@pytest.mark.parametrize("rename", RENAMES)
def test_renamed_parameters_are_found(comm, saved, rename):
    specs = {name if name == "b" else f"x.{name}": spec for name, spec in SPECS.items()}
    with build(comm, specs, seed=1) as opt:
        told = "the model must have a parameter 'a', as in the checkpoint; got 'x.a' instead"
        with refused_alike(comm, CheckpointError, told):
            load(saved[0], opt)
        assert load(saved[0], opt, rename=RENAMES[rename]).report.is_perfect
        assert list(values(opt).values()) == list(saved[1].values())


@IGNORED
def test_positions_may_be_renamed(comm, mpi_tmp_path):
    unnamed = [Parameter(np.arange(3.0) + i) for i in range(2)]
    named = [Parameter(np.zeros(3), name) for name in ("second", "first")]
    with (
        NAdam(unnamed, comm=comm, policy=POLICY) as opt,
        NAdam(named, comm=comm, policy=POLICY) as other,
    ):
        save(mpi_tmp_path / "a", opt)
        rename = {"param0": "first", "param1": "second"}
        assert load(mpi_tmp_path / "a", other, rename=rename).report.is_perfect
        assert [param.data[0] for param in named] == [1.0, 0.0]


BAD = {
    "unknown": ({"rename": {"z": "a"}}, "rename must hold names of the checkpoint; got 'z'"),
    "twice": ({"rename": lambda name: "a"}, "rename must give each name once; got 'a' 3 times"),
    "no text": ({"rename": lambda name: 1 if name == "a" else name}, "rename must give text"),
    "no rename": ({"rename": 3}, "rename must be a dict or a function; got int"),
    "only": ({"only": "moments"}, "only must be None or 'params'; got 'moments'"),
    "no model": ({"model": [1]}, "model must be None for an optimizer of arrays; got a list"),
}


@pytest.mark.parametrize("bad", BAD)
def test_options_that_make_no_sense_are_refused(comm, saved, bad):
    options, told = BAD[bad]
    with build(comm, seed=1) as opt:
        take_step(opt)
        before = standing(opt)
        with refused_alike(comm, CheckpointError, told):
            load(saved[0], opt, **options)
        assert standing(opt) == before


def test_an_error_in_the_users_function_is_raised_on_all_ranks(comm, saved):
    def rename(name):
        return {}[name] if is_last(comm) else name

    with build(comm, seed=1) as opt, pytest.raises(KeyError):
        load(saved[0], opt, rename=rename)


def test_a_checkpointer_restores_parts_too(comm, mpi_tmp_path):
    with (
        build(comm) as opt,
        build(comm, OTHER, seed=1) as other,
        Checkpointer(mpi_tmp_path) as checkpointer,
    ):
        take_step(opt)
        checkpointer.save(1, opt, {"x": 2})
        checkpointer.wait()
        with refused_alike(comm, CheckpointError, "as in the checkpoint"):
            checkpointer.restore(other)
        with warned(comm, CheckpointWarning, "of another shape or dtype, stay as they are: b"):
            restored = checkpointer.restore(other, strict=False, only="params")
        assert (restored.step, restored.extra, restored.report.loaded) == (1, {"x": 2}, ("a",))
        assert values(other)["a"] == values(opt)["a"]


# -- a model that is trained in another way --------------------------------------------------------


@IGNORED
@pytest.mark.parametrize("names", [("head",), ("head", "frozen")])
def test_what_was_trained_may_be_frozen_and_the_other_way_round(comm, mpi_tmp_path, names):
    torch = pytest.importorskip("torch")
    from shardopt.torch import NAdam as TorchNAdam
    from tests.support.whole_models import Net, train

    def build(seed, names):
        model = Net(seed)
        named = list(model.named_parameters())
        trained = [(name, p) for name, p in named if name.partition(".")[0] in names]
        for name, param in named:
            param.requires_grad_(name.partition(".")[0] in names)
        return model, TorchNAdam(trained, comm=comm, policy=POLICY)

    model, opt = build(0, ("embed", "head"))
    other, other_opt = build(1, names)
    with opt, other_opt:
        train(model, opt)
        save(mpi_tmp_path / "a", opt, model=model)
        with refused_alike(comm, CheckpointError, "as in the checkpoint"):
            load(mpi_tmp_path / "a", other_opt, model=other)
        report = load(mpi_tmp_path / "a", other_opt, model=other, strict=False).report
        assert not report.missing
        assert not report.surplus
        assert not report.reshaped
        expected = model.state_dict()
        for name, value in other.state_dict().items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, expected[name]), name
        assert float(other_opt.state[other.head.weight]["step"]) == 2
        if "frozen" in names:
            assert float(other_opt.state[other.frozen.weight]["step"]) == 0
        train(other, other_opt, 1)
