"""The optimizer race at the paper's scale: a vision transformer on images of tensorflow-datasets, one run after the other. Not run here.

Fig. 11 of arXiv:2512.24695v1 trains vision transformers of 24M and 86M parameters (patches of 16, MLPs of 1536 and 3072) on ImageNet-21K,
11M images of 10,450 classes, with equal steps. It gives neither batch size, steps, augmentation, precision nor depth: the values here are
ours. The counts of images and classes are those of the processed winter-2021 release. Twelve blocks have 85.8M parameters without the head,
the paper's 86M, and 93.8M with it; at the smaller width 21.7M and 25.7M, between which its 24M lies.

Any set of tensorflow-datasets with the features 'image' and 'label' will do, prepared beforehand as array_record, which is read without
TensorFlow: `tfds build imagenet2012 --file_format=array_record`. ImageNet-21K is not in its catalogue: it takes a builder of one's own,
called 'imagenet21k' by big_vision. Even and odd images of the held-out split are for the search and for the comparison.

Each finished run is a line of a file beside the results; a race that was killed reads them back and goes on with the run it was in, from
that run's first step. Batches are shared by all devices, and by all processes where `jax.distributed.initialize` was called before
`optimizer_race.main`, on a file system that all of them see.
"""

import dataclasses
import functools
import io
import math
import pathlib
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from experiments.race_tasks import VisionTransformer
from experiments.racing import POINTS, Losses, Optimizer, Setting, Task, begin, learn, mean_flops, sizes
from nested_jax.data import batch_iterator
from nested_jax.data.corpora import tfds_folder
from nested_jax.evaluation.rows import append_row, config_digest, hardware_name, make_row, read_rows

RUNS = 'optimizer_race_runs'  # the file of finished runs
MODELS = {
    'vit-24m': dict(patch=16, width=384, heads=6, blocks=12, mlp_width=1536),
    'vit-86m': dict(patch=16, width=768, heads=12, blocks=12, mlp_width=3072),
}
AREA, ASPECT = (0.05, 1.0), (3 / 4, 4 / 3)  # of a training crop: share of the image, width by height
CENTRAL = 0.875  # of the shorter side, in evaluation: 224 of 256
TIMED_STEPS = 10


@dataclasses.dataclass(frozen=True)
class Images:
    """What is raced on with --scale paper."""

    dataset: str = 'imagenet21k'
    """Prepared data set of tensorflow-datasets, such as imagenet2012 or cifar10."""
    data_dir: str = '~/tensorflow_datasets'
    """Folder that holds it."""
    train_split: str = 'train'
    """Of the data set, slices too: full[51200:]."""
    heldout_split: str = 'validation'
    """Cut in two, for the search and for the comparison; cifar10 has 'test'."""
    heldout: int = 10_000
    """Images of each of the two, at most."""
    model: Literal['vit-24m', 'vit-86m'] = 'vit-24m'
    """Named by the paper's count of parameters."""
    size: int = 224
    """Pixels of a side."""
    dtype: Literal['bfloat16', 'float32'] = 'bfloat16'
    """Of products and activations; parameters and optimizers stay in float32."""
    batch_size: int = 1024
    """Over all devices; the paper does not say."""
    steps: int = 10_000
    """About an epoch of 11M images; the paper does not say."""
    threads: int = 16
    """That read and decode, a batch each."""

    def __post_init__(self):
        for name in ('heldout', 'batch_size', 'steps', 'threads'):
            self._check(name, getattr(self, name) >= 1, 'an integer of at least 1')
        patch = MODELS[self.model]['patch']
        self._check('size', self.size >= patch and self.size % patch == 0, f'a multiple of the patch {patch}')

    def _check(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f'images.{name} is {getattr(self, name)!r}, allowed is {allowed}')

    @property
    def task(self) -> str:
        """The name that rows are stored under."""
        return f'{self.dataset} {self.model}'

    def config(self) -> dict[str, Any]:
        """What the losses depend on."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in ('data_dir', 'steps', 'threads')}


class ImageData:
    """Batches of a prepared data set, this process's share: dicts of images (B, S, S, 3) uint8 and labels (B,) int32.

    Args:
        settings: of the images.
        shard: index of this process and their number; the batches of all hold the same images whatever the number.

    Raises:
        ValueError: for a data set that is not prepared, or has other features or splits; a batch that devices cannot share.
    """

    def __init__(self, settings: Images, shard: tuple[int, int] = (0, 1)):
        import tensorflow_datasets as tfds  # here, as grain below: the other tasks need not wait for it

        if settings.batch_size % jax.device_count():
            raise ValueError(f'images.batch_size is {settings.batch_size}, allowed is a multiple of the {jax.device_count()} devices')
        builder = tfds.builder_from_directory(_prepared_folder(settings))
        self.classes = _classes(builder.info.features, settings.dataset)
        self.settings, self.shard = settings, shard
        self.train, self.heldout = (_source(builder, split) for split in (settings.train_split, settings.heldout_split))
        if len(self.heldout) < 2:
            raise ValueError(f'images.heldout_split {settings.heldout_split!r} has fewer than two images, allowed are more')
        self.each = min(settings.heldout, len(self.heldout) // 2)
        self.source = f'{builder.info.full_name}: {len(self.train)} + {len(self.heldout)} images'

    def training(self, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """Endless batches, shuffled and cropped by the seed, another way in each epoch."""
        import grain

        records = grain.MapDataset.source(self.train).seed(seed).shuffle().repeat()
        return self._read(records.random_map(functools.partial(_training_example, size=self.settings.size)))

    def evaluation(self, part: int) -> Iterator[dict[str, np.ndarray]]:
        """The held-out images for the search (part 0) or the comparison (1); the last batch is filled up with images of weight 0."""
        import grain

        rows = 2 * (np.arange(self.each) * (len(self.heldout) // 2) // self.each) + part  # spread over the split

        def read(place: int) -> dict[str, np.ndarray]:
            record = self.heldout[int(rows[min(place, self.each - 1)])]
            return _evaluation_example(record, self.settings.size) | dict(weights=np.float32(place < self.each))

        count = math.ceil(self.each / self.settings.batch_size) * self.settings.batch_size
        return self._read(grain.MapDataset.range(count).map(read))

    def _read(self, examples: Any) -> Iterator[dict[str, np.ndarray]]:
        index, count = self.shard  # cut last: an image's crop depends on its place in the whole batch
        batches = examples[index::count].batch(self.settings.batch_size // count)
        return batch_iterator(batches, threads=self.settings.threads, prefetch=self.settings.threads)


def image_task(settings: Images, steps: int, classes: int, source: str) -> Task:
    """The model and its loss: what a step and an initial value need. Batches are read on the host, by `ImageRuns`."""
    model = VisionTransformer(**MODELS[settings.model], classes=classes, dtype=jnp.dtype(settings.dtype))

    def loss(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        logits = model.apply({'params': params}, batch['images'].astype(jnp.float32) / 127.5 - 1)
        scores = jax.nn.log_softmax(logits.astype(jnp.float32))
        nats = -jnp.take_along_axis(scores, batch['labels'][:, None], 1)[:, 0]
        weights = batch.get('weights', jnp.ones_like(nats))  # of evaluation batches, each with at least one image
        return (nats * weights).sum() / weights.sum()

    init = lambda key: model.init(key, jnp.zeros((1, settings.size, settings.size, 3)))['params']
    return Task(steps, None, init, None, None, loss, math.log(classes), 0.5, source=source)


class ImageRuns:
    """Runs of one optimizer, one after the other on all devices, in one compiled program: `racing.Runs` for data that are read.

    Args:
        task: of `image_task`.
        optimizer: whose runs.
        label: that runs are stored under.
        data: to train and to evaluate on.
        stored: file of finished runs; None to store none.
    """

    def __init__(self, task: Task, optimizer: Optimizer, label: str, data: ImageData, stored: pathlib.Path | None):
        self.task, self.optimizer, self.label, self.data, self.stored = task, optimizer, label, data, stored
        mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ('data',))
        everywhere, self.by_row = (jax.sharding.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P('data')))
        compiled = functools.partial(jax.jit, out_shardings=everywhere)
        self.begin = compiled(functools.partial(begin, task, optimizer))
        self.step = compiled(self._step, donate_argnums=0)
        self.loss = compiled(task.loss)

    def __call__(self, seeds: Sequence[int], settings: Sequence[Setting], *, curve: bool = True) -> Losses:
        """Losses, stacked, one for each pair of a seed and a setting, without `curve` no points of one; finished runs are read back."""
        runs = [self._run(seed, setting, curve) for seed, setting in zip(seeds, settings, strict=True)]
        return Losses(*(np.array(part) for part in zip(*runs, strict=True)))

    def train(self, seed: int, setting: Setting, *, curve: bool = True) -> Losses:
        """One run from its initial values to its last step, whatever is stored."""
        setting = Setting(*map(np.float32, setting))
        carry, points, previous = self.begin(np.uint32(seed), setting), [], np.int32(0)
        batches = self.data.training(seed)
        for index in range(self.task.steps):
            carry, done = self.step(carry, setting, np.int32(index), self._placed(next(batches)))
            jax.block_until_ready(previous)  # two steps in flight at most: their batches wait on the device
            previous = done
            if curve and (index + 1) % (self.task.steps // POINTS) == 0:
                points.append(self.evaluate(carry[0], 1))
        return Losses(self.evaluate(carry[0], 0), points)

    def evaluate(self, params: Any, part: int) -> float:
        """Mean held-out loss; that of knowing nothing where the run has diverged."""
        size, each, total = self.data.settings.batch_size, self.data.each, 0.0
        for index, batch in enumerate(self.data.evaluation(part)):
            total += float(self.loss(params, self._placed(batch))) * min(size, each - index * size)
        mean = total / each
        return mean if mean < self.task.ceiling else self.task.ceiling  # which NaN is not

    def costs(self) -> dict[str, float]:
        """As of `racing.Runs`, of one step on all devices; seconds are by the wall clock, which is what an accelerator is paid by."""
        setting = Setting(*map(np.float32, (self.optimizer.rate, 0.0, self.optimizer.knobs[0])))
        carry, batch = self.begin(np.uint32(0), setting), self._placed(next(self.data.training(0)))
        flops = mean_flops(jax.make_jaxpr(self._step)(carry, setting, np.int32(0), batch), self.optimizer)
        kept = sizes(*carry)  # before the first step takes the carry's memory
        carry, _ = jax.block_until_ready(self.step(carry, setting, np.int32(0), batch))  # which may compile
        began = time.perf_counter()
        for index in range(TIMED_STEPS):
            carry, _ = self.step(carry, setting, np.int32(1 + index), batch)
        jax.block_until_ready(carry)
        seconds = (time.perf_counter() - began) / TIMED_STEPS
        return dict(step_seconds=seconds, flops=flops) | kept

    def _run(self, seed: int, setting: Setting, curve: bool) -> Losses:
        what = dict(steps=self.task.steps, source=self.task.source, curve=curve)
        config = self.data.settings.config() | what | setting._asdict()
        key = self.label, seed, config_digest(config)
        for row in read_rows(self.stored) if self.stored else ():
            if (row['model'], row['seed'], row['config_digest']) == key:
                return Losses(**row['metrics'])
        began = time.monotonic()
        losses = self.train(seed, setting, curve=curve)
        if self.stored and jax.process_index() == 0:
            made = dict(experiment=RUNS, model=self.label, seed=seed, config=config, metrics=losses._asdict())
            append_row(self.stored, make_row(**made, hardware=hardware_name(jax.devices()), wall_s=time.monotonic() - began))
        return losses

    def _step(self, carry: Any, setting: Setting, index: jax.Array, batch: Any) -> tuple[Any, jax.Array]:
        with warnings.catch_warnings():  # matrices are whole on every device, which a program for an Auto mesh cannot see
            warnings.filterwarnings('ignore', 'the sharding of an array')
            return learn(self.task, self.optimizer, setting, carry, index, batch), index + 1

    def _placed(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, self.by_row), batch)


def _prepared_folder(settings: Images) -> pathlib.Path:
    try:
        return tfds_folder(settings.dataset, settings.data_dir)
    except ValueError as error:
        builder = '; it has no public builder, so write one with the features image and label'
        raise ValueError(f'{error}{builder if settings.dataset.startswith("imagenet21k") else ""}') from None


def _classes(features: Any, name: str) -> int:
    import tensorflow_datasets as tfds

    for feature, kind in (('image', tfds.features.Image), ('label', tfds.features.ClassLabel)):
        if feature not in features or not isinstance(features[feature], kind):
            found = ', '.join(f'{key} ({type(value).__name__})' for key, value in features.items())
            raise ValueError(f'images.dataset {name!r} has the features {found}, allowed are those with {feature} ({kind.__name__})')
    return features['label'].num_classes


def _source(builder: Any, split: str) -> Any:
    """Records by index, images as the bytes they are stored in: only a crop of them is decoded into an array."""
    import tensorflow_datasets as tfds

    if (name := split.partition('[')[0]) not in builder.info.splits:
        raise ValueError(f'images: no split {name!r} in {builder.info.full_name}, allowed are {", ".join(builder.info.splits)}')
    return builder.as_data_source(split, decoders=dict(image=tfds.decode.SkipDecoding()))


def _training_example(record: dict, generator: np.random.Generator, *, size: int) -> dict[str, np.ndarray]:
    """A random crop of random proportions, half of the time mirrored."""
    image = _opened(record['image'])
    pixels = _resized(image, _random_box(image.width, image.height, generator), size)
    return dict(images=pixels[:, ::-1] if generator.random() < 0.5 else pixels, labels=np.int32(record['label']))


def _evaluation_example(record: dict, size: int) -> dict[str, np.ndarray]:
    """The central square."""
    image = _opened(record['image'])
    side = CENTRAL * min(image.width, image.height)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return dict(images=_resized(image, (left, top, left + side, top + side), size), labels=np.int32(record['label']))


def _random_box(width: int, height: int, generator: np.random.Generator) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a crop; the whole image where ten draws do not fit."""
    for _ in range(10):
        area, aspect = width * height * generator.uniform(*AREA), math.exp(generator.uniform(*np.log(ASPECT)))
        across, down = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if across <= width and down <= height:
            left, top = generator.uniform(0, width - across), generator.uniform(0, height - down)
            return left, top, left + across, top + down
    return 0.0, 0.0, width, height


def _opened(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded)).convert('RGB')


def _resized(image: Image.Image, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
