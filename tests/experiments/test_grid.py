"""Grids: what is run and what is not, after whatever ended the run before."""

import dataclasses
import itertools
import pathlib
import subprocess
import sys

import pytest

from experiments import grid
from experiments.grid import Cell, Grid, GridArgs, make_cells, run_grid
from nested_jax.evaluation.rows import config_digest, read_rows

CELLS = make_cells(('a', 'b'), ('x', 'y'), (0, 1))


class Kill(BaseException):
    """What no handler catches."""


@dataclasses.dataclass
class Trainer:
    """Counts what is asked of it, and fails at one cell."""

    fails_at: Cell | None = None
    error: type[BaseException] = Kill

    def __post_init__(self):
        self.prepared, self.ran = [], []

    def prepare(self, model: str, task: str):
        self.prepared.append((model, task))

        def train(seeds):
            cells = [Cell(model, task, seed) for seed in seeds]
            if self.fails_at in cells:
                raise self.error
            self.ran += cells
            return [dict(share=seed / 2) for seed in seeds]

        return train


def make_grid(path, trainer: Trainer, **changes) -> Grid:
    config = lambda cell: dict(name=cell.model, task=cell.task, seed=cell.seed)
    grid = Grid('toy', CELLS, config, trainer.prepare, lambda metrics: f'share {metrics["share"]}', path / 'toy.jsonl')
    return dataclasses.replace(grid, **changes)


def test_cells_are_all_combinations_the_first_task_first():
    assert len(CELLS) == len(set(CELLS)) == 8
    assert CELLS[:4] == (Cell('a', 'x', 0), Cell('a', 'x', 1), Cell('b', 'x', 0), Cell('b', 'x', 1))
    assert make_cells(('a', 'a'), ('x',), (0, 0)) == (Cell('a', 'x', 0),)


@pytest.mark.parametrize('together', [False, True])
@pytest.mark.parametrize('cell', CELLS)
def test_a_killed_grid_goes_on_where_it_stopped(tmp_path, cell, together):
    first, second, third = Trainer(cell), Trainer(), Trainer()
    with pytest.raises(Kill):
        run_grid(make_grid(tmp_path, first, together=together))
    assert run_grid(make_grid(tmp_path, second, together=together)) == 0
    assert first.ran + second.ran == list(CELLS)  # none twice, none missing
    assert len(second.prepared) == len(set(second.prepared))
    rows = read_rows(tmp_path / 'toy.jsonl')
    assert [Cell(row['model'], row['config']['task'], row['seed']) for row in rows] == list(CELLS)
    assert all(row['config_digest'] == config_digest(row['config']) and row['metrics']['share'] == row['seed'] / 2 for row in rows)
    assert run_grid(make_grid(tmp_path, third, together=together)) == 0 and not third.prepared


def test_seeds_run_together_or_one_by_one_and_missing_ones_alone(tmp_path, monkeypatch):
    calls, trainer = [], Trainer()
    monkeypatch.setattr(grid, '_run_group', lambda grid, group, train, left, store: calls.append(tuple(group)) or len(group))
    run_grid(make_grid(tmp_path, trainer))
    assert calls == [(cell,) for cell in CELLS] and len(trainer.prepared) == 4
    calls.clear()
    run_grid(make_grid(tmp_path, trainer, together=True))
    assert calls == [CELLS[0:2], CELLS[2:4], CELLS[4:6], CELLS[6:8]]
    monkeypatch.undo()
    with pytest.raises(Kill):
        run_grid(make_grid(tmp_path, Trainer(CELLS[1])))
    trainer = Trainer()
    run_grid(make_grid(tmp_path, trainer, together=True))
    assert trainer.ran == list(CELLS[1:])


def test_another_process_s_rows_count(tmp_path):
    class Other(Trainer):
        def prepare(self, model, task):
            if not self.prepared:
                run_grid(make_grid(tmp_path, Trainer(), cells=CELLS[2:6]))
            return super().prepare(model, task)

    trainer = Other()
    run_grid(make_grid(tmp_path, trainer))
    assert trainer.ran == [*CELLS[:2], *CELLS[6:]] and len(read_rows(tmp_path / 'toy.jsonl')) == 8


def test_a_cell_that_another_process_is_at_is_passed_over(tmp_path, capsys):
    hold = (
        'import pathlib, sys; from experiments import grid; from tests.experiments.test_grid import CELLS, Trainer, make_grid\n'
        'with grid._claimed(make_grid(pathlib.Path(sys.argv[1]), Trainer()), [CELLS[1]]) as claimed:\n'
        '    print(claimed, flush=True); sys.stdin.read()'
    )
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, '-c', hold, str(tmp_path)], cwd=pathlib.Path(__file__).parents[2], **pipes) as other:
        assert other.stdout.readline() == b'True\n'
        trainer = Trainer()
        assert run_grid(make_grid(tmp_path, trainer)) == 0
        assert trainer.ran == [CELLS[0], *CELLS[2:]] and '1 cells were left to other processes' in capsys.readouterr().out
        other.kill()
    trainer = Trainer()
    assert run_grid(make_grid(tmp_path, trainer)) == 0 and trainer.ran == [CELLS[1]]


def test_another_configuration_is_another_cell(tmp_path):
    run_grid(make_grid(tmp_path, Trainer()))
    trainer = Trainer()
    run_grid(make_grid(tmp_path, trainer, config=lambda cell: dict(cell._asdict(), steps=3)))
    assert trainer.ran == list(CELLS)


def test_no_cell_starts_after_the_budget(tmp_path, monkeypatch, capsys):
    clock = itertools.count(0, 20)  # seconds between two looks
    monkeypatch.setattr(grid.time, 'monotonic', lambda: next(clock))
    trainer = Trainer()
    assert run_grid(make_grid(tmp_path, trainer), minutes=1) == 0
    assert 0 < len(trainer.ran) < len(CELLS)
    assert f'1 minutes are over: the same command goes on with {8 - len(trainer.ran)} cells' in capsys.readouterr().out
    run_grid(make_grid(tmp_path, trainer))
    assert trainer.ran == list(CELLS)


def test_an_interrupt_says_how_to_go_on(tmp_path, capsys):
    assert run_grid(make_grid(tmp_path, Trainer(CELLS[3], KeyboardInterrupt))) == 130
    said = capsys.readouterr()
    assert 'interrupted in x b seed 1: the same command goes on with its 5 cells' in said.err
    assert 'x b seed 0: share 0.0' in said.out and '5 cells left' in said.out
    assert len(read_rows(tmp_path / 'toy.jsonl')) == 3


def test_without_a_store_rows_are_neither_read_nor_written(tmp_path):
    run_grid(make_grid(tmp_path, Trainer()))
    trainer, before = Trainer(), (tmp_path / 'toy.jsonl').read_bytes()
    run_grid(make_grid(tmp_path, trainer), store=False)
    assert trainer.ran == list(CELLS) and (tmp_path / 'toy.jsonl').read_bytes() == before


@pytest.mark.parametrize('changes', [dict(seeds=()), dict(seeds=(-1,)), dict(minutes=0)])
def test_wrong_arguments_are_named(changes):
    with pytest.raises(ValueError, match=f'{next(iter(changes))} is '):
        GridArgs(**changes)


def test_side_by_side_follows_the_device_unless_told():
    assert not GridArgs().side_by_side and GridArgs(together=True).side_by_side
