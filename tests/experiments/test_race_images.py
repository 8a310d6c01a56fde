"""The race at the paper's scale, on a tiny data set: crops, batches, runs, a race that is killed; the paper's models by shape."""

import functools
import io
import itertools
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from experiments import optimizer_race, race_images
from experiments.race_images import ImageData, ImageRuns, Images, image_task
from experiments.racing import Setting
from nested_jax.optim.matrix_specs import default_label

TINY = dict(patch=16, width=16, heads=2, blocks=1, mlp_width=32)
SETTING = Setting(1e-2, 0.0, 0.999)


def png(pixels: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'png')
    file.seek(0)
    return file


def write(data_dir, features: dict, examples: dict[str, list[dict]], file_format: str = 'array_record') -> None:
    """A prepared data set 'toy', without TensorFlow."""
    import tensorflow_datasets as tfds

    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version('1.0.0')

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: enumerate(records) for split, records in examples.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Toy(data_dir=data_dir, file_format=file_format).download_and_prepare()


def picture(label: int, number: int) -> dict:
    """Brighter the higher the label, wider than high, its left half darker; some grey."""
    noise = np.random.default_rng([label, number]).integers(0, 30, (20, 30, 3), np.uint8)
    pixels = noise + np.uint8(60 * label)
    pixels[:, 15:] += 20
    return dict(image=png(pixels[..., 0] if number % 5 == 0 else pixels), label=label)


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    """64 images to train on and 22 held out, of three classes."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp('tfds')
    features = dict(image=tfds.features.Image(), label=tfds.features.ClassLabel(num_classes=3), name=tfds.features.Text())
    many = lambda start, count: [picture(index % 3, index) | dict(name=f'{index}') for index in range(start, start + count)]
    write(folder, features, dict(train=many(0, 64), validation=many(100, 22)))
    return folder


@pytest.fixture
def settings(toy, monkeypatch):
    monkeypatch.setitem(race_images.MODELS, 'vit-24m', TINY)
    return Images(dataset='toy', data_dir=str(toy), size=16, batch_size=8, steps=10, threads=1)


def runs_of(settings: Images, stored=None, optimizer: str = 'adamw') -> ImageRuns:
    data = ImageData(settings)
    task = image_task(settings, settings.steps, data.classes, data.source)
    return ImageRuns(task, optimizer_race.OPTIMIZERS[optimizer], optimizer, data, stored)


def batches(data: ImageData, seed: int, count: int) -> list[dict]:
    return list(itertools.islice(data.training(seed), count))


# --- data


def test_training_batches_are_a_function_of_the_seed(settings):
    data = ImageData(settings)
    first, again, other = (batches(data, seed, 9) for seed in (1, 1, 2))
    assert first[0]['images'].shape == (8, 16, 16, 3) and first[0]['images'].dtype == np.uint8 and first[0]['labels'].dtype == np.int32
    assert all(np.array_equal(a['images'], b['images']) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0]['images'], other[0]['images'])
    labels = np.concatenate([batch['labels'] for batch in first[:8]])
    assert np.bincount(labels).tolist() == [22, 21, 21]  # an epoch has each image once
    assert not np.array_equal(first[8]['labels'], first[0]['labels']) or not np.array_equal(first[8]['images'], first[0]['images'])
    assert 'tensorflow' not in sys.modules


def test_processes_share_the_images_of_a_batch(settings):
    whole = batches(ImageData(settings), 1, 2)
    parts = [batches(ImageData(settings, (index, 2)), 1, 2) for index in range(2)]
    for step, batch in enumerate(whole):
        joined = np.stack([part[step]['labels'] for part in parts], 1).ravel()
        assert np.array_equal(joined, batch['labels'])
        assert np.array_equal(parts[1][step]['images'], batch['images'][1::2])


def test_evaluation_halves_are_apart_and_filled_up_without_weight(settings):
    data = ImageData(settings)
    images = []
    for part in range(2):
        found = list(data.evaluation(part))
        assert [batch['weights'].sum() for batch in found] == [8, 3]
        images.append(np.concatenate([batch['images'][batch['weights'] == 1] for batch in found]))
    assert len(np.unique(np.concatenate(images).reshape(22, -1), axis=0)) == 22
    few = ImageData(Images(**{**vars(settings), 'heldout': 5}))
    assert [batch['weights'].sum() for batch in few.evaluation(1)] == [5]


def test_evaluation_crops_are_central():
    """A square of 14 of 20 x 16 pixels: 0.875 of the shorter side."""
    pixels = np.zeros((16, 20, 3), np.uint8)
    pixels[1:15, 3:17] = np.random.default_rng(0).integers(1, 255, (14, 14, 3))
    example = race_images._evaluation_example(dict(image=png(pixels).read(), label=2), 14)
    assert np.array_equal(example['images'], pixels[1:15, 3:17]) and example['labels'] == 2


def test_training_crops_differ_by_seed_and_stay_inside():
    """Of an image that rises to the right: half of them are mirrored, of all sizes."""
    ramp = np.broadcast_to(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], (40, 60, 3))
    record = dict(image=png(np.ascontiguousarray(ramp)).read(), label=0)
    crop = lambda seed: race_images._training_example(record, np.random.default_rng(seed), size=8)['images'].astype(int)
    crops = [crop(seed) for seed in range(200)]
    assert np.array_equal(crops[3], crop(3)) and len(np.unique(crops, axis=0)) > 190
    rises = np.array([crop[0, -1, 0] - crop[0, 0, 0] for crop in crops])
    assert 70 < (rises > 0).sum() < 130 and np.ptp(np.abs(rises)) > 80
    boxes = np.array([race_images._random_box(60, 40, np.random.default_rng(seed)) for seed in range(500)])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 60 and bottom.max() <= 40
    areas, aspects = (right - left) * (bottom - top) / 2400, (right - left) / (bottom - top)
    assert 0.05 <= areas.min() < 0.1 and areas.max() > 0.8 and 0.74 < aspects[aspects < 1.4].min() and aspects.max() <= 1.5


# --- runs


def test_a_run_is_the_same_twice_and_compiled_once(settings):
    runs = runs_of(settings)
    other = SETTING._replace(rate=3e-3)
    found = runs([1, 1, 2, 1], [SETTING, SETTING, SETTING, other])
    assert found.curve.shape == (4, 10) and len(set(found.search)) == 3
    assert found.search[0] == found.search[1] and np.array_equal(found.curve[0], found.curve[1])
    costs = runs.costs()
    assert runs.step._cache_size() == 1 and set(costs) == {'step_seconds', 'flops', 'state_bytes', 'parameters'}
    assert 8 <= costs['state_bytes'] < 8.1


def test_steps_and_losses_are_those_of_optax_on_one_device(settings):
    """Without sharding, filling or donation; float32, so that the order of the sums is all that differs."""
    runs = runs_of(Images(**{**vars(settings), 'dtype': 'float32'}))
    params = runs.begin(np.uint32(3), SETTING)[0]
    optimizer = runs.optimizer.make(lambda count: 1e-2 * jnp.minimum(1, (10 - count) / 5), 0.0, 0.999)
    state = optimizer.init(params)
    gradient, update = jax.jit(jax.grad(runs.task.loss)), jax.jit(optimizer.update)
    for batch in batches(runs.data, 3, 10):
        updates, state = update(gradient(params, batch), state, params)
        params = optax.apply_updates(params, updates)
    held = list(runs.data.evaluation(0))
    joined = {name: np.concatenate([batch[name] for batch in held])[:11] for name in ('images', 'labels')}
    assert runs.train(3, SETTING).search == pytest.approx(min(float(runs.task.loss(params, joined)), math.log(3)), rel=1e-4)


def test_images_of_three_brightnesses_are_learned(settings):
    runs = runs_of(Images(**{**vars(settings), 'steps': 60}))
    assert runs.train(0, SETTING).search < 0.5 * math.log(3)


def test_a_run_that_diverges_counts_as_knowing_nothing(settings):
    runs = runs_of(settings)
    params = jax.tree.map(lambda leaf: leaf * jnp.nan, runs.begin(np.uint32(0), SETTING)[0])
    assert runs.evaluate(params, 0) == runs.evaluate(params, 1) == math.log(3)


@pytest.mark.slow
def test_every_optimizer_takes_the_model(settings):
    for name in optimizer_race.OPTIMIZERS:
        runs = runs_of(settings, optimizer=name)
        carry = jax.eval_shape(runs.begin, np.uint32(0), SETTING)
        after, _ = jax.eval_shape(runs.step, carry, SETTING, np.int32(0), batches(runs.data, 0, 1)[0])
        assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, carry, after)), name


@pytest.mark.parametrize(('model', 'counts'), [('vit-24m', (21.7e6, 25.7e6)), ('vit-86m', (85.8e6, 93.8e6))])
def test_paper_models_have_the_paper_s_sizes(model, counts):
    """Without the head of 10,450 classes, and with it."""
    task = image_task(Images(model=model), 10, 10_450, '')
    params = jax.eval_shape(task.init, jax.random.key(0))
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert [size(params) - size(params['head']), size(params)] == [pytest.approx(count, abs=5e4) for count in counts]
    matrices = jax.tree_util.tree_map_with_path(
        lambda path, leaf: default_label(jax.tree_util.keystr(path, simple=True, separator='/'), leaf) == 'matrix', params
    )
    assert sum(jax.tree.leaves(matrices)) == 12 * 6  # query, key, value, out, up, down


@pytest.mark.slow
def test_paper_step_lowers_without_a_device_s_memory():
    """86M parameters, 1,024 images in bfloat16, on all devices."""
    settings = Images(model='vit-86m')
    runs = ImageRuns(image_task(settings, settings.steps, 10_450, ''), optimizer_race.OPTIMIZERS['adamw'], 'adamw', None, None)
    carry = jax.eval_shape(runs.begin, np.uint32(0), SETTING)
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=runs.by_row)
    batch = dict(images=shape((1024, 224, 224, 3), jnp.uint8), labels=shape((1024,), jnp.int32))
    lowered = runs.step.lower(carry, Setting(*map(np.float32, SETTING)), np.int32(0), batch)
    (params, _), _ = lowered.out_info
    assert params['up_11']['kernel'].shape == (768, 3072) and params['up_11']['kernel'].dtype == jnp.float32
    assert f'tensor<{1024 * 196}x3072xbf16>' in lowered.as_text()


# --- the command line


def arguments(settings: Images, tmp_path, **changes) -> list[str]:
    chosen = dict(dataset='toy', data_dir=settings.data_dir, size=16, batch_size=8, steps=10, threads=1) | changes
    flags = itertools.chain.from_iterable((f'--images.{name.replace("_", "-")}', str(value)) for name, value in chosen.items())
    return ['--scale', 'paper', *flags, '--seeds', '2', '--optimizers', 'sgd', '--results', str(tmp_path / 'rows.jsonl')]


@pytest.fixture
def trained(monkeypatch):
    """Seeds and settings of the runs that were not read back."""
    done, train = [], ImageRuns.train

    def counted(self, seed, setting, *, curve):
        done.append((self.label, seed, setting))
        return train(self, seed, setting, curve=curve)

    monkeypatch.setattr(ImageRuns, 'train', counted)
    return done


def few_rates(evaluate, optimizer, budget, *, extra=False):
    """The race's search is tested elsewhere; here it has two runs."""
    from experiments.racing import Trials

    settings = [Setting(rate, 0.0, optimizer.knobs[0]) for rate in (1e-2, 1e-3)]
    losses = dict(zip(settings, map(float, evaluate(settings)), strict=True))
    return Trials(min(losses, key=losses.get), losses, ())


@pytest.mark.slow
def test_a_killed_race_goes_on_where_it_stopped(settings, tmp_path, trained, monkeypatch):
    monkeypatch.setattr(optimizer_race, 'search', few_rates)
    stored, train, killed_at = tmp_path / 'optimizer_race_runs.jsonl', ImageRuns.train, 9

    def killed(self, seed, setting, *, curve):
        if len(trained) == killed_at:
            raise KeyboardInterrupt
        return train(self, seed, setting, curve=curve)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ImageRuns, 'train', killed)
        optimizer_race.main(arguments(settings, tmp_path))
    assert len(trained) == killed_at == len(stored.read_text().splitlines())
    optimizer_race.main(arguments(settings, tmp_path))
    # Of adamw and of sgd: two settings searched, two seeds, two at each of two other rates; and two of each control.
    assert len(trained) == len(set(trained)) == 2 * 8 + 2 * 2
    rows = [json.loads(line) for line in (tmp_path / 'rows.jsonl').read_text().splitlines()]
    assert [row['model'] for row in rows[-4:]] == ['adamw', 'adamw-again', 'adamw-flipped', 'sgd']
    assert {row['config']['task'] for row in rows} == {'toy vit-24m'} and (tmp_path / 'rows.png').exists()


@pytest.mark.slow
def test_smoke_run_searches_and_stores_nothing(settings, tmp_path, trained, capsys):
    assert optimizer_race.main([*arguments(settings, tmp_path), '--smoke']) == 0
    assert 'toy vit-24m' in (said := capsys.readouterr().out) and 'adamw-flipped' in said and 'nan' not in said
    assert list(tmp_path.iterdir()) == [] and len({setting for label, _, setting in trained if label == 'sgd'}) >= 13


def test_a_run_is_read_back_only_for_the_same_settings(settings, tmp_path, monkeypatch):
    trained = []
    losses = lambda self, seed, setting, *, curve: trained.append(seed) or race_images.Losses(float(len(trained)), [0.5] * 10)
    monkeypatch.setattr(ImageRuns, 'train', losses)
    others = [dict(heldout=5), dict(steps=20), dict(dtype='float32'), dict(threads=2)]
    for changes in ({}, {}, *others):
        found = runs_of(Images(**{**vars(settings), **changes}), tmp_path / 'runs.jsonl')([1, 2], [SETTING, SETTING])
    assert len(trained) == 2 * (1 + 3) and found.search.tolist() == [1, 2] and found.curve.shape == (2, 10)
    runs_of(settings, tmp_path / 'runs.jsonl')([1, 1, 1], [SETTING, SETTING._replace(rate=0.1), SETTING._replace(knob=0.95)])
    runs_of(settings, tmp_path / 'runs.jsonl', 'muon')([1], [SETTING])
    assert len(trained) == 8 + 2 + 1


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        (dict(dataset='imagenet2012'), 'tfds build imagenet2012 --file_format=array_record'),
        (dict(dataset='imagenet21k'), 'no public builder'),
        (dict(heldout_split='test'), "no split 'test'"),
        (dict(batch_size=12), 'multiple of the 8 devices'),
        (dict(batch_size=0), 'images.batch_size'),
        (dict(heldout_split='validation[:1]'), 'fewer than two'),
        (dict(size=24), 'multiple of the patch 16'),
    ],
)
def test_wrong_input_exits_with_2(settings, tmp_path, changes, said, capsys):
    with pytest.raises(SystemExit) as stop:
        optimizer_race.main(arguments(settings, tmp_path, **changes))
    assert stop.value.code == 2 and said in ' '.join(capsys.readouterr().err.replace('│', ' ').split())


@pytest.mark.parametrize('missing', ['image', 'label'])
def test_other_features_are_refused(tmp_path, missing):
    import tensorflow_datasets as tfds

    features = dict(image=tfds.features.Image(), label=tfds.features.ClassLabel(num_classes=3))
    features[missing] = tfds.features.Scalar(np.int32)
    example = picture(0, 0) | {missing: 1}
    write(tmp_path, features, dict(train=[example], validation=[example]))
    with pytest.raises(ValueError, match=f'has the features .*{missing} \\(Scalar\\).*, allowed are those with {missing}'):
        ImageData(Images(dataset='toy', data_dir=str(tmp_path)))


def test_tasks_of_the_other_scale_are_refused(settings, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        optimizer_race.main([*arguments(settings, tmp_path), '--tasks', 'stream'])
    assert stop.value.code == 2 and '--scale cpu' in capsys.readouterr().err
