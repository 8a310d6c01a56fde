"""The loader, grids as tokens, and the transformations of test-time training, on grids made here and on the real tasks."""

import itertools
import json

import numpy as np
import pytest

from nested_jax.data.tasks.arc import ARROW, CELL, NEXT, ROW, START, Pair, answer, decode, encode, load_tasks
from nested_jax.data.tasks.arc_augmentations import GROUPS, VIEWS, augmenters, left_out, permuted, training_tasks, views

GRID = ((1, 2, 0), (0, 3, 4))
PAIRS = tuple(Pair(((n, 0), (0, 5)), ((0, n), (5, 0))) for n in (1, 2, 3))


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def told(name: str = 'a', **changes) -> dict:
    pair = dict(input=[[1, 2]], output=[[2, 1]]) | changes
    return {name: dict(train=[pair], test=[dict(input=[[3]], output=[[3]])])}


def test_tasks_of_a_folder_and_of_a_file(tmp_path):
    (tmp_path / 'folder').mkdir()
    for name in ('b', 'a'):
        (tmp_path / 'folder' / f'{name}.json').write_text(json.dumps(told()['a']))
    (tmp_path / 'all.json').write_text(json.dumps(told('b') | told('a')))
    tasks = load_tasks(tmp_path / 'folder')
    assert list(tasks) == ['a', 'b'] and tasks == load_tasks(tmp_path / 'all.json')
    assert tasks['a'].train == (Pair(((1, 2),), ((2, 1),)),) and tasks['a'].test[0].given == ((3,),)


@pytest.mark.parametrize('rows', [[], [[1], [1, 2]], [[10]], [[1.0]], [[True]], [[]], [[0]] * 31, 'grid', None, [[-1]]])
def test_a_bad_grid_is_named(tmp_path, rows):
    (tmp_path / 'bad.json').write_text(json.dumps(told(output=rows)['a']))
    with pytest.raises(ValueError, match='task bad has the output .*allowed are'):
        load_tasks(tmp_path)


@pytest.mark.parametrize('task', [[], dict(train=[]), dict(train=[{}], test={})])
def test_a_task_without_pairs_is_named(tmp_path, task):
    (tmp_path / 'bad.json').write_text(json.dumps(task))
    with pytest.raises(ValueError, match='task bad is .*allowed are'):
        load_tasks(tmp_path)
    with pytest.raises(ValueError, match='allowed is a folder or a file with at least one task'):
        (tmp_path / 'empty').mkdir()
        load_tasks(tmp_path / 'empty')


def test_grids_as_tokens():
    cells = [CELL + 1, CELL + 2, CELL, ROW, CELL, CELL + 3, CELL + 4, ROW]
    document = encode([Pair(GRID, ((7,),))], asked=((1,),))
    assert document == [START, *cells, ARROW, CELL + 7, ROW, NEXT, CELL + 1, ROW, ARROW]
    assert decode([*cells, NEXT, CELL]) == GRID and decode(cells) is None
    whole = encode([*PAIRS])
    assert decode(whole[answer(PAIRS) :]) == PAIRS[-1].made and whole[answer(PAIRS) - 1] == ARROW


@pytest.mark.parametrize(
    'tokens', [[], [CELL], [CELL, ROW, CELL], [ROW], [CELL, ROW, CELL, CELL, ROW], [CELL, ARROW, ROW], [CELL, ROW, 15]]
)
def test_what_is_no_grid(tokens):
    assert decode([*tokens, NEXT]) is None


def test_the_groups_of_augmenters_and_their_inverses():
    draw = rng()
    for _ in range(8):
        groups = augmenters(draw)
        assert {group: len(found) for group, found in groups.items()} == dict(basic=11, size=3, chain=6, repeat=3)
        for augmenter in itertools.chain(views(), *groups.values()):
            assert augmenter.invert(augmenter.apply(GRID)) == GRID, augmenter.name
    assert [view.name for view in views()] == list(VIEWS)
    assert len({augmenter.name for group in groups.values() for augmenter in group}) == 23


def test_what_augmenters_do():
    made = {augmenter.name: augmenter.apply(GRID) for group in augmenters(rng()).values() for augmenter in group}
    assert made['rotate-90'] == ((0, 4), (2, 3), (1, 0)) and made['transpose'] == ((1, 0), (2, 3), (0, 4))
    assert made['flip-0'] == GRID[::-1] and made['rotate-180'] == ((4, 3, 0), (0, 2, 1))
    assert made['reflect-1-last'] == ((1, 2, 0, 0, 2, 1), (0, 3, 4, 4, 3, 0)) and made['reflect-0-first'] == (*GRID[::-1], *GRID)
    assert made['width'] == ((1, 1, 2, 2, 0, 0), (0, 0, 3, 3, 4, 4)) and made['height'] == (GRID[0], GRID[0], GRID[1], GRID[1])
    assert made['rotate-90+resolution'][0] == (0, 0, 4, 4) and made['repeat-rows'] == GRID * 2
    assert made['repeat-both'] == tuple(row * 2 for row in GRID) * 2


def test_what_is_left_out():
    a, b, c = PAIRS
    assert left_out(PAIRS) == [(b, c, a), (b, a), (c, a), (a, c, b), (a, b), (c, b), (a, b, c), (a, c), (b, c)]
    assert left_out(PAIRS[:2]) == [(b, a), (a, b)]


def test_permuted_copies_keep_the_rule_and_the_background():
    draw, seen = rng(), set()
    for _ in range(20):
        copy = permuted(PAIRS, draw, colours=True)
        cells = lambda pair: sum(pair.given + pair.made, ())
        colours = dict(zip(cells(PAIRS[-1]), cells(copy[-1]), strict=True))
        assert colours[0] == 0 and len(set(colours.values())) == 3
        assert all(pair.made == tuple(row[::-1] for row in pair.given) for pair in copy)
        seen.add(tuple(colours.values()))
    assert len(seen) > 5
    assert sorted(permuted(PAIRS, draw, colours=False)) == sorted(PAIRS)


def test_training_tasks_by_group():
    plain = training_tasks(PAIRS, (), rng())
    assert set(left_out(PAIRS)) <= set(plain) <= set(itertools.chain(*(itertools.permutations(PAIRS, n) for n in (2, 3))))
    many = training_tasks(PAIRS, GROUPS, rng())
    assert len(many) == len(set(many)) == 250
    sizes = {group: {len(pair.given) for task in training_tasks(PAIRS, (group,), rng()) for pair in task} for group in GROUPS}
    assert sizes == dict(basic={2, 4}, size={2, 4}, chain={2, 4}, repeat={2, 4})
    assert training_tasks(PAIRS, GROUPS, rng()) == many != training_tasks(PAIRS, GROUPS, np.random.default_rng(1))


def test_training_tasks_are_few_and_short_enough():
    found = training_tasks(PAIRS, GROUPS, rng(), at_most=20, most_tokens=40)
    assert len(found) == 20 and max(len(encode(task)) for task in found) <= 40
    wide = tuple(Pair((tuple(range(9)) * 2,), ((n,),)) for n in (1, 2))
    assert max(len(pair.given[0]) for task in training_tasks(wide, GROUPS, rng()) for pair in task) == 18


@pytest.mark.parametrize(('pairs', 'options'), [(PAIRS[:1], {}), (PAIRS, dict(groups=('colour',))), (PAIRS, dict(at_most=0))])
def test_bad_arguments_are_named(pairs, options):
    with pytest.raises(ValueError, match='(pairs|groups) .*allowed are'):
        training_tasks(pairs, options.pop('groups', ()), rng(), **options)


def test_real_tasks_go_through_tokens_and_every_augmenter(shared_data):
    tasks = load_tasks(shared_data / 'arc_agi1' / 'training.json.xz') | load_tasks(shared_data / 'arc_agi1' / 'evaluation_dev.json.xz')
    assert len(tasks) == 600 and tasks['007bbfb7'].train[0].given == ((0, 7, 7), (7, 7, 7), (0, 7, 7))
    known = [*itertools.chain(*augmenters(rng()).values())]
    for index, task in enumerate(tasks.values()):
        document = encode(task.train, task.test[0].given)
        outputs, rest = [], document
        while NEXT in rest:
            outputs.append(decode(rest[rest.index(ARROW) + 1 :]))
            rest = rest[rest.index(NEXT) + 1 :]
        assert outputs == [pair.made for pair in task.train] and decode([*rest[:-1], NEXT]) == task.test[0].given
        augmenter = known[index % 23]
        assert all(augmenter.invert(augmenter.apply(grid)) == grid for pair in task.train for grid in pair), augmenter.name


def test_seals_own_tasks_are_there_and_can_be_trained_on(shared_data):
    folder = shared_data / 'arc_agi1'
    chosen = json.loads((folder / 'seal_subset_ids.json').read_text())
    tasks = load_tasks(folder / 'training.json.xz') | load_tasks(folder / 'evaluation_dev.json.xz')
    for name in chosen['train_12'][:3] + chosen['eval_10'][:3]:
        made = training_tasks(tasks[name].train, GROUPS, rng())
        assert len(made) >= 90 and max(len(encode(task)) for task in made) <= 8192
