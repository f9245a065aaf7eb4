"""The check that all contenders of whole training learn the same."""

import numpy as np
import pytest

from benchmarks.cases.training import LAYERS, NUMEL, WIDTH
from benchmarks.contenders.names import DDP, THROUGH_TORCH
from tests.support.errors import FORM

measure = pytest.importorskip("benchmarks.cases.training.measure")


def test_the_sizes_claimed_have_as_many_parameters():
    base = pytest.importorskip("train_lm.models.base")
    assert base.count_weights(base.Shape(LAYERS, WIDTH, WIDTH // 32, 128)) == NUMEL


def test_losses_that_differ_by_rounding_are_the_same():
    ours = np.array([5.5, 4.0, 3.0])
    curves = {THROUGH_TORCH: ours, DDP: ours * (1 + np.array([0.0, 2e-7, -4e-7]))}
    assert measure.difference_of(curves, measure.AT_FIRST) == pytest.approx(4e-7, rel=1e-3)


@pytest.mark.parametrize("wrong", [1e-3, -1e-3, np.nan])
def test_losses_that_differ_by_more_are_refused(wrong):
    ours = np.array([5.5, 4.0, 3.0])
    curves = {THROUGH_TORCH: ours, DDP: ours * (1 + np.array([0.0, wrong, 0.0]))}
    with pytest.raises(RuntimeError, match="must learn as shardopt") as caught:
        measure.difference_of(curves, measure.AT_FIRST)
    assert FORM.fullmatch(str(caught.value))
