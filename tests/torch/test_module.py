"""Modules as checkpoints see them, where no ranks are needed."""

import pytest

torch = pytest.importorskip("torch")

from shardopt.torch.module import named_parameters, names_behind, read_module, unwrap  # noqa: E402


def make():
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by its own hand
def test_torch_compile_is_looked_through():
    model = make()
    part = torch.nn.Sequential(model[0], torch.compile(model[1]))
    for wrapped in (torch.compile(model), torch.nn.DataParallel(torch.compile(model)), part):
        assert "_orig_mod" in str(list(wrapped.state_dict()))
        params = list(model.parameters())
        assert [name for name, _ in named_parameters(wrapped)] == list(
            dict(model.named_parameters())
        )
        assert list(names_behind(wrapped.parameters()).values()) == list(
            dict(model.named_parameters())
        )
        content = read_module(wrapped, params)
        assert list(content.names) == list(dict(model.named_parameters()))
        assert list(content.values) == list(dict(model.named_buffers()))
    assert unwrap(part) is part


def test_only_what_a_module_yields_itself_has_names():
    model = make()
    used = model.parameters()
    list(used)
    others = [
        list(model.parameters()),
        (p for p in model.parameters()),
        model.buffers(),
        used,
        None,
    ]
    assert [names_behind(each) for each in others] == [{}] * len(others)
    assert list(names_behind(model.parameters(recurse=False)).values()) == []
    assert list(names_behind(model[0].parameters(recurse=False)).values()) == ["weight", "bias"]


def test_names_are_those_of_the_state_dict_whatever_hooks_do():
    model = make()

    def rename(module, state, prefix, metadata):
        state[f"{prefix}renamed"] = state.pop(f"{prefix}0.weight")
        state[f"{prefix}0.bias"] = state[f"{prefix}0.bias"].clone()

    model.register_state_dict_post_hook(rename)
    content = read_module(model, [model[0].weight, model[0].bias])
    assert list(content.names) == ["renamed", "0.bias"]
    assert "0.bias" not in content.values
    assert content.params == {"1.weight", "1.bias"}


def test_what_a_module_shares_is_stored_once():
    model = make()
    model.again = model[1]
    model.weight = model[0].weight
    content = read_module(model, [model[0].weight])
    assert content.names == ["weight"]
    assert content.aliases["0.weight"] == "weight"
    assert content.aliases["again.running_mean"] == "1.running_mean"
    assert set(content.values) == {"0.bias", *(f"1.{n}" for n in model[1].state_dict())}
