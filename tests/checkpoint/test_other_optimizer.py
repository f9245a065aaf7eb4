"""Checkpoints know which optimizer has saved them; another takes them over if it is told to."""

import json

import numpy as np
import pytest

import shardopt
from shardopt import Parameter
from shardopt.checkpoint import Checkpointer, load, save
from shardopt.checkpoint.format.manifest import MANIFEST_NAME
from shardopt.checkpoint.format.parsing import from_text
from shardopt.errors import CheckpointError, CheckpointWarning
from tests.checkpoint.make_golden import FOLDER
from tests.support.damage import refused_alike, standing
from tests.support.errors import POLICY, assert_steps, params_of, take_step, warned

pytestmark = pytest.mark.mpi


def build(comm, name, seed=0, **settings):
    rng = np.random.default_rng(seed)
    params = [
        Parameter(rng.standard_normal(300).astype(np.float32), "a"),
        Parameter(rng.standard_normal((7, 11)), "b"),
    ]
    return getattr(shardopt, name)(params, comm=comm, policy=POLICY, **settings)


def moments(opt):
    return [
        opt.state[p][key].tobytes() for p in params_of(opt) for key in ("exp_avg", "exp_avg_sq")
    ]


@pytest.fixture
def save_with(comm, mpi_tmp_path):
    """Save three steps of an optimizer; return the path, its moments and its momenta."""

    def save_three_steps(name):
        with build(comm, name, lr=0.125) as opt:
            for _ in range(3):
                take_step(opt)
            save(mpi_tmp_path / "a", opt)
            entry = opt.state[params_of(opt)[0]]
            return mpi_tmp_path / "a", moments(opt), entry.get("mu_product")

    return save_three_steps


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RAdam"])
def test_a_checkpoint_goes_on_in_its_own_optimizer(comm, save_with, name):
    path, saved, _ = save_with(name)
    with build(comm, name, seed=1) as opt:
        assert load(path, opt).report.is_perfect
        assert moments(opt) == saved
        assert opt.param_groups[0]["lr"] == 0.125
        assert set(opt.state[params_of(opt)[0]]) == {"step", "exp_avg", "exp_avg_sq"}
        assert_steps(opt)
    manifest = from_text((path / MANIFEST_NAME).read_bytes())
    assert (manifest.optimizer, manifest.version) == (name, 3)


@pytest.mark.parametrize(
    ("saver", "name", "note"),
    [
        ("NAdam", "AdamW", "; mu_product was dropped"),
        ("AdamW", "NAdam", "; mu_product was computed from the step counts"),
        ("RAdam", "Adam", "; the hyperparameters of this Adam stay"),
    ],
)
def test_another_optimizer_takes_a_state_over_only_if_asked_to(comm, save_with, saver, name, note):
    path, saved, product = save_with(saver)
    told = f"must be {name}'s, as the optimizer is; got {saver}'s. Load it into {saver}, pass "
    with build(comm, name, seed=1) as opt:
        before = standing(opt)
        for settings in ({}, {"strict": False}):
            with refused_alike(comm, CheckpointError, f"{told}other_optimizer=True"):
                load(path, opt, **settings)
        assert standing(opt) == before
        lr = opt.param_groups[0]["lr"]
        with warned(comm, CheckpointWarning, f"moments and step counts are of {saver}"):
            report = load(path, opt, other_optimizer=True).report
        assert note in str(report)
        assert moments(opt) == saved
        assert opt.param_groups[0]["lr"] == lr
        entry = opt.state[params_of(opt)[0]]
        assert entry["step"] == 3
        assert ("mu_product" in entry) == (name == "NAdam")
        if name == "NAdam":
            with build(comm, "NAdam") as same:
                for _ in range(3):
                    take_step(same)
                assert entry["mu_product"] == same.state[params_of(same)[0]]["mu_product"]
        assert (product is not None) == (saver == "NAdam")
        assert_steps(opt)
        assert opt.last_step.step == 4


def test_parameters_alone_are_of_no_optimizer(comm, save_with):
    path, _, _ = save_with("NAdam")
    with build(comm, "AdamW", seed=1) as opt:
        assert load(path, opt, only="params").report.is_perfect
        assert opt.state[params_of(opt)[0]]["step"] == 0


def test_a_checkpointer_does_the_same(comm, mpi_tmp_path):
    with Checkpointer(mpi_tmp_path) as saver, build(comm, "AdamW") as opt:
        take_step(opt)
        saver.save(1, opt)
        with build(comm, "RAdam") as other:
            with refused_alike(comm, CheckpointError, "got AdamW's"):
                saver.restore(other)
            with warned(comm, CheckpointWarning, "moments and step counts are of AdamW"):
                assert saver.restore(other, other_optimizer=True).step == 1


def test_checkpoints_of_nadam_stay_readable_for_older_versions(comm, save_with):
    path, _, _ = save_with("NAdam")
    content = json.loads((path / MANIFEST_NAME).read_bytes().partition(b"\n")[2])
    assert content["optimizer"]["name"] == "NAdam"
    assert content["min_reader_version"] == 1
    old = min(each for each in FOLDER.iterdir() if each.name.startswith("v1-"))
    assert from_text((old / MANIFEST_NAME).read_bytes()).optimizer == "NAdam"


def test_ranks_that_disagree_are_told(comm, save_with):
    if comm.size == 1:
        return
    path, _, _ = save_with("NAdam")
    with build(comm, "AdamW", seed=1) as opt:
        with pytest.raises(Exception, match="other_optimizer|must be AdamW's") as caught:
            load(path, opt, other_optimizer=comm.rank > 0)
        assert comm.allgather(str(caught.value)) == [str(caught.value)] * comm.size
        assert_steps(opt)
