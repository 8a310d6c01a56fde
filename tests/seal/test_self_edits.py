"""Prompts, the rules that turn an edit into sequences, and configurations that do not fit."""

import json

import pytest

from nested_jax.seal.self_edits import (
    KNOWLEDGE_PROMPTS,
    Configuration,
    InvalidEditError,
    configuration_prompt,
    knowledge_prompt,
    parse_configuration,
    question_prompt,
    training_texts,
)


def test_seven_prompts_show_the_passage_and_differ():
    prompts = [knowledge_prompt(variant, 'Iron', 'Iron rusts.') for variant in KNOWLEDGE_PROMPTS]
    assert len(set(prompts)) == 7 and all('Iron\nIron rusts.' in prompt for prompt in prompts)
    assert knowledge_prompt('none', 'Iron', 'Iron rusts.') == 'Passage:\nIron\nIron rusts.'
    with pytest.raises(ValueError, match="variant is 'poem', allowed is one of implications"):
        knowledge_prompt('poem', 'Iron', 'Iron rusts.')


def test_the_question_comes_without_the_passage():
    assert question_prompt('Iron', 'What rusts?').endswith('Topic: Iron\nWhat rusts?\nAnswer:')


@pytest.mark.parametrize(
    ('edit', 'texts'),
    [
        ('It rusts.\n\n It is grey. ', ['It rusts.', 'It is grey.']),
        ('Here is a list:\n1. It rusts.\n2. It is grey.', ['1. It rusts.', '2. It is grey.']),
        ('1. It rusts.\n2. It is grey.', ['1. It rusts.', '2. It is grey.']),
        ('It rusts.\n---\nIt is grey.', ['It rusts.', 'It is grey.']),
        (
            'Question 1: Why?\nAnswer: Air.\nQuestion 2: How?\nAnswer: Slowly.',
            ['Question 1: Why?\nAnswer: Air.', 'Question 2: How?\nAnswer: Slowly.'],
        ),
        ('Question 1: Why?\nBecause.', ['Question 1: Why?', 'Because.']),
        ('Thought Process: It is a metal.\nImplications:\nIt rusts.', ['It rusts.']),
    ],
)
def test_an_edit_becomes_sequences(edit, texts):
    assert training_texts('Iron', 'The passage. ', edit) == [f'Iron\n{text}' for text in [*texts, 'The passage.']]


def test_edits_of_several_passages_are_kept_whole():
    assert training_texts('Iron', 'P', 'It rusts.\nIt is grey.', split_lines=False) == ['Iron\nIt rusts.\nIt is grey.', 'Iron\nP']


@pytest.mark.parametrize('edit', ['', ' \n', '---\n---'])
def test_an_empty_edit_is_invalid(edit):
    with pytest.raises(InvalidEditError, match='edit is empty'):
        training_texts('Iron', 'P', edit)


def fields(**changes) -> dict:
    generation = {f'use_{name}_augmentations': name == 'basic' for name in ('basic', 'size', 'chain', 'repeat')}
    training = dict(strategy='train_using_output_tokens', learning_rate=1e-4, num_train_epochs=2)
    for name, value in changes.items():
        (training if name in training else generation)[name] = value
    return dict(data_generation=generation, training=training)


def test_a_configuration_is_read():
    assert parse_configuration(json.dumps(fields())) == Configuration(True, False, False, False, True, 1e-4, 2)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('so be it', 'edit is not JSON'),
        ('[1]', 'data_generation is None'),
        ('{"data_generation": {}}', 'training is None'),
        (json.dumps(fields(use_size_augmentations=1)), 'use_size_augmentations is 1, allowed is true or false'),
        (json.dumps(fields(strategy='none')), "strategy is 'none'"),
        (json.dumps(fields(learning_rate=1.0)), 'learning_rate is 1.0, allowed is a number from'),
        (json.dumps(fields(learning_rate=float('nan'))), 'learning_rate is nan'),
        (json.dumps(fields(learning_rate=True)), 'learning_rate is True'),
        (json.dumps(fields(num_train_epochs=0)), 'num_train_epochs is 0'),
        (json.dumps(fields(num_train_epochs=2.0)), 'num_train_epochs is 2.0'),
    ],
)
def test_configurations_that_do_not_fit_say_why(text, message):
    with pytest.raises(InvalidEditError, match=message):
        parse_configuration(text)


def test_the_prompt_of_a_configuration_names_what_is_read():
    prompt = configuration_prompt([([[1, 2], [3, 4]], [[4, 3]])])
    assert 'Input:\n1 2\n3 4\nOutput:\n4 3' in prompt
    assert all(f'"{name}"' in prompt for part in fields().values() for name in part)
