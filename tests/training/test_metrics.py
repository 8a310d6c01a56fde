"""Where a run's numbers go."""

import io
import json
import re

import numpy as np
import pytest
import rich.console

from nested_jax.training.guard import DivergedError
from nested_jax.training.metrics import LossWindow, MetricLog, Progress, clock, loss_curve, read_metrics


def test_lines_are_readable_while_the_log_is_open(tmp_path):
    with MetricLog(tmp_path) as log:
        log.write(1, loss=2.5)
        assert [json.loads(line) for line in log.path.read_text().splitlines()] == [{'step': 1, 'loss': 2.5}]
    assert list((tmp_path / 'tensorboard').glob('events*'))


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    with MetricLog(tmp_path) as log:
        for step in (10, 20, 30):
            log.write(step, loss=float(step))
    with MetricLog(tmp_path, step=20) as log:
        log.write(30, loss=31.0)
    assert read_metrics(log.path) == [{'step': 10, 'loss': 10.0}, {'step': 20, 'loss': 20.0}, {'step': 30, 'loss': 31.0}]


def test_half_a_line_left_by_a_crash_is_dropped(tmp_path):
    with MetricLog(tmp_path) as log:
        log.write(10, loss=1.0)
    with open(log.path, 'a') as file:
        file.write('{"step": 20, "lo')
    assert read_metrics(log.path) == [{'step': 10, 'loss': 1.0}]
    with MetricLog(tmp_path, step=20) as log:
        log.write(30, loss=2.0)
    assert [record['step'] for record in read_metrics(log.path)] == [10, 30]


def test_absent_file_has_no_records(tmp_path):
    assert read_metrics(tmp_path / 'metrics.jsonl') == []


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    with Progress(100, console=rich.console.Console(file=stream)) as progress:
        progress.update(10, loss=2.0, bits_per_byte=2.885, tokens_per_second=12345.6)
    assert re.fullmatch(r'step 10/100  loss 2\.000  2\.885 bits/byte  12,346 tokens/s  \d+:\d\d left\n', stream.getvalue())


def test_a_terminal_gets_the_same_figures_on_a_line_that_is_redrawn():
    stream = io.StringIO()
    console = rich.console.Console(file=stream, force_terminal=True, width=120)
    with Progress(100, console=console) as progress:
        progress.update(10, loss=2.0, bits_per_byte=2.885, tokens_per_second=12345.6)
        progress.update(20, loss=1.5, bits_per_byte=2.164, tokens_per_second=12345.6)
    assert 'step 20/100  loss 1.500  2.164 bits/byte  12,346 tokens/s' in stream.getvalue()
    assert '\x1b[' in stream.getvalue()


def test_markup_in_a_message_is_printed_as_it_is():
    stream = io.StringIO()
    Progress(1, console=rich.console.Console(file=stream)).say('saved [bold]x[/bold]')
    assert stream.getvalue() == 'saved [bold]x[/bold]\n'


@pytest.mark.parametrize('seconds, text', [(0, '0:00'), (-5, '0:00'), (61.9, '1:01'), (3723, '1:02:03')])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_loss_curve_is_a_picture(tmp_path):
    records = [dict(step=step, bits_per_byte=4 / step) for step in range(1, 5)] + [dict(step=4, heldout_bits_per_byte=1.2)]
    for name, content in (('full.png', records), ('empty.png', [])):
        loss_curve(content, tmp_path / name, title='curve')
        assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('name', ['loss', 'grad_norm'])
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_a_window_takes_no_step_whose_loss_or_gradient_is_not_finite(name, value):
    window, good = LossWindow(), dict(loss=2.0, grad_norm=1.0, tokens=8.0)
    window.add(1, good, 8)
    with pytest.raises(DivergedError, match='at step 2 the loss is .* and the norm of the gradient .*; the step is not saved'):
        window.add(2, good | {name: value}, 8)
    assert window == LossWindow(nats=16.0, tokens=8.0, num_bytes=8, grad_norm=1.0)
