"""The world of grid rules: what rules do, what is known of their families, rows of pre-training, and words of self-edits."""

import json

import numpy as np
import pytest

from nested_jax.data.tasks.arc import NEXT, PAD, START, decode, encode
from nested_jax.data.tasks.arc_augmentations import views
from nested_jax.data.tasks.grid_rules import (
    CONFIGURE,
    DONE,
    FAMILIES,
    FIELDS,
    SEEN,
    WORLD_VOCAB_SIZE,
    World,
    configurations,
    edit_text,
)
from nested_jax.seal.self_edits import InvalidEditError, parse_configuration

WORLD = World()
GRID = np.array([[1, 0, 2], [0, 3, 0]])


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def outcomes(family: str, count: int = 200) -> set[tuple]:
    """What the rules of a family make of one grid."""
    draw = rng()
    return {tuple(map(tuple, FAMILIES[family].draw(draw)(GRID).tolist())) for _ in range(count)}


def test_directions_are_those_of_all_four_sides():
    assert outcomes('gravity') == {((1, 3, 2), (0, 0, 0)), ((0, 0, 0), (1, 3, 2)), ((1, 2, 0), (3, 0, 0)), ((0, 1, 2), (0, 0, 3))}
    assert outcomes('shift') == {((0, 3, 0), (1, 0, 2)), ((0, 2, 1), (3, 0, 0)), ((2, 1, 0), (0, 0, 3))}
    assert outcomes('ray') == {((1, 0, 2), (1, 3, 2)), ((1, 3, 2), (0, 3, 0)), ((1, 1, 2), (0, 3, 3)), ((1, 2, 2), (3, 3, 0))}
    assert outcomes('crop') == {((1, 0, 2),), ((0, 3, 0),), ((1,), (0,)), ((2,), (0,))}
    assert {grid[1][1] for grid in outcomes('edge')} == {3} | set(range(1, 6))


def test_turns_and_sizes():
    assert outcomes('mirror') == {((0, 3, 0), (1, 0, 2)), ((2, 0, 1), (0, 3, 0))}
    assert outcomes('rotate') == {((2, 0), (0, 3), (1, 0)), ((0, 3, 0), (2, 0, 1)), ((0, 1), (3, 0), (0, 2))}
    assert outcomes('transpose') == {((1, 0), (0, 3), (2, 0)), ((0, 2), (3, 0), (0, 1))}
    assert outcomes('stretch') == {((1, 0, 2), (1, 0, 2), (0, 3, 0), (0, 3, 0)), ((1, 1, 0, 0, 2, 2), (0, 0, 3, 3, 0, 0))}


def test_colours():
    assert outcomes('keep') == {((colour == 1, 0, 2 * (colour == 2)), (0, 3 * (colour == 3), 0)) for colour in range(6)}
    assert outcomes('paint') == {((c, 0, c), (0, c, 0)) for c in range(1, 6)}
    assert outcomes('fill') == {((1, c, 2), (c, 3, c)) for c in range(1, 6)}
    assert ((2, 0, 1), (0, 3, 0)) in outcomes('swap') and ((2, 0, 2), (0, 3, 0)) in outcomes('recolour')
    assert outcomes('remove') == {((0, 0, 2), (0, 3, 0)), ((1, 0, 0), (0, 3, 0)), ((1, 0, 2), (0, 0, 0)), ((1, 0, 2), (0, 3, 0))}


def test_rules_of_colour_are_the_same_under_every_view_and_directions_are_not():
    kept = {kind: [] for kind in ('colour', 'turn', 'direction', 'size')}
    for family in FAMILIES.values():
        draw, same = rng(), []
        for _ in range(20):
            rule, grid = family.draw(draw), draw.integers(6, size=(3, 2))
            made = tuple(map(tuple, rule(grid).tolist()))
            for view in views():
                seen = view.apply(tuple(map(tuple, grid.tolist())))
                same.append(view.invert(tuple(map(tuple, rule(np.array(seen)).tolist()))) == made)
        kept[family.kind].append(np.mean(same))
    assert min(kept['colour']) == 1 and max(kept['direction'] + kept['size']) < 0.75


def test_tasks_show_their_rule():
    assert len(SEEN) == 7 and len(FAMILIES) == 15
    for family in FAMILIES:
        task = WORLD.task(rng(), family)
        assert len(task.train) == 3 and len(task.test) == 2 and task.name == family
        assert all(pair.given != pair.made for pair in task.train + task.test)
        assert len({(len(pair.given), len(pair.given[0])) for pair in task.train + task.test}) == 1
        assert len(encode(task.train, task.test[0].given)) <= 108
    assert WORLD.task(rng(), 'swap') == WORLD.task(rng(), 'swap') != WORLD.task(np.random.default_rng(1), 'swap')


def test_rows_of_pretraining():
    draw, kinds = rng(), []
    for _ in range(60):
        tokens, learned = WORLD.row(draw, 96)
        assert len(tokens) == len(learned) == 96 and tokens[0] == START and max(tokens) < WORLD_VOCAB_SIZE
        ends = [place for place, token in enumerate(tokens) if token in (NEXT, DONE)]
        places = np.flatnonzero(learned)
        spans = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        if CONFIGURE in tokens:
            assert tokens[tokens.index(CONFIGURE) + 1 :][:8] in configurations() and len(spans) == 1
        else:
            assert all(decode(tokens[span[0] : span[-1] + 1]) for span in spans) and len(spans) == 3
        assert spans[-1][-1] == ends[-1] and set(tokens[ends[-1] + 1 :]) <= {PAD}
        kinds.append(CONFIGURE in tokens)
    assert 2 <= sum(kinds) <= 20


def test_all_configurations_are_read():
    said = [parse_configuration(edit_text(tokens)) for tokens in configurations()]
    assert len(set(said)) == 512 and {len(tokens) for tokens in configurations()} == {len(FIELDS) + 1}
    first, last = said[0], said[-1]
    assert (first.basic, first.repeat, first.output_tokens_only, first.learning_rate, first.epochs) == (False, False, False, 1e-4, 1)
    assert (last.size, last.chain, last.output_tokens_only, last.learning_rate, last.epochs) == (True, True, True, 3e-3, 8)
    assert json.loads(edit_text(configurations()[1]))['training']['num_train_epochs'] == 2


@pytest.mark.parametrize(
    'change',
    [
        lambda t: t[:-1], lambda t: t[1:], lambda t: t[:-2] + t[-1:], lambda t: t[:2] + t[:1] + t[2:],
        lambda t: [START, *t], lambda t: [DONE],
    ],
)  # fmt: skip
def test_words_without_form_are_invalid(change):
    with pytest.raises(InvalidEditError):
        parse_configuration(edit_text(change(configurations()[7])))
    assert parse_configuration(edit_text([*configurations()[7], START, DONE]))


@pytest.mark.parametrize(
    ('field', 'value'),
    [('shapes', ()), ('shapes', ((0, 2),)), ('demonstrations', 1), ('tests', 0), ('coloured', 0.0), ('coloured', 1.0), ('edits', 0.0)],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f'{field} is .*allowed is'):
        World(**{field: value})
    with pytest.raises(ValueError, match="family is 'none', allowed is one of recolour"):
        WORLD.task(rng(), 'none')
