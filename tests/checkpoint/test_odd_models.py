"""Models of torch with hooks, shared extra state and buffers of other dtypes: all or an error."""

import pytest

from shardopt.checkpoint import load, save
from shardopt.errors import CheckpointError, CheckpointWarning
from tests.support.checkpoints import call, refused
from tests.support.damage import refused_alike
from tests.support.errors import POLICY, warned
from tests.support.frameworks import require

torch = require("torch")

from shardopt.torch import NAdam  # noqa: E402

pytestmark = pytest.mark.mpi


class Extra(torch.nn.Module):
    def __init__(self, state):
        super().__init__()
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


def build(comm, seed=0, **buffers):
    model = torch.nn.Linear(3, 2)
    for name, value in buffers.items():
        model.register_buffer(name, torch.as_tensor(value))
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(seed)
    return model, NAdam(model, comm=comm, policy=POLICY)


def test_modules_that_share_a_tensor_as_extra_state_all_get_it(comm, mpi_tmp_path):
    model, opt = build(comm)
    other, other_opt = build(comm, 1)
    for each, value in (model, 1.0), (other, 0.0):
        each.a = Extra(torch.full((2,), value))
        each.b = Extra(each.a.state)
    with opt, other_opt:
        save(mpi_tmp_path / "a", opt, model=model)
        assert load(mpi_tmp_path / "a", other_opt, model=other).report.is_perfect
    assert other.a.state.tolist() == other.b.state.tolist() == [1.0, 1.0]


def test_what_load_state_dict_does_not_know_is_not_called_loaded(comm, mpi_tmp_path):
    def add(module, state, prefix, _):
        state[prefix + "added"] = torch.ones(2)

    model, opt = build(comm, kept=2.0)
    model.register_state_dict_post_hook(add)
    with opt:
        save(mpi_tmp_path / "a", opt, model=model)
        model.kept.zero_()
        with refused_alike(comm, CheckpointError, "load_state_dict() does not know 'added'"):
            load(mpi_tmp_path / "a", opt, model=model)
        with warned(comm, CheckpointWarning, "only in the checkpoint, not loaded: added"):
            report = load(mpi_tmp_path / "a", opt, model=model, strict=False).report
    assert set(report.loaded) == {"weight", "bias", "kept"}
    assert model.kept == 2


@pytest.mark.parametrize(
    ("there", "here"), [("float32", "int8"), ("bfloat16", "float16"), ("float8_e5m2", "uint8")]
)
def test_numbers_are_not_converted(comm, mpi_tmp_path, there, here):
    values = torch.tensor([2.75, 0.1]).to(getattr(torch, there))
    model, opt = build(comm, stats=values)
    other, other_opt = build(comm, 1, stats=torch.zeros(2, dtype=getattr(torch, here)))
    with opt, other_opt:
        save(mpi_tmp_path / "a", opt, model=model)
        told = f"got (2,) {here} here, (2,) {there} in the checkpoint"
        with refused_alike(comm, CheckpointError, "'stats' must have the same shape", told):
            load(mpi_tmp_path / "a", other_opt, model=other)
        assert other.weight[0, 0] == 1
        with warned(comm, CheckpointWarning, "of another shape or dtype, stay as they are: stats"):
            load(mpi_tmp_path / "a", other_opt, model=other, strict=False)
    assert other.weight[0, 0] == 0
    assert not other.stats.any()


def test_a_buffer_here_that_no_checkpoint_can_hold_is_named(comm, mpi_tmp_path):
    model, opt = build(comm, odd=torch.eye(2))
    other, other_opt = build(comm, 1, odd=torch.eye(2).to_sparse())
    with opt, other_opt:
        save(mpi_tmp_path / "a", opt, model=model)
        with refused_alike(
            comm, CheckpointError, "'odd' of the model must be a tensor that can be saved"
        ):
            load(mpi_tmp_path / "a", other_opt, model=other)


def test_buffers_are_found_behind_a_wrapper_as_parameters_are(comm, mpi_tmp_path):
    model, opt = build(comm, stats=[1.0, 2.0])
    wrapped = torch.nn.Module()
    wrapped.module, inner = build(comm, 1, stats=[0.0, 0.0])
    inner.close()
    with opt, NAdam(wrapped, comm=comm, policy=POLICY) as wrapped_opt:
        save(mpi_tmp_path / "a", opt, model=model)
        assert load(mpi_tmp_path / "a", wrapped_opt, model=wrapped).report.is_perfect
    assert wrapped.module.stats.tolist() == [1.0, 2.0]
    assert wrapped.module.weight[0, 0] == 0


def test_another_model_is_warned_of(comm, mpi_tmp_path):
    model, opt = build(comm)
    named = [("other", torch.nn.Parameter(torch.ones(2)))]
    with opt, NAdam(named, comm=comm, policy=POLICY) as other_opt:
        with warned(comm, CheckpointWarning, "the model has none of the optimizer's parameters"):
            save(mpi_tmp_path / "a", other_opt, model=model)
        with warned(comm, CheckpointWarning, "the model has none of the optimizer's parameters"):
            load(mpi_tmp_path / "a", other_opt, model=model)


# -- merged ----------------------------------------------------------------------------------------


def merge(path, capsys, *words):
    """The result of ``shardopt ckpt merge`` and the tensors in the file, on rank 0."""
    from safetensors.torch import load_file

    out = path / "merged.safetensors"
    result = call(capsys, "merge", path / "a", out, "--force", *words)
    return result, load_file(out) if result.code == 0 else {}


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_is_float8_in_the_merged_file(comm, mpi_tmp_path, capsys, dtype):
    pytest.importorskip("safetensors.torch")
    model, opt = build(comm, scales=torch.tensor([1.5, -4.0]).to(getattr(torch, dtype)))
    with opt:
        save(mpi_tmp_path / "a", opt, model=model)
    if comm.rank == 0:
        for words in (), ("--dtype", "bfloat16"):
            _, tensors = merge(mpi_tmp_path, capsys, *words)
            assert tensors["scales"].dtype == model.scales.dtype
            assert tensors["scales"].float().tolist() == [1.5, -4.0]
    comm.barrier()


def test_a_dtype_that_safetensors_lacks_is_refused(comm, mpi_tmp_path, capsys):
    model, opt = build(comm, odd=torch.ones(2).to(torch.float8_e4m3fnuz))
    with opt:
        save(mpi_tmp_path / "a", opt, model=model)
    if comm.rank == 0:
        out = mpi_tmp_path / "out.safetensors"
        refused(call(capsys, "merge", mpi_tmp_path / "a", out), "'odd' must", "float8_e4m3fnuz")
        assert not out.exists()
    comm.barrier()


def test_merge_says_what_is_no_tensor(comm, mpi_tmp_path, capsys):
    pytest.importorskip("safetensors.torch")
    model, opt = build(comm)
    model.extra = Extra({"seen": 3})
    with opt:
        save(mpi_tmp_path / "a", opt, model=model)
    if comm.rank == 0:
        result, tensors = merge(mpi_tmp_path, capsys)
        assert "no tensors, and are not in the file: extra._extra_state" in result.stderr
        assert merge(mpi_tmp_path, capsys, "--json")[0].json["left_out"] == ["extra._extra_state"]
        assert set(tensors) == {"weight", "bias"}
    comm.barrier()


def test_names_in_a_file_are_text_and_tied_tensors_follow_them(comm, mpi_tmp_path, capsys):
    pytest.importorskip("safetensors.torch")
    model, opt = build(comm)
    model.register_parameter("tied", model.weight)
    with opt:
        save(mpi_tmp_path / "a", opt, model=model)
    if comm.rank == 0:
        names = mpi_tmp_path / "names"
        for wrong in ('["x", null]', "[1, 2]", '[["x"], {"y": 1}]', '["x", "x"]', '{"x": 1}'):
            names.write_text(wrong)
            result, _ = merge(mpi_tmp_path, capsys, "--names", names)
            refused(result, "--names must be 2 different names")
        names.write_text("\ufeffx\ny\n")
        _, tensors = merge(mpi_tmp_path, capsys, "--names", names)
        assert set(tensors) == {"x", "y", "tied"}
        assert torch.equal(tensors["tied"], tensors["x"])
    comm.barrier()
