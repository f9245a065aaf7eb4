"""The model in every framework is the NumPy model: the same losses, gradients and steps."""

import sys

import numpy as np
import pytest

from tests.support.frameworks import require
from train_lm.models import import_learner
from train_lm.models.base import Shape, generate, initial_weights, weight_shapes
from train_lm.options import FRAMEWORKS

SHAPE = Shape(layers=2, width=64, heads=2, context=11)
OTHERS = [name for name in FRAMEWORKS if name != "numpy"]

pytestmark = pytest.mark.filterwarnings("default")  # of frameworks, which we cannot fix


@pytest.fixture
def make_learner():
    """Make learners on one rank; the test is skipped where the framework is not installed."""
    opts = []

    def make(framework, weights, dtype="float32"):
        require(framework)
        from mpi4py import MPI

        learner = import_learner(framework)(
            SHAPE, weights, dtype, betas=(0.9, 0.99), max_grad_norm=1.0, comm=MPI.COMM_SELF
        )
        opts.append(learner.opt)
        return learner

    yield make
    for opt in opts:
        opt.close()


def draw_weights():
    """Draw weights unlike the first ones, with which half of the gradients would be zero."""
    generator = np.random.default_rng(1)
    return {
        name: (0.3 * generator.standard_normal(shape)).astype(np.float32)
        for name, shape in weight_shapes(SHAPE).items()
    }


def draw_bytes(batch=3, time=SHAPE.context):
    """Draw bytes, some of which occur more than once."""
    inputs, targets = np.random.default_rng(2).integers(0, 256, (2, batch, time), dtype=np.uint8)
    inputs[0, : time // 2] = ord("e")
    return inputs, targets


def read_grads(learner):
    """Return gradients as NumPy arrays by name, in the layout of the NumPy model."""
    framework = type(learner).__module__.rpartition(".")[2]
    if framework == "numpy":
        return {param.name: param.grad.copy() for param in learner.model.parameters()}
    if framework == "jax":
        import jax

        leaves, _ = jax.tree.flatten_with_path(learner.grads)
        by_layer = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
        return {name: by_layer[path_of(name)] for name in weight_shapes(SHAPE)}
    if framework == "torch":
        grads = {n: p.grad.float().numpy().copy() for n, p in learner.model.named_parameters()}
    else:
        state = learner.model.state_dict(keep_vars=True)
        grads = {name: np.array(param.grad) for name, param in state.items()}
    return {n: grad if n == "embedding.weight" else grad.T for n, grad in grads.items()}


def path_of(name):
    """Translate blocks.0.mlp.up.weight to JAX's ['blocks'][0]['up']."""
    *path, layer, _ = name.split(".")
    return f"['blocks'][{path[1]}]['{layer}']" if path else f"['{layer}']"


@pytest.mark.parametrize("framework", OTHERS)
def test_loss_and_gradients_are_the_numpy_models(make_learner, framework):
    inputs, targets = draw_bytes()
    learners = [make_learner(name, draw_weights()) for name in ("numpy", framework)]
    losses = [learner.loss_and_grads(inputs, targets) for learner in learners]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert learners[1].loss(inputs, targets) == pytest.approx(losses[0], rel=1e-6)
    expected, grads = (read_grads(learner) for learner in learners)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert grad.dtype == np.float32
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(grad, expected[name], rtol=1e-4, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_weight_is_of_the_gradients_alone(make_learner, framework):
    inputs, targets = draw_bytes()
    learner = make_learner(framework, draw_weights())
    plain = learner.loss_and_grads(inputs, targets)
    expected = {name: grad.copy() for name, grad in read_grads(learner).items()}
    assert learner.loss_and_grads(inputs, targets, 0.5) == plain
    for name, grad in read_grads(learner).items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(grad, expected[name] / 2, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("framework", OTHERS)
@pytest.mark.parametrize("time", [1, 4, SHAPE.context])
def test_logits_are_the_numpy_models(make_learner, framework, time):
    inputs, _ = draw_bytes(batch=2, time=time)
    expected, logits = (
        make_learner(name, draw_weights()).logits(inputs) for name in ("numpy", framework)
    )
    assert logits.shape == (2 * time, 256)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("framework", OTHERS)
def test_steps_are_the_numpy_models(make_learner, framework):
    inputs, targets = draw_bytes()
    learners = [make_learner(name, initial_weights(SHAPE, seed=3)) for name in ("numpy", framework)]
    losses = [[], []]
    for learner, seen in zip(learners, losses, strict=True):
        for _ in range(6):
            seen.append(learner.loss_and_grads(inputs, targets))
            learner.step()
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("framework", OTHERS)
def test_text_goes_on_beyond_the_context(make_learner, framework):
    prompt = np.frombuffer(b"def", np.uint8)
    expected, text = (
        generate(make_learner(name, draw_weights()), prompt, 20, np.random.default_rng(4))
        for name in ("numpy", framework)
    )
    np.testing.assert_array_equal(text, expected)


def test_bfloat16_learns_nearly_as_float32(make_learner):
    inputs, targets = draw_bytes()
    losses = []
    for dtype in ("float32", "bfloat16"):
        learner = make_learner("torch", initial_weights(SHAPE, seed=3), dtype)
        assert {str(param.dtype) for param in learner.model.parameters()} == {f"torch.{dtype}"}
        losses.append([])
        for _ in range(10):
            losses[-1].append(learner.loss_and_grads(inputs, targets))
            learner.step()
        assert learner.logits(inputs).dtype == np.float32
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)


# -- devices ---------------------------------------------------------------------------------------


@pytest.fixture
def torch_learner():
    require("torch")
    return import_learner("torch")


def test_batches_and_rotations_are_where_the_model_is(torch_learner):
    """A device that computes no values takes no tensor of the CPU's."""
    import torch

    module = sys.modules[torch_learner.__module__]
    learner = object.__new__(torch_learner)  # the optimizer would refuse such parameters
    learner.device = torch.device("meta")
    learner.model = module.Transformer(SHAPE, learner.device).to(learner.device)
    loss = learner._loss(*draw_bytes())
    assert loss.device == learner.device
    loss.backward()
    assert {param.grad.device for param in learner.model.parameters()} == {learner.device}


@pytest.mark.parametrize(
    ("choice", "count", "local_rank", "device"),
    [
        ("cpu", 4, 1, "cpu"),
        ("auto", 0, 1, "cpu"),
        ("auto", 1, 3, "cuda:0"),  # the only one that a launcher shows
        ("cuda", 4, 3, "cuda:3"),
        ("cuda", 4, 6, "cuda:2"),
    ],
)
def test_gpus_are_taken_in_turn(torch_learner, monkeypatch, choice, count, local_rank, device):
    import torch

    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert torch_learner.find_device(choice, local_rank) == device
    assert [f"cuda:{number}" for number in taken] == ([device] if device != "cpu" else [])


@pytest.mark.parametrize("framework", ["numpy", "jax", "lucid"])
def test_other_models_stay_on_the_cpu(framework):
    require(framework)
    assert import_learner(framework).find_device("auto", 1) == "cpu"
