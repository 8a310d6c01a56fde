"""The watchdog: a process that stands still ends with its stacks; one that works does not."""

import pathlib
import subprocess
import sys
import threading
import time

import pytest

from nested_jax.training.watchdog import EXIT_CODE, Watchdog

ROOT = pathlib.Path(__file__).parents[2]


def run(body):
    """(exit code, standard error) of a process that does `body` with a watchdog of 0.5 s a step and 1.5 s for others."""
    program = f'import threading, time\nfrom nested_jax.training.watchdog import Watchdog\nwith Watchdog(0.5, 1.5) as watchdog:\n{body}'
    ended = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    return ended.returncode, ended.stderr


def test_step_that_stands_still_ends_the_process_with_all_stacks():
    body = (
        ' def wait_for_a_friend(): time.sleep(50)\n'
        ' threading.Thread(target=wait_for_a_friend, daemon=True).start()\n'
        ' watchdog.step(1)\n'
        ' watchdog.step(7)\n'
        ' threading.Lock().acquire(); lock = threading.Lock(); lock.acquire(); lock.acquire()\n'
    )
    code, complained = run(body)
    assert code == EXIT_CODE == 76
    assert 'watchdog: step 7 has not ended within 0.5 s' in complained
    assert 'wait_for_a_friend' in complained and complained.count('Thread 0x') >= 2


def test_other_work_has_its_own_limit():
    code, complained = run(" watchdog.step(1)\n with watchdog.other('saving'): time.sleep(0.9)\n watchdog.step(2)\n")
    assert (code, complained) == (0, '')
    code, complained = run(" with watchdog.other('saving'): time.sleep(50)\n")
    assert code == EXIT_CODE and 'watchdog: saving has not ended within 1.5 s' in complained


def test_step_after_other_work_has_its_time_anew_and_ends_too():
    code, complained = run(" watchdog.step(3)\n with watchdog.other('saving'): time.sleep(0.7)\n time.sleep(50)\n")
    assert code == EXIT_CODE and 'watchdog: step 3 has not ended' in complained


def test_each_part_of_other_work_has_its_time():
    body = " with watchdog.other('evaluating'):\n  for _ in watchdog.each(range(4)): time.sleep(0.6)\n"
    assert run(body) == (0, '')
    code, complained = run(body + '  for _ in watchdog.each(range(1)): time.sleep(50)\n')
    assert code == EXIT_CODE and 'watchdog: evaluating has not ended within 1.5 s' in complained


def test_time_in_which_the_process_was_stopped_is_not_counted():
    """Ctrl-Z, and fg later."""
    stop = (
        'import os, subprocess; subprocess.Popen(f"sleep 0.2; kill -STOP {os.getpid()}; sleep 1.5; kill -CONT {os.getpid()}", shell=True)'
    )
    assert run(f' {stop}\n watchdog.step(1)\n time.sleep(0.4)\n time.sleep(0.01)\n watchdog.step(2)\n') == (0, '')


def test_no_limit_is_no_thread_and_a_closed_one_ends():
    named = lambda: [thread for thread in threading.enumerate() if thread.name == 'watchdog']
    with Watchdog(None) as watchdog:
        watchdog.step(1)
        assert not named()
    with Watchdog(60.0):
        assert len(named()) == 1
    began = time.monotonic()
    while named() and time.monotonic() - began < 5:
        time.sleep(0.01)
    assert not named()


@pytest.mark.parametrize('limits', [(0.0, 1.0), (1.0, -1.0)])
def test_limits_are_positive(limits):
    with pytest.raises(ValueError, match='_s is .*, allowed is a number above 0'):
        Watchdog(*limits)
