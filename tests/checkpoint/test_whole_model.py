"""A checkpoint with ``model=`` keeps all of a torch model, by name, and brings it back in place."""

import json

import numpy as np
import pytest
from mpi4py import MPI

from shardopt.checkpoint import Checkpointer, load, save
from shardopt.checkpoint.format.reader import read_manifest
from shardopt.errors import CheckpointError, CheckpointWarning, RankMismatchError
from tests.checkpoint.make_golden import FOLDER
from tests.support.checkpoints import call
from tests.support.damage import flip, harmed, refused_alike
from tests.support.errors import POLICY, is_last, warned
from tests.support.frameworks import require

torch = require("torch")

from shardopt.torch import NAdam  # noqa: E402
from tests.checkpoint.make_golden_model import plain  # noqa: E402
from tests.support.whole_models import Net, bits, build, moments, train  # noqa: E402

pytestmark = pytest.mark.mpi
TRAINED = ["embed.weight", "norm.weight", "norm.bias", "head.weight"]


@pytest.fixture
def saved(comm, mpi_tmp_path):
    """A checkpoint of a model after two steps, and the bits of the model."""
    model, opt = build(comm)
    with opt:
        train(model, opt)
        save(mpi_tmp_path / "a", opt, model=model, extra={"x": 1})
        return mpi_tmp_path / "a", bits(model), moments(opt)


def without_scratch(values):
    return {name: value for name, value in values.items() if name != "scratch"}


def test_all_of_the_model_comes_back(comm, saved):
    path, expected, expected_moments = saved
    model, opt = build(comm, seed=3)
    tensors = dict(model.state_dict(keep_vars=True))
    with opt:
        restored = load(path, opt, model=model)
        assert restored.model is model
        assert restored.extra == {"x": 1}
        assert restored.report.is_perfect
        assert set(restored.report.loaded) == expected.keys() - {"scratch", "tied.weight"}
        assert without_scratch(bits(model)) == without_scratch(expected)
        assert model.scratch.tolist() == [3.0, 3.0]  # not persistent
        assert moments(opt) == expected_moments
        for name, value in model.state_dict(keep_vars=True).items():
            if isinstance(value, torch.Tensor):
                assert value is tensors[name]
        train(model, opt)


def test_names_are_the_models_and_nothing_is_stored_twice(comm, saved):
    manifest = read_manifest(saved[0])
    assert [param.name for param in manifest.params] == TRAINED
    assert manifest.model.aliases == {"tied.weight": "head.weight"}
    held = {*TRAINED, "tied.weight", "scratch"}
    assert manifest.model.values.keys() == saved[1].keys() - held
    arrays = [len(file.arrays) for file in manifest.files]
    assert arrays == [8, *[0] * (comm.size - 1)]


@pytest.mark.parametrize("num_savers", [1, 2, 3])
def test_any_number_of_ranks_loads_it(comm, mpi_tmp_path, num_savers):
    if num_savers >= comm.size:
        pytest.skip("needs more ranks")
    part = comm.Split(0 if comm.rank < num_savers else MPI.UNDEFINED)
    expected = None
    if part != MPI.COMM_NULL:
        model, opt = build(part)
        with opt:
            train(model, opt)
            save(mpi_tmp_path / "a", opt, model=model)
            expected = without_scratch(bits(model))
        part.Free()
    expected = comm.bcast(expected)
    model, opt = build(comm, seed=1)
    with opt:
        load(mpi_tmp_path / "a", opt, model=model)
        assert without_scratch(bits(model)) == expected


def test_buffers_are_copied_when_an_asynchronous_save_is_called(comm, mpi_tmp_path):
    model, opt = build(comm)
    other, other_opt = build(comm, seed=1)
    with opt, other_opt, Checkpointer(mpi_tmp_path) as checkpointer:
        for step in (1, 2):
            train(model, opt)
            expected = bits(model)
            checkpointer.save(step, opt, model=model)
            for value in model.buffers():
                value.zero_()
            model.frozen.weight.zero_()
            model.counter.seen = -1
            checkpointer.wait()
            restored = checkpointer.restore(other_opt, model=other)
            assert (restored.step, restored.model) == (step, other)
            assert without_scratch(bits(other)) == without_scratch(expected)


@pytest.mark.filterwarnings("ignore:model-v1-2:shardopt.errors.CheckpointWarning")
def test_a_model_that_an_earlier_version_has_saved_comes_back(comm):
    path = FOLDER / "model-v1-2"
    model, opt = build(comm, seed=3)
    with opt:
        restored = load(path, opt, model=model)
        expected = json.loads(path.with_suffix(".json").read_text())
        own = comm.rank if comm.rank < 2 else 0
        assert plain(model) == {**expected, "count": ["torch.int64", [], own]}
        scale, count = restored.extra["average"]
        assert (scale.dtype, scale.tolist()) == (torch.bfloat16, expected["scale"][2])
        assert (count.dtype, count.item()) == (torch.int64, 0)
        train(model, opt)


# -- buffers of each rank --------------------------------------------------------------------------


def test_each_rank_may_keep_its_own_buffers(comm, mpi_tmp_path):
    model, opt = build(comm)
    with opt:
        train(model, opt)
        model.count.fill_(comm.rank)
        model.counter.seen = 100 + comm.rank
        model.frozen.weight.fill_(0)
        save(mpi_tmp_path / "a", opt, model=model)
        save(mpi_tmp_path / "b", opt, model=model, per_rank_buffers=True)
        for folder, own in (("a", 0), ("b", comm.rank)):
            model.count.fill_(-1)
            load(mpi_tmp_path / folder, opt, model=model)
            assert (model.count.item(), model.counter.seen) == (own, 100 + own)


def test_other_numbers_of_ranks_are_told_what_becomes_of_them(comm, mpi_tmp_path):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    model, opt = build(comm)
    alone, alone_opt = build(MPI.COMM_SELF, seed=1)
    with opt, alone_opt:
        model.count.fill_(10 + comm.rank)
        save(mpi_tmp_path / "a", opt, model=model, per_rank_buffers=True)
        with pytest.warns(CheckpointWarning, match="those of ranks from 1 on were not loaded"):
            load(mpi_tmp_path / "a", alone_opt, model=alone)
        assert alone.count.item() == 10
        save(mpi_tmp_path / f"b{comm.rank}", alone_opt, model=alone, per_rank_buffers=True)
        comm.Barrier()
        with warned(comm, CheckpointWarning, "ranks from 1 on have the buffers of rank 0"):
            load(mpi_tmp_path / "b0", opt, model=model)
        assert model.count.item() == 10


# -- names -----------------------------------------------------------------------------------------


def test_a_parameter_that_the_model_does_not_have_keeps_its_name(comm, mpi_tmp_path):
    def params(model):
        more = torch.nn.Parameter(torch.ones(3))
        return [*((n, p) for n, p in model.named_parameters() if p.requires_grad), ("more", more)]

    model, opt = build(comm, params=params)
    with opt:
        save(mpi_tmp_path / "a", opt, model=model)
        assert [p.name for p in read_manifest(mpi_tmp_path / "a").params] == [*TRAINED, "more"]


class Compiled(torch.nn.Module):
    """A wrapper as torch.compile makes it, which takes seconds to load; see tests/torch."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


def test_an_optimizer_knows_the_names_of_what_it_was_given(comm, mpi_tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    names = list(model.state_dict())
    compiled = Compiled(model)
    forms = [
        model,
        model.parameters(),
        model.named_parameters(),
        compiled,
        compiled.parameters(),
        torch.nn.Sequential(model[0], Compiled(model[1])).parameters(),
        torch.nn.DataParallel(model),
        torch.nn.DataParallel(model).parameters(),
    ]
    for number, form in enumerate(forms):
        path = mpi_tmp_path / str(number)
        with NAdam(form, comm=comm, policy=POLICY) as opt:
            save(path, opt)
            assert [param.name for param in read_manifest(path).params] == names
            assert load(path, opt).report.is_perfect


@pytest.mark.parametrize("wrap", [Compiled, torch.nn.DataParallel])
def test_wrapped_and_unwrapped_models_load_each_others_checkpoints(comm, mpi_tmp_path, wrap):
    model, opt = build(comm)
    other, other_opt = build(comm, seed=1)
    with opt, other_opt:
        train(model, opt)
        save(mpi_tmp_path / "a", opt, model=wrap(model))
        assert load(mpi_tmp_path / "a", other_opt, model=other).report.is_perfect
        assert without_scratch(bits(other)) == without_scratch(bits(model))
        train(model, opt)
        save(mpi_tmp_path / "b", opt, model=model)
        load(mpi_tmp_path / "b", other_opt, model=wrap(other))
        assert without_scratch(bits(other)) == without_scratch(bits(model))


def test_names_of_wrappers_in_the_optimizer_are_looked_through(comm, mpi_tmp_path):
    def params(prefix):
        return [(f"{prefix}{name}", torch.nn.Parameter(torch.ones(3))) for name in ("a.w", "b.w")]

    with (
        NAdam(params("module."), comm=comm, policy=POLICY) as opt,
        NAdam(params("_orig_mod."), comm=comm, policy=POLICY) as other,
        NAdam(params(""), comm=comm, policy=POLICY) as plain,
    ):
        save(mpi_tmp_path / "a", opt)
        for each in (other, plain):
            assert load(mpi_tmp_path / "a", each).report.is_perfect
        save(mpi_tmp_path / "b", plain)
        assert load(mpi_tmp_path / "b", opt).report.is_perfect


def test_without_names_the_first_save_and_every_load_warn(comm, mpi_tmp_path):
    model, opt = build(comm)
    with opt:
        with warned(comm, CheckpointWarning, r"4 of 4 parameters have no names: .*model="):
            save(mpi_tmp_path / "a", opt)
        save(mpi_tmp_path / "b", opt)
        for _ in range(2):
            with warned(comm, CheckpointWarning, "4 of the parameters, as they have.*model="):
                report = load(mpi_tmp_path / "a", opt).report
        assert report.matched_by_order == 4
        with refused_alike(comm, CheckpointError, "the checkpoint must hold", "strict=False"):
            load(mpi_tmp_path / "a", opt, model=model)  # it has no buffers


def test_a_checkpoint_of_a_model_loads_without_one(comm, saved):
    model, opt = build(
        comm, seed=1, params=lambda m: [p for p in m.named_parameters() if p[1].requires_grad]
    )
    with opt:
        before = model.count.item()
        with warned(comm, CheckpointWarning, "buffers and other values of the model: pass model="):
            report = load(saved[0], opt).report
        assert "norm.running_mean" in report.surplus
        assert model.count.item() == before
        assert model.embed.weight.tolist() == saved[1]["embed.weight"][2]


# -- merged for inference --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_merged_file_is_the_models_state_dict(comm, saved, capsys, dtype):
    stock = pytest.importorskip("safetensors.torch")
    path, expected, _ = saved
    if comm.rank == 0:
        out = path.parent / "out.safetensors"
        convert = [] if dtype is None else ["--dtype", dtype]
        assert call(capsys, "merge", path, out, *convert).code == 0
        loaded = stock.load_file(out)
        model = Net(9)
        wanted = {n for n, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
        assert loaded.keys() == wanted
        extra = {"counter._extra_state": model.state_dict()["counter._extra_state"]}
        model.load_state_dict({**loaded, **extra}, strict=True)
        for name in wanted:
            found = bits(model)[name]
            if dtype is None:
                assert found == expected[name]
            else:
                assert loaded[name].dtype in (torch.int64, torch.bfloat16)
    comm.Barrier()


def test_merge_says_that_names_are_positions(comm, mpi_tmp_path, capsys):
    _, opt = build(comm)
    with opt, warned(comm, CheckpointWarning):
        save(mpi_tmp_path / "a", opt)
    if comm.rank == 0:
        out = mpi_tmp_path / "out.safetensors"
        result = call(capsys, "merge", mpi_tmp_path / "a", out)
        assert "4 names are positions (param0 ...)" in result.stderr
        assert "--names FILE" in result.stderr
        for text in (json.dumps(TRAINED), "\n".join(TRAINED)):
            (mpi_tmp_path / "names").write_text(text)
            result = call(
                capsys,
                "merge",
                mpi_tmp_path / "a",
                out,
                "--names",
                mpi_tmp_path / "names",
                "--force",
            )
            assert (result.code, result.stderr) == (0, "")
            header = out.read_bytes()
            assert all(name.encode() in header for name in TRAINED)
        (mpi_tmp_path / "names").write_text("one\ntwo")
        result = call(
            capsys, "merge", mpi_tmp_path / "a", out, "--names", mpi_tmp_path / "names", "--force"
        )
        assert result.code == 2
        assert "--names must be 4 different names" in result.stderr
    comm.Barrier()


def test_the_command_line_shows_the_model(comm, saved, capsys):
    if comm.rank == 0:
        shown = call(capsys, "show", saved[0]).stdout
        assert "norm.running_mean" in shown
        assert "tensor(bfloat16, [3])" in shown
        assert (
            call(capsys, "show", "--json", saved[0]).json["model"]["count"] == "tensor(int64, [])"
        )
        assert call(capsys, "diff", saved[0], saved[0]).code == 0
        assert call(capsys, "verify", saved[0]).code == 0
    comm.Barrier()


def test_diff_compares_buffers(comm, mpi_tmp_path, capsys):
    model, opt = build(comm)
    with opt:
        save(mpi_tmp_path / "a", opt, model=model)
        model.count += 2**60 + 1
        save(mpi_tmp_path / "b", opt, model=model)
        model.count += 1  # which float64 does not tell
        save(mpi_tmp_path / "c", opt, model=model)
    if comm.rank == 0:
        for a, b in ("ab", "bc"):
            found = call(capsys, "diff", "--json", mpi_tmp_path / a, mpi_tmp_path / b)
            assert found.code == 1
            assert [each["name"] for each in found.json["tensors"]] == ["count"]
    comm.Barrier()


# -- what does not fit -----------------------------------------------------------------------------


def standing(model, opt):
    return bits(model), moments(opt), repr(opt.param_groups[0]["lr"]), opt.last_step.step


def more(model):
    model.register_buffer("surplus", torch.ones(2))


def less(model):
    del model.scale


def reshape(model):
    model.scale = torch.ones(4)


CHANGES = {
    "a buffer more": (more, "the checkpoint must hold 'surplus', as the model does; got"),
    "a buffer less": (less, "the model must have 'scale', as in the checkpoint; got nothing"),
    "another shape": (
        reshape,
        "'scale' must have the same shape and dtype, as in the checkpoint; got (4,)",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_does_not_fit_is_refused(comm, saved, change):
    alter, told = CHANGES[change]
    model, opt = build(comm, seed=1)
    with opt:
        train(model, opt, 1)
        alter(model)
        if change == "a buffer less":
            model.scale = None
        before = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
        before = {name: value.tolist() for name, value in before.items()}
        with refused_alike(comm, CheckpointError, told):
            load(saved[0], opt, model=model)
        after = {
            n: v.tolist() for n, v in model.state_dict().items() if isinstance(v, torch.Tensor)
        }
        assert after == before
        assert opt.last_step.step == 1


def test_a_damaged_buffer_changes_nothing(comm, saved):
    path = saved[0]
    manifest = read_manifest(path)
    array = manifest.files[0].arrays[0]
    model, opt = build(comm, seed=1)
    with opt:
        train(model, opt, 1)
        before = standing(model, opt)
        harm = flip(manifest.files[0].name, 8 * array.offset)
        with harmed(comm, path, harm), refused_alike(comm):
            load(path, opt, model=model)
        assert standing(model, opt) == before


def test_extra_state_that_the_model_refuses_is_an_error_on_all_ranks(comm, mpi_tmp_path):
    model, opt = build(comm)
    with opt:
        model.counter.seen = -3 if is_last(comm) else 3
        save(mpi_tmp_path / "a", opt, model=model, per_rank_buffers=True)
        told = ("could not load all of the model: ValueError: seen must not be negative",)
        with pytest.raises(CheckpointError, match=told[0]):
            load(mpi_tmp_path / "a", opt, model=model)


def test_what_cannot_be_saved_is_refused_by_name(comm, mpi_tmp_path):
    model, opt = build(comm)
    with opt:
        model.counter.get_extra_state = lambda: {"file": open}
        told = "'counter._extra_state' of the model['file'] must be None, a number"
        with refused_alike(comm, CheckpointError, told):
            save(mpi_tmp_path / "a", opt, model=model)
        for wrong in (model.state_dict(keep_vars=True).keys(), opt):
            with refused_alike(comm, CheckpointError, "model must be a torch.nn.Module; got a"):
                save(mpi_tmp_path / "a", opt, model=wrong)
        with refused_alike(comm, CheckpointError, "per_rank_buffers must be False without model="):
            save(mpi_tmp_path / "a", opt, per_rank_buffers=True)
    assert comm.bcast(list(mpi_tmp_path.iterdir())) == []


def test_ranks_must_save_and_load_the_same_model(comm, saved, mpi_tmp_path):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    model, opt = build(comm, seed=1)
    odd = is_last(comm)
    with opt:
        for options in (
            {"model": None if odd else model},
            {"model": model, "per_rank_buffers": odd},
        ):
            with refused_alike(comm, RankMismatchError, "must be the same on every rank"):
                save(mpi_tmp_path / "b", opt, **options)
        for name, values in {"strict": (True, False), "only": (None, "params")}.items():
            with refused_alike(comm, RankMismatchError, f"{name} must be the same on every rank"):
                load(saved[0], opt, model=model, **{name: values[odd]})
        with refused_alike(comm, RankMismatchError, "rename must be the same on every rank"):
            rename = {"count": "counted"} if odd else {"scale": "scaled"}
            load(saved[0], opt, model=model, strict=False, rename=rename)
        assert np.isfinite(model.embed.weight.detach().numpy()).all()
