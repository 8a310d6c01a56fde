"""Stages are computed once, come back bit for bit, and are told when they are damaged."""

import numpy as np
import pytest

from nested_jax.seal.stages import Stages


def test_a_stage_is_computed_once(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return dict(x=np.arange(5, dtype=np.float32), n=3)

    for _ in range(2):
        found = Stages(tmp_path)('a/b', make)
        np.testing.assert_array_equal(found['x'], np.arange(5))
        assert found['x'].dtype == np.float32 and found['n'] == 3
    assert len(calls) == 1 and not list(tmp_path.rglob('*.tmp'))


def test_a_stage_that_fails_leaves_nothing(tmp_path):
    stages = Stages(tmp_path)
    with pytest.raises(RuntimeError):
        stages('a', lambda: (_ for _ in ()).throw(RuntimeError))
    assert stages('a', lambda: dict(x=1))['x'] == 1 and stages.computed == 2


def test_trees_come_back(tmp_path):
    tree = {'a': {'b': np.ones((2, 3)), 'c': np.zeros(2, np.int32)}, 'd': np.ones(())}
    for _ in range(2):
        found = Stages(tmp_path).tree('p', lambda: tree)
        assert set(found) == {'a', 'd'} and found['a']['c'].dtype == np.int32
        np.testing.assert_array_equal(found['a']['b'], tree['a']['b'])


def test_every_damaged_byte_is_told_and_the_stage_computed_again(tmp_path):
    heard, value = [], np.random.default_rng(0).normal(size=16)
    stages, path = Stages(tmp_path, heard.append), tmp_path / 'a.stage'
    read = lambda: stages('a', lambda: dict(x=value))['x']
    read()
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        np.testing.assert_array_equal(read(), value)
    assert len(heard) == len(whole) == stages.computed - 1 and 'a.stage is damaged' in heard[0]
    path.write_bytes(whole[: len(whole) // 2])
    np.testing.assert_array_equal(read(), value)
    assert len(heard) == len(whole) + 1


@pytest.mark.parametrize('name', ['', '../a', 'a/../b', '/a', 'a//b', 'a b'])
def test_names_stay_in_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match='name is .*allowed'):
        Stages(tmp_path)(name, dict)
