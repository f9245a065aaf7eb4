"""The transformer in NumPy: its hand-written backward pass, and causality."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train_lm.models.base import Shape, generate, initial_weights, softmax_inplace, weight_shapes
from train_lm.models.numpy import Transformer

SHAPE = Shape(layers=2, width=24, heads=3, context=7)


def make_model(dtype=np.float64):
    """Make a model unlike a new one, in which half of the gradients would be zero."""
    model = Transformer(SHAPE, initial_weights(SHAPE, 1, dtype))
    generator = np.random.default_rng(2)
    for param in model.parameters():
        param.data[...] = 0.3 * generator.standard_normal(param.data.shape)
        param.grad = np.full_like(param.data, np.nan)  # backward writes all of it
    return model


def draw_bytes(batch, time=SHAPE.context, seed=3):
    return np.random.default_rng(seed).integers(0, 256, (2, batch, time), dtype=np.uint8)


@pytest.mark.parametrize("index", range(len(weight_shapes(SHAPE))))
def test_gradient_agrees_with_finite_differences(index):
    model = make_model()
    inputs, targets = draw_bytes(batch=3)
    loss = model.loss_and_grads(inputs, targets)
    assert loss == model.loss(inputs, targets)

    param = model.parameters()[index]
    start, generator = param.data.copy(), np.random.default_rng(index)
    for _ in range(5):
        direction = generator.standard_normal(start.shape)
        losses = []
        for distance in (-1e-5, 1e-5):
            param.data[...] = start + distance * direction
            losses.append(model.loss(inputs, targets))
        slope = (losses[1] - losses[0]) / 2e-5
        assert np.vdot(param.grad, direction) == pytest.approx(slope, rel=1e-5, abs=1e-8), param


def test_gradient_of_unused_bytes_is_zero():
    model = make_model()
    inputs, targets = np.full((2, 1, 4), 65, np.uint8)
    model.loss_and_grads(inputs, targets)
    used = model.embedding.grad.any(axis=1)
    assert used[65]
    assert used.sum() == 1


@settings(deadline=None, max_examples=25)
@given(position=st.integers(0, SHAPE.context - 1), byte=st.integers(0, 255))
def test_no_byte_sees_its_future(position, byte):
    model = make_model()
    inputs, _ = draw_bytes(batch=1)
    changed = inputs.copy()
    changed[0, position] = byte
    before, after = model.logits(inputs).copy(), model.logits(changed)
    np.testing.assert_array_equal(before[:position], after[:position])
    if byte != inputs[0, position]:
        assert np.all(before[position] != after[position])


def test_order_of_bytes_matters():
    model = make_model()
    texts = (np.frombuffer(text, np.uint8)[None] for text in (b"abx", b"bax"))
    last = [model.logits(text)[-1] for text in texts]
    assert not np.allclose(*last)


def test_sequences_of_a_batch_do_not_mix():
    model = make_model()
    inputs, _ = draw_bytes(batch=3)
    together = model.logits(inputs).reshape(3, SHAPE.context, 256)
    for row, alone in zip(inputs, together.copy(), strict=True):
        np.testing.assert_allclose(model.logits(row[None]), alone, rtol=1e-10, atol=1e-12)


def test_shorter_text_scores_as_the_beginning_of_a_longer_one():
    model = make_model()
    inputs, _ = draw_bytes(batch=1)
    np.testing.assert_allclose(
        model.logits(inputs[:, :3]), model.logits(inputs)[:3], rtol=1e-10, atol=1e-12
    )


def test_a_new_model_knows_nothing():
    inputs, targets = draw_bytes(batch=2)
    model = Transformer(SHAPE, initial_weights(SHAPE, 0))
    assert model.loss(inputs, targets) == pytest.approx(np.log(256), rel=1e-6)


def test_training_precision_is_kept_from_end_to_end():
    model = make_model(np.float32)
    assert {param.data.dtype for param in model.parameters()} == {np.dtype(np.float32)}
    inputs, targets = draw_bytes(batch=3)
    model.loss_and_grads(inputs, targets)
    assert model.logits(inputs).dtype == np.float32
    for param, exact in zip(model.parameters(), exact_grads(inputs, targets), strict=True):
        np.testing.assert_allclose(param.grad, exact, rtol=1e-3, atol=1e-5)


def exact_grads(inputs, targets):
    model = make_model()
    model.loss_and_grads(inputs, targets)
    return [param.grad for param in model.parameters()]


def test_plain_descent_learns_a_text_by_heart():
    model = make_model()
    inputs, targets = draw_bytes(batch=1)
    first = model.loss_and_grads(inputs, targets)
    for _ in range(60):
        for param in model.parameters():
            param.data -= 0.1 * param.grad
        last = model.loss_and_grads(inputs, targets)
    assert last < 0.1 < first


def test_generation_is_repeatable_and_longer_than_the_context():
    model = make_model()
    prompt = np.frombuffer(b"def", np.uint8)
    first, again = (generate(model, prompt, 20, np.random.default_rng(4)) for _ in range(2))
    assert first.dtype == np.uint8
    assert len(first) == 20
    np.testing.assert_array_equal(first, again)


def test_softmax_survives_large_scores():
    scores = softmax_inplace(np.array([[1e4, 0.0, -np.inf]]))
    np.testing.assert_array_equal(scores, [[1.0, 0.0, 0.0]])


def test_equal_seeds_make_equal_models():
    first, equal, other = (initial_weights(SHAPE, seed) for seed in (5, 5, 6))
    assert all(np.array_equal(first[name], equal[name]) for name in first)
    assert not np.array_equal(first["embedding.weight"], other["embedding.weight"])


def test_parameters_are_the_weights_by_name():
    model = make_model()
    shapes = {param.name: param.data.shape for param in model.parameters()}
    assert list(shapes.items()) == list(weight_shapes(SHAPE).items())
