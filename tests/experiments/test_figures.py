"""Figures of the grids: what stands where, its mean and its interval."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.figures import FIGURES, draw_ablations, draw_context, draw_languages, draw_lengths, draw_levels
from experiments.formal_languages import MODELS


def row(model: str, task: str, seed: int, **metrics) -> dict:
    config = dict(model=dict(name=model), task=dict(name=task), train=dict(train_lengths=[64, 256], learning_rate=1e-3), seed=seed)
    return dict(model=model, seed=seed, config=config, metrics=metrics)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws, checks that a PNG is there, and returns the figure."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda figure, path, **options: (figures.append(figure), save(figure, path, **options)))

    def draw(function, rows):
        function(rows, tmp_path / 'figure.png')
        assert (tmp_path / 'figure.png').read_bytes().startswith(b'\x89PNG')
        return figures[-1]

    return draw


def panels(figure: Figure) -> list:
    return [axes for axes in figure.axes if axes.get_title()]


def test_languages_have_a_panel_each_and_bars_by_bin(drawn):
    bins = lambda share: dict(bins={f'bin{index}': dict(every=share / (index + 1)) for index in range(3)})
    rows = [row(model, 'parity', seed, **bins(share)) for model, share in (('own', 0.5), (MODELS[1], 1.0)) for seed in range(3)]
    figure = drawn(draw_languages, rows + [row('own', 'aa-star', 0, **bins(0.3))])
    parity, other = panels(figure)
    assert (parity.get_title(), other.get_title()) == ('parity', 'aa-star') and 'strings right' in parity.get_ylabel()
    assert [label.get_text() for label in parity.get_xticklabels()] == [MODELS[1], 'own']
    np.testing.assert_allclose([bar.get_height() for bar in parity.patches], [100, 50, 50, 25, 100 / 3, 50 / 3])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['bin0', 'bin1', 'bin2']


def test_lengths_have_a_line_for_each_model_and_its_interval(drawn):
    shares = lambda share: dict(lengths={'512': dict(whole=share), '16384': dict(whole=share / 2)})
    rows = [row('transformer', 'single_1', seed, **shares(share)) for seed, share in enumerate((0.2, 0.4, 0.6))]
    figure = drawn(draw_lengths, rows + [row('samba', 'single_1', 0, **shares(1.0))])
    (axes,) = panels(figure)
    assert axes.get_xscale() == 'log' and axes.get_xlabel() == 'bytes of the text'
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['longest trained on', 'transformer', 'samba']
    first, second = axes.containers
    np.testing.assert_allclose(first.lines[0].get_xydata(), [[512, 40], [16384, 20]])
    half = 4.302652729911275 * 20 / np.sqrt(3)
    np.testing.assert_allclose(
        [bar[:, 1] for bar in first.lines[2][0].get_segments()], [[40 - half, 40 + half], [20 - half / 2, 20 + half / 2]]
    )
    np.testing.assert_allclose(second.lines[0].get_xydata(), [[512, 100], [16384, 50]])
    assert 256 in [line.get_xdata()[0] for line in axes.lines]


def test_text_experiments(drawn):
    arms = [row('hope-linear', arm, 0, heldout_bits_per_byte=bits) for arm, bits in (('whole', 2.0), ('without dgd', 2.2))]
    (axes,) = panels(drawn(draw_ablations, arms))
    assert axes.get_title() == 'hope-linear' and [bar.get_height() for bar in axes.patches] == [2.0, 2.2] and 1.9 < axes.get_ylim()[0] < 2.0
    levels = [
        row('hope-linear', f'{count} x {period}', 0, heldout_bits_per_byte=count / 2) for count in (2, 3) for period in (512, '2048 nested')
    ]
    figure = drawn(draw_levels, levels)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['slowest 512 tokens', 'slowest 2,048 tokens, nested']
    (axes,) = panels(drawn(draw_context, [row('hope', 'train', 0, by_position={'0-31': 3.0, '32-4095': 2.0})]))
    np.testing.assert_allclose(axes.containers[0].lines[0].get_xydata(), [[32, 3.0], [4096, 2.0]])


def test_the_other_grids_have_figures(drawn):
    share = dict(test=dict(micro=0.5, macro=0.25))
    (axes,) = panels(drawn(FIGURES['mad'], [row('comba', 'compression', 0, **share)]))
    assert [bar.get_height() for bar in axes.patches] == [50]
    found = [row('hope', task, 0, heldout_bits_per_byte=bits) for task, bits in (('train', 2.0), ('rate 0.001', 3.0))]
    (axes,) = panels(drawn(FIGURES['language_modeling'], found))
    assert [bar.get_height() for bar in axes.patches] == [2.0]
