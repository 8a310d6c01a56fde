"""Signals that end a run: noted, obeyed after a step, and told to the other processes."""

import os
import signal

import jax
import pytest
from jax.experimental import multihost_utils

from nested_jax.training import signals
from nested_jax.training.signals import StopSignals


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.fixture(autouse=True)
def restored():
    """Handlers as they were."""
    before = dict(zip((signal.SIGINT, signal.SIGTERM), handlers(), strict=True))
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_second_signal_ends_the_process(monkeypatch):
    """S2."""
    codes = []
    monkeypatch.setattr(signals.os, '_exit', codes.append)
    before = handlers()  # a process started in the background may ignore Ctrl-C
    with StopSignals() as stop:
        assert stop.reached() is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == stop.reached() == signal.SIGINT and codes == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert codes == [128 + signal.SIGTERM]
        assert handlers() != before
    assert handlers() == before


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_other_processes_are_told_and_all_stop_when_jax_says_so(monkeypatch, number):
    told, steps = [], []
    monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(signals, '_handler_of_jax', lambda: told.append)
    monkeypatch.setattr(multihost_utils, 'reached_preemption_sync_point', lambda step: steps.append(step) or step == 3)
    with StopSignals() as stop:
        os.kill(os.getpid(), number)
        assert told == [signal.SIGTERM]
        assert [stop.reached() for _ in range(3)] == [None, None, number] and steps == [1, 2, 3]
    with StopSignals() as stop:  # a process that got no signal
        steps.clear()
        assert [stop.reached() for _ in range(3)] == [None, None, signal.SIGTERM]
    os.kill(os.getpid(), signal.SIGTERM)  # while the run's end is written
    assert stop.received == signal.SIGTERM and told == [signal.SIGTERM] * 2
