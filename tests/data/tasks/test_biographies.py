"""The world of people: what passages hold, what questions ask, and that notes are what they are said to be."""

import collections

import numpy as np
import pytest

from nested_jax.data.tasks.biographies import EDIT, END, PAD, STYLES, World

WORLD = World()


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def say(tokens) -> str:
    return ' '.join(WORLD.words[token] for token in tokens)


def test_the_words():
    assert len(WORLD.words) == WORLD.vocab_size == 7 + 8 + 48 + 4 + 8 + 32 and len(set(WORLD.words)) == WORLD.vocab_size


def test_a_passage_tells_every_fact_without_the_form_of_a_question():
    draw = rng()
    for _ in range(20):
        person = WORLD.person(draw)
        tokens = WORLD.passage(draw, person)
        assert len(tokens) == WORLD.passage_length
        assert say(tokens[:3]) == f'first{person.first} last{person.last} .'
        told = {say(tokens[place : place + 4]) for place in range(3, len(tokens), 4)}
        assert {line.split()[2] for line in told} == {f'value{kind}.{value}' for kind, value in enumerate(person.facts)}
        assert all(line.split()[1][:5] in ('has-a', 'has-b') for line in told) and 'Q' not in say(tokens)


def test_a_question_and_its_answer():
    person = WORLD.person(rng())
    assert say(WORLD.question(person, 2)) == f'<end> Q first{person.first} last{person.last} attribute2 ?'
    assert WORLD.words[WORLD.answer(person, 2)] == f'value2.{person.facts[2]}'


@pytest.mark.parametrize('style', STYLES)
def test_notes_are_of_their_style(style):
    draw = rng()
    for _ in range(50):
        person = WORLD.person(draw)
        note = WORLD.note(draw, person, style)
        assert WORLD.style(note, person) == style, say(note)
        assert len(note) <= 7


def test_what_is_not_a_note_is_malformed():
    draw = rng()
    person, other = WORLD.person(draw), WORLD.person(draw)
    question = WORLD.note(draw, person, 'question')
    wrong = [question[:-2] + question[-1:], question[1:], [*question[:-1], *question[-2:]], WORLD.passage(draw, person), [5]]
    assert [WORLD.style(note, person) for note in wrong] == ['malformed'] * 5
    assert WORLD.style(WORLD.note(draw, other, 'statement'), person) == 'malformed'


def test_edits_come_apart_into_notes():
    draw = rng()
    person = WORLD.person(draw)
    edit = WORLD.oracle(draw, person)
    assert [WORLD.style(note, person) for note in WORLD.lines(edit)] == ['question'] * 4 and edit[-1] == END
    assert WORLD.lines(edit[:-3]) == WORLD.lines(edit)[:-1]
    assert WORLD.lines([END]) == []
    styles = collections.Counter(WORLD.style(note, person) for _ in range(500) for note in WORLD.lines(WORLD.edit(draw, person)))
    assert set(styles) == set(STYLES) and all(0.13 < count / 2000 < 0.2 for count in styles.values())


def test_rows_show_new_people_with_edits_and_known_ones_with_answers():
    draw, kinds = rng(), collections.Counter()
    for _ in range(400):
        row = WORLD.row(draw, 64)
        assert len(row) == 64 and row[0] == END and max(row) < WORLD.vocab_size
        kinds[EDIT in row] += 1
        assert (PAD in row) <= (EDIT in row)
    assert 0.48 < kinds[True] / 400 < 0.62
    taken = {(person.first, person.last) for person in WORLD.known_people}
    assert len(taken) == WORLD.known


def test_splits_share_no_name_and_leave_known_people_out():
    draw = rng()
    names = {split: {WORLD.person(draw, split)[:2] for _ in range(600)} for split in ('train', 'dev', 'test')}
    known = {person[:2] for person in WORLD.known_people}
    assert not names['train'] & names['dev'] and not names['train'] & names['test'] and not names['dev'] & names['test']
    assert not known & set.union(*names.values())


@pytest.mark.parametrize(('field', 'value'), [('names', 1), ('values', 1), ('attributes', 0), ('known', 0), ('known', 145)])
def test_bad_sizes_are_named(field, value):
    with pytest.raises(ValueError, match=f'{field} is {value}, allowed is'):
        World(**{field: value})
    with pytest.raises(ValueError, match="split is 'all', allowed is"):
        WORLD.person(rng(), 'all')
