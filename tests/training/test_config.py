"""The folders of a run: locked for one run, nobody else's link, and a cache of programs that only its user can write to."""

import errno
import fcntl
import os
import stat

import pytest

from nested_jax.training.config import claim_folder, lock_folder, private_cache

CACHE = 'JAX_COMPILATION_CACHE_DIR'


@pytest.fixture
def stranger():
    """Makes a file another user's, as seen from here."""

    def give(path, monkeypatch):
        if os.geteuid() == 0:
            os.chown(path, 4711, 4711, follow_symlinks=False)
        else:
            monkeypatch.setattr(os, 'geteuid', lambda: os.getuid() + 1)

    return give


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_refused_in_a_line(tmp_path, monkeypatch, number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    claim_folder(tmp_path, {})
    monkeypatch.setattr(fcntl, 'flock', flock)
    with pytest.raises(
        ValueError, match='^train.output is .*, which cannot be locked .*; allowed is a folder of a file system with locks'
    ) as e:
        with lock_folder(tmp_path):
            pass
    assert os.strerror(number) in str(e.value) and '\n' not in str(e.value)


def test_the_locked_file_is_open_for_writing(tmp_path, monkeypatch):
    """NFS refuses an exclusive lock (EBADF) on one that is open for reading only."""
    modes = []
    claim_folder(tmp_path, {})
    monkeypatch.setattr(fcntl, 'flock', lambda file, operation: modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE))
    before = (tmp_path / 'config.json').read_text()
    with lock_folder(tmp_path):
        assert modes == [os.O_RDWR]
    assert (tmp_path / 'config.json').read_text() == before


@pytest.mark.parametrize('name', ['run', 'run/checkpoints'])
def test_a_link_of_another_user_is_refused(tmp_path, monkeypatch, stranger, name):
    link = tmp_path / name
    (tmp_path / 'elsewhere').mkdir()
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / 'elsewhere')
    claim_folder(tmp_path / 'run', {})  # one's own is all right
    stranger(link, monkeypatch)
    with pytest.raises(ValueError, match=f'train.output is .*{name}.*, allowed is a folder, or a symbolic link that is your own'):
        claim_folder(tmp_path / 'run', {})


def test_a_new_cache_is_private(tmp_path):
    folder = tmp_path / 'a' / 'cache'
    for _ in range(2):
        private_cache({CACHE: str(folder)})
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    private_cache({})
    private_cache({CACHE: ''})
    private_cache({CACHE: 'gs://bucket/cache'})
    assert not os.path.exists('gs:')


@pytest.mark.parametrize('mode, private', [(0o700, True), (0o755, True), (0o775, False), (0o757, False), (0o1777, False)])
def test_a_cache_that_others_can_write_to_is_refused(tmp_path, mode, private):
    tmp_path.chmod(mode)
    if private:
        private_cache({CACHE: str(tmp_path)})
        return
    with pytest.raises(ValueError, match=f'{CACHE} is .*, allowed is a folder of your own that nobody else can write to'):
        private_cache({CACHE: str(tmp_path)})


def test_a_cache_of_another_user_is_refused(tmp_path, monkeypatch, stranger):
    stranger(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=f'{CACHE} is .*, allowed is a folder of your own'):
        private_cache({CACHE: str(tmp_path)})


def test_a_cache_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(ValueError, match=f'{CACHE} is .*file/cache.*, allowed is a folder that can be made'):
        private_cache({CACHE: str(tmp_path / 'file' / 'cache')})
