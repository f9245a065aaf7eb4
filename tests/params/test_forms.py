"""How the state of parameters is kept: what may be asked for, and what is refused."""

import pytest

from shardopt.errors import HyperparamsError, PartitionError
from shardopt.layout.partition import ParamSpec
from shardopt.layout.span import Span
from shardopt.layout.state_spec import BLOCK_NBYTES, FULL, StateForm, blocks_of, state_specs
from shardopt.params.forms import FormRules
from tests.support.errors import FORM


def spec(dtype="float32", numel=5000):
    return ParamSpec("w", (numel,), dtype, 0)


def test_the_least_surprising_form_is_chosen():
    rules = FormRules(8, master_weights=False)
    assert rules.form(spec(), 8, "cpu") == StateForm(8)
    assert rules.form(spec(numel=4095), 8, "cpu") == FULL
    assert rules.form(spec("bfloat16"), 32, "cpu") == StateForm(32, has_masters=False)
    assert rules.form(spec("float64"), 32, "cpu") == FULL
    assert rules.form(spec("float64", numel=4095), 8, "cpu") == FULL
    assert FormRules(8).form(spec("float16"), 8, "cpu") == StateForm(8)


@pytest.mark.parametrize(
    ("param", "bits", "device", "message"),
    [
        (spec("float64"), 8, "cpu", "optim_bits=32"),
        (spec("float16"), 32, "cpu", "must be bfloat16 for master_weights=False"),
        (spec(), 8, "cuda:0", "must be on the CPU for optim_bits=8; got cuda:0"),
        (spec("bfloat16"), 32, "cuda:1", "must be on the CPU for master_weights=False"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(param, bits, device, message):
    with pytest.raises(PartitionError) as caught:
        FormRules(bits, master_weights=False).form(param, bits, device)
    assert FORM.fullmatch(str(caught.value))
    assert message in str(caught.value)


def test_a_group_has_the_last_word():
    assert FormRules(8).bits_of({"optim_bits": 32}) == 32
    assert FormRules(8).bits_of({}) == 8
    with pytest.raises(HyperparamsError, match="must be 8 or 32; got 'eight'"):
        FormRules().bits_of({"optim_bits": "eight"})


def test_the_table_of_the_state_has_bytes_of_whole_blocks():
    exp_avg, exp_avg_sq, master = state_specs("float16", StateForm(8))
    assert (exp_avg.codec, exp_avg_sq.codec, master.codec) == ("signed", "unsigned", None)
    assert exp_avg.nbytes(257) == 2 * BLOCK_NBYTES
    assert exp_avg.bytes_of(Span(512, 700)) == Span(2 * BLOCK_NBYTES, 3 * BLOCK_NBYTES)
    assert blocks_of(Span(256, 256)) == Span(1, 1)
    assert [each.key for each in state_specs("bfloat16", StateForm(32, False))] == [
        *("exp_avg", "exp_avg_sq")
    ]
