"""Others read our files, and every face loads what any other has saved."""

import numpy as np
import pytest

import shardopt.numpy
from shardopt.checkpoint import load, save
from shardopt.checkpoint.format.reader import Reader, read_manifest
from tests.checkpoint.make_golden import FOLDER
from tests.support.errors import POLICY
from tests.support.frameworks import require

UNNAMED = pytest.mark.filterwarnings("ignore::shardopt.errors.CheckpointWarning")
"""Order matters here, and serves."""

GOLDENS = [f"v1-{num_ranks}" for num_ranks in (1, 2, 3)]


# -- the files -------------------------------------------------------------------------------------


def bits(tensor):
    """The elements of a flat tensor of torch as unsigned integers."""
    import torch

    size = tensor.element_size()
    names = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
    return tensor.contiguous().view(names[size]).numpy()


@pytest.mark.parametrize("case", GOLDENS)
def test_safetensors_opens_every_file(case):
    """Each name that a file has stands for just the bytes that the manifest says."""
    safetensors = pytest.importorskip("safetensors")
    numpy_names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
    path, seen = FOLDER / case, 0
    manifest = read_manifest(path)
    for index, file in enumerate(manifest.files):
        raw = (path / file.name).read_bytes()
        found = dict(safetensors.deserialize(raw))
        held = []
        for param, slices in zip(manifest.params, manifest.slices, strict=True):
            for key in param.tensors:
                name = param.name if key == "param" else f"{param.name}::{key}"
                held += [
                    (part.offset, name, param.spec_of(key).dtype, part)
                    for part in slices[key]
                    if part.file == index
                ]
        names = {name for name in found if not name.startswith("extra/")}
        assert len(names) == len(held)
        assert len(found) - len(names) == len(file.arrays)
        for offset, name, dtype, part in held:
            (own,) = [n for n in names if n.partition("[")[0] == name and covers(n, part)]
            numel = part.stop - part.start
            assert found[own]["shape"] == [numel]
            assert numpy_names[found[own]["dtype"]] == dtype
            nbytes = numel * np.dtype(dtype).itemsize
            assert bytes(found[own]["data"]) == raw[offset : offset + nbytes]
            seen += 1
    assert seen >= len(manifest.params) * 3 - 3


def covers(name, part):
    """Whether a name in a file is of the bucket's elements that a slice is from."""
    if "[" not in name:
        return True
    start, stop = map(int, name.partition("[")[2].rstrip("]").split(":"))
    return start <= part.start < part.stop <= stop


@pytest.mark.parametrize("case", GOLDENS)
def test_the_arrays_of_extra_are_tensors_too(case):
    require("torch")
    safe_open = pytest.importorskip("safetensors").safe_open
    path = FOLDER / case
    with Reader(path, read_manifest(path)) as reader:
        for index, file in enumerate(reader.manifest.files):
            with safe_open(path / file.name, "pt") as tensors:
                assert tensors.metadata()["format"] == "pt"
                for number, entry in enumerate(file.arrays):
                    tensor = tensors.get_tensor(f"extra/rank-{index:05d}/{number}")
                    array = reader.array(index, number)
                    assert bits(tensor).tobytes() == array.tobytes()
                    factor = 2 if entry.dtype.startswith("complex") else 1
                    assert tensor.shape == (array.size * factor,)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("case", GOLDENS)
def test_torch_puts_the_slices_of_all_files_together(case):
    """With its reader of Hugging Adapter's format, the manifest lying beside the files."""
    torch = require("torch")
    pytest.importorskip("safetensors")
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    if not hasattr(dcp, "HuggingFaceStorageReader"):
        pytest.skip("needs a newer torch")
    path = FOLDER / case
    reader = dcp.HuggingFaceStorageReader(str(path))
    wanted = {
        name: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
    }
    dcp.load(wanted, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    checked = set()
    with Reader(path, read_manifest(path)) as own:
        for index, param in enumerate(own.manifest.params):
            for key in param.tensors:
                flat = own.tensor(index, key).reshape(-1)
                name = param.name if key == "param" else f"{param.name}::{key}"
                pieces = [n for n in wanted if n == name or n.startswith(f"{name}[")]
                assert bool(pieces) == bool(flat.size)
                edges = []
                for piece in pieces:
                    start, stop = 0, flat.size
                    if piece != name:
                        start, stop = map(int, piece[len(name) + 1 : -1].split(":"))
                    edges.append((start, stop))
                    assert bits(wanted[piece]).tobytes() == flat[start:stop].tobytes()
                edges.sort()
                assert [stop for _, stop in edges[:-1]] == [start for start, _ in edges[1:]]
                assert sum(stop - start for start, stop in edges) == flat.size
                checked |= set(pieces)
    assert {name for name in wanted if name not in checked} == {
        name for name in wanted if name.startswith("extra/")
    }


# -- the faces -------------------------------------------------------------------------------------

SHAPES = {"b": (5,), "s": (), "w": (37, 401)}
"""In the order in which JAX has the keys of a dict."""


def initial(seed):
    generator = np.random.default_rng(seed)
    return {n: np.asarray(generator.standard_normal(s), np.float32) for n, s in SHAPES.items()}


def grads_of(step):
    return {name: np.asarray(value * 2) for name, value in initial([7, step]).items()}


class OfNumpy:
    """A model of one face: its optimizer, its values, and a way to step with given gradients."""

    def __init__(self, comm, seed, named):
        self.params = {n: self.make(v, n if named else None) for n, v in initial(seed).items()}
        given = list(self.params.items()) if named else list(self.params.values())
        self.opt = self.build(given, comm)

    def make(self, value, name):
        return shardopt.numpy.Parameter(value, name)

    def build(self, params, comm):
        return shardopt.numpy.NAdam(params, lr=0.05, comm=comm, policy=POLICY)

    def step(self, grads):
        for name, param in self.params.items():
            param.grad = grads[name].copy()
        self.opt.step()

    def values(self):
        return {name: np.array(param.data) for name, param in self.params.items()}


class OfTorch(OfNumpy):
    def make(self, value, name):
        import torch

        return torch.nn.Parameter(torch.from_numpy(value.copy()))

    def build(self, params, comm):
        from shardopt.torch import NAdam

        return NAdam(params, lr=0.05, comm=comm, policy=POLICY)

    def step(self, grads):
        import torch

        self.opt.zero_grad()
        for name, param in self.params.items():
            param.grad.copy_(torch.from_numpy(grads[name]))
        self.opt.step()

    def values(self):
        return {name: param.detach().numpy().copy() for name, param in self.params.items()}


class OfLucid(OfNumpy):
    def make(self, value, name):
        import lucid
        import lucid.nn

        return lucid.nn.Parameter(lucid.tensor(value.copy()))

    def build(self, params, comm):
        from shardopt.lucid import NAdam

        return NAdam(params, lr=0.05, comm=comm, policy=POLICY)


class OfJax(OfNumpy):
    def __init__(self, comm, seed, named):
        import jax.numpy as jnp

        from shardopt.jax import NAdam

        tree = {name: jnp.asarray(value) for name, value in initial(seed).items()}
        tree = tree if named else list(tree.values())
        self.named = named
        self.opt = NAdam(tree, lr=0.05, comm=comm, policy=POLICY)

    def step(self, grads):
        self.opt.step(grads if self.named else list(grads.values()))

    def values(self):
        values = self.opt.params
        values = values.values() if self.named else values
        return {name: np.array(value) for name, value in zip(SHAPES, values, strict=True)}


FACES = {"numpy": OfNumpy, "torch": OfTorch, "lucid": OfLucid, "jax": OfJax}


def make(framework, comm, seed, named=False):
    if framework != "numpy":
        require(framework)
    return FACES[framework](comm, seed, named)


def state_of(model):
    """Values, moments and step_counts, on rank 0."""
    state = model.opt.gather_state_dict()
    entries = None
    if state is not None:
        entries = [
            {key: np.asarray(value).astype(np.float64).tolist() for key, value in entry.items()}
            for entry in state["state"].values()
        ]
    return {name: value.tobytes() for name, value in model.values().items()}, entries


NAMED = {"named": (True, True), "unnamed": (False, False)}
RING = [("numpy", "torch"), ("torch", "lucid"), ("lucid", "numpy")]
HALF_NAMED = {"saved named": (True, False), "loaded named": (False, True)}
# JAX names leaves by their paths, and a dict and a list are different trees: order must serve.
MEETINGS = [
    (saver, loader, named)
    for saver in FACES
    for loader in FACES
    for named in NAMED | HALF_NAMED
    if named == "unnamed"
    or (saver == loader and named in NAMED)
    or ("jax" not in (saver, loader) and (named in NAMED or (saver, loader) in RING))
]


@UNNAMED
@pytest.mark.mpi
@pytest.mark.parametrize(("saver", "loader", "named"), MEETINGS)
def test_every_face_goes_on_with_what_another_saved(comm, mpi_tmp_path, saver, loader, named):
    saver_named, loader_named = (NAMED | HALF_NAMED)[named]
    ours = make(saver, comm, 0, saver_named)
    theirs = make(loader, comm, 1, loader_named)
    with ours.opt, theirs.opt:
        for step in range(3):
            ours.step(grads_of(step))
        ours.opt.param_groups[0]["lr"] = 0.03
        save(mpi_tmp_path / "a", ours.opt)
        load(mpi_tmp_path / "a", theirs.opt)
        assert state_of(theirs) == state_of(ours)
        assert theirs.opt.param_groups[0]["lr"] == 0.03
        for model in (ours, theirs):
            model.step(grads_of(3))
        assert state_of(theirs) == state_of(ours)
        save(mpi_tmp_path / "b", theirs.opt)
        ours.step(grads_of(4))
        load(mpi_tmp_path / "b", ours.opt)
        assert state_of(theirs) == state_of(ours)


# -- torch.optim.NAdam -----------------------------------------------------------------------------


@pytest.fixture
def float64_default():
    """In float64 torch keeps mu_product in full, too."""
    torch = require("torch")
    torch.set_default_dtype(torch.float64)
    yield torch
    torch.set_default_dtype(torch.float32)


@pytest.mark.mpi
def test_torchs_own_optimizer_goes_on_from_a_checkpoint(comm, mpi_tmp_path, float64_default):
    from tests.support.torch_models import Twins, make_model

    with Twins(comm, lr=0.05, weight_decay=0.01) as twins:
        for _ in range(3):
            twins.step()
        save(mpi_tmp_path / "a", twins.opt)
        for _ in range(2):
            twins.step()
    with Twins(comm, lambda: make_model(seed=5), lr=0.9) as twins:
        load(mpi_tmp_path / "a", twins.opt)
        twins.whole.load_state_dict(twins.ours.state_dict())
        twins.whole_opt.load_state_dict(comm.bcast(twins.opt.gather_state_dict()))
        assert twins.whole_opt.param_groups[0]["lr"] == 0.05
        for _ in range(3):
            twins.step()
        twins.assert_same()


@pytest.mark.mpi
def test_the_state_of_torchs_own_optimizer_goes_through_a_checkpoint(
    comm, mpi_tmp_path, float64_default
):
    from tests.support.torch_models import Twins, everything, make_model

    with Twins(comm, lr=0.05) as twins:
        for _ in range(3):
            twins.step()
        twins.opt.load_state_dict(twins.whole_opt.state_dict())
        save(mpi_tmp_path / "a", twins.opt)
        expected = everything(twins.opt)
        whole, whole_opt, steps = twins.whole, twins.whole_opt, twins.steps
    with Twins(comm, lambda: make_model(seed=5), lr=0.9) as twins:
        load(mpi_tmp_path / "a", twins.opt)
        assert everything(twins.opt) == expected
        twins.whole, twins.whole_opt, twins.steps = whole, whole_opt, steps
        for _ in range(3):
            twins.step()
        twins.assert_same()


@pytest.mark.mpi
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["a number", "a tensor"])
def test_schedulers_of_torch_go_on(comm, mpi_tmp_path, float64_default, tensor_lr):
    torch = float64_default
    from tests.support.torch_models import Twins, make_model

    def schedulers(twins):
        kind = torch.optim.lr_scheduler.CosineAnnealingLR
        return [kind(opt, T_max=10) for opt in twins.both]

    lr = torch.tensor(0.05) if tensor_lr else 0.05
    with Twins(comm, lr=lr) as twins:
        own = schedulers(twins)
        for _ in range(3):
            twins.step()
            for scheduler in own:
                scheduler.step()
        save(mpi_tmp_path / "a", twins.opt, extra={"scheduler": own[0].state_dict()})
        whole, whole_opt, whole_scheduler = twins.whole, twins.whole_opt, own[1]
        steps = twins.steps
    with Twins(
        comm, lambda: make_model(seed=5), lr=torch.tensor(0.9) if tensor_lr else 0.9
    ) as twins:
        scheduler = schedulers(twins)[0]
        scheduler.load_state_dict(load(mpi_tmp_path / "a", twins.opt).extra["scheduler"])
        assert float(twins.opt.param_groups[0]["initial_lr"]) == 0.05
        twins.whole, twins.whole_opt, twins.steps = whole, whole_opt, steps
        for _ in range(3):
            twins.step()
            for each in (scheduler, whole_scheduler):
                each.step()
            ours, theirs = (float(opt.param_groups[0]["lr"]) for opt in twins.both)
            assert ours == theirs
        twins.assert_same()


@pytest.mark.mpi
def test_tensors_in_extra_come_back_as_tensors(comm, mpi_tmp_path):
    torch = require("torch")
    model = make("torch", comm, 0, named=True)
    buffers = {
        "mean": torch.arange(6.0, dtype=torch.bfloat16).reshape(2, 3).T,
        "count": torch.tensor(7),
        "on": torch.tensor([True]),
        "wave": torch.tensor([1 + 2j]),
        "scale": torch.ones(2, 3).to(torch.float8_e4m3fn),
        "weight": torch.nn.Parameter(torch.eye(3)),
        "array": np.arange(3, dtype=np.int16),
    }
    with model.opt:
        extra = {"buffers": buffers, "per_rank": torch.full((comm.rank,), comm.rank)}
        save(mpi_tmp_path / "a", model.opt, extra=extra)
        back = load(mpi_tmp_path / "a", model.opt).extra
    assert list(back["buffers"]) == list(buffers)
    for name, tensor in buffers.items():
        found = back["buffers"][name]
        assert isinstance(found, np.ndarray if name == "array" else torch.Tensor)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert np.array_equal(np.asarray(found.tolist()), np.asarray(tensor.tolist()))
    assert [value.tolist() for value in back["per_rank"]] == [[r] * r for r in range(comm.size)]


@pytest.mark.mpi
def test_complex_parameters_of_torch_come_back(comm, mpi_tmp_path):
    torch = require("torch")
    from shardopt.torch import NAdam

    def build():
        wave = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3) * (1 - 2j))
        return wave, NAdam([("wave", wave)], lr=0.1, comm=comm, policy=POLICY)

    def step(wave, opt):
        opt.zero_grad()
        (wave.abs() ** 2).sum().backward()
        opt.step()

    wave, opt = build()
    other, other_opt = build()
    with opt, other_opt:
        step(wave, opt)
        save(mpi_tmp_path / "a", opt)
        load(mpi_tmp_path / "a", other_opt)
        assert torch.equal(wave, other)
        for pair in ((wave, opt), (other, other_opt)):
            step(*pair)
        assert torch.equal(wave, other)


@pytest.mark.mpi
def test_a_graph_from_before_a_load_cannot_go_on(comm, mpi_tmp_path):
    """As after a step: torch must see that the saved values are others now."""
    model = make("torch", comm, 0, named=True)
    with model.opt:
        save(mpi_tmp_path / "a", model.opt)
        loss = (model.params["w"] ** 3).sum()
        load(mpi_tmp_path / "a", model.opt)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
