"""Random numbers of updates: the same for every layout, and as good as random."""

import numpy as np

from shardopt.layout.partition import ParamSpec, plan_partition
from shardopt.layout.state_spec import StateForm
from shardopt.rule.cohorts import Cohorts
from shardopt.rule.nadam import NAdam
from shardopt.rule.rounding import key_of, make_salts, random_numbers

CODED = StateForm(optim_bits=8)


def test_numbers_of_a_part_are_those_of_the_whole():
    whole = random_numbers(12345, 0, 10_000)
    np.testing.assert_array_equal(random_numbers(12345, 4096, 999), whole[4096 : 4096 + 999])


def test_places_beyond_32_bits_have_numbers_of_their_own():
    around = random_numbers(7, (1 << 32) - 8, 16)
    np.testing.assert_array_equal(around[8:], random_numbers(7, 1 << 32, 8))
    assert not (around[8:] == random_numbers(7, 0, 8)).any()


def test_all_bits_are_as_often_one_as_zero_and_neighbours_differ():
    numel = 1 << 16
    for other in random_numbers(1, 1, numel), random_numbers(2, 0, numel):
        differing = random_numbers(1, 0, numel) ^ other
        ones = np.unpackbits(differing.view(np.uint8).reshape(-1, 4), axis=1).mean(axis=0)
        assert np.abs(ones - 0.5).max() < 4 * 0.5 / np.sqrt(numel)


def test_elements_that_share_a_hash_are_rounded_independently():
    numbers = random_numbers(3, 256, 1 << 19).reshape(-1, 2, 128)
    one, other = numbers[:, 0].reshape(-1), numbers[:, 1].reshape(-1)
    np.testing.assert_array_equal(other, one << np.uint32(16) | one >> np.uint32(16))
    # What rounds a parameter, and a moment, of both; see [Note: random numbers of updates].
    used = [bits for each in (one, other) for bits in (each >> 16, each & np.uint32(0xFFFFF))]
    correlation = np.corrcoef(used) - np.eye(4)
    assert np.abs(correlation).max() < 1 / 16 + 4 / np.sqrt(one.size)
    for bits, limit in zip(used, (1 << 16, 1 << 20) * 2, strict=True):
        mean = (bits.astype(np.float64) + 0.5).mean() / limit
        assert abs(mean - 0.5) < 4 / np.sqrt(12 * one.size)  # else rounding would be biased


def test_salts_depend_on_seed_name_and_step():
    keys = [key_of(name, seed) for name in ("a", "b") for seed in (0, 1)]
    salts = [make_salts([key], [step])[0] for key in keys for step in (1, 2)]
    assert len(set(salts)) == len(salts)


def numbers_by_name(num_nodes, node_size, specs, num_steps=1):
    """The salt of each parameter in the last of some steps, and the places of its segments."""
    partition = plan_partition(specs, num_nodes, node_size, 1)
    rule = Cohorts(partition, seed=3)
    for _ in range(num_steps):
        rule.plan((1 << len(specs)) - 1, [NAdam()], 1.0)
        rule.commit()
    rule.plan((1 << len(specs)) - 1, [NAdam()], 1.0)
    found = {}
    for region in range(len(partition.regions)):
        for node in range(num_nodes):
            for shard in partition.node_shards(node, region):
                chance, segments = rule.chance(shard), rule.segments(shard)
                if chance is None:
                    continue
                for salt, place, (start, *_) in zip(*chance, segments.tolist(), strict=True):
                    (param,) = partition.params_at(region, [shard.start + start])
                    assert place == shard.start + start - param.start
                    found.setdefault(param.spec.name, set()).add(int(salt))
    return found


def test_salts_are_the_same_for_every_layout():
    specs = [ParamSpec(f"w{i}", (n,), "float32", 0, CODED) for i, n in enumerate([5000, 4096])]
    more = [ParamSpec("x", (70_000,), "float32", 0), *specs]
    first = numbers_by_name(1, 1, specs)
    assert set(first) == {"w0", "w1"}
    assert all(len(salts) == 1 for salts in first.values())
    assert numbers_by_name(3, 2, more) == first
    assert numbers_by_name(1, 1, specs, num_steps=2) != first
