"""Passages with questions: the published formats, and files that are not of them."""

import json
import lzma
import os
import pathlib

import pytest

from nested_jax.data.passages import Passage, Question, load_passages, passages_digest, shuffled_passages

SHARED = pathlib.Path(os.environ.get('NESTED_JAX_SHARED', '../shared')) / 'data' / 'seal_squad'
PASSAGE = dict(title='Bees', context='Bees dance.', questions=[dict(question='Who dances?', answer='Bees')])
SQUAD = dict(
    version='1.1',
    data=[
        dict(
            title='Bees',
            paragraphs=[
                dict(
                    context='Bees dance.',
                    qas=[
                        dict(id='1', question='Who dances?', answers=[dict(text='Bees', answer_start=0), dict(text='bees', answer_start=0)])
                    ],
                )
            ],
        )
    ],
)


@pytest.mark.parametrize(
    'content',
    [json.dumps(SQUAD), json.dumps([PASSAGE]), json.dumps(PASSAGE), json.dumps(PASSAGE) + '\n\n'],
    ids=['squad', 'list', 'object', 'lines'],
)
@pytest.mark.parametrize('packed', [False, True])
def test_every_format_reads_the_same(tmp_path, content, packed):
    path = tmp_path / ('passages.json' + '.xz' * packed)
    path.write_bytes(lzma.compress(content.encode()) if packed else content.encode())
    assert load_passages(path) == [Passage('Bees', 'Bees dance.', (Question('Who dances?', 'Bees'),))]


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('no json', 'is not of SQuAD'), (json.dumps([dict(PASSAGE, questions=[])]), "passage 0 \\('Bees'\\) has no questions"),
        (json.dumps([PASSAGE, dict(PASSAGE, context=' ')]), 'passage 1 .* has no text'), ('[]', 'has no passages'),
        (json.dumps([dict(title='Bees')]), "is not of SQuAD .*'questions'"), ('[1]', 'is not of SQuAD'),
        (json.dumps(dict(data=[dict(title='x', paragraphs=[dict(context='y', qas=[dict(question='z', answers=[])])])])), 'is not of SQuAD'),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path, content, message):
    (tmp_path / 'file.json').write_text(content)
    with pytest.raises(ValueError, match=f'file.json.*{message}'):
        load_passages(tmp_path / 'file.json')
    with pytest.raises(FileNotFoundError, match='none.json is not there'):
        load_passages(tmp_path / 'none.json')


def test_orders_and_digests():
    passages = [Passage(str(n), 'text', (Question('q', 'a'),)) for n in range(20)]
    mixed = shuffled_passages(passages, 1)
    assert mixed != passages and sorted(mixed) == sorted(passages) and mixed == shuffled_passages(passages, 1)
    assert len({passages_digest(passages), passages_digest(mixed), passages_digest(passages[:-1])}) == 3


@pytest.mark.skipif(not SHARED.is_dir(), reason='NESTED_JAX_SHARED has no seal_squad')
def test_the_published_development_set():
    passages = load_passages(SHARED / 'squad_val_dev.jsonl.xz')
    assert len(passages) == 1072 and passages[0].questions[0] == Question('In what year was Nikola Tesla born?', '1856')
