"""Write small data sets in TFDS's own layout: by TFDS itself, with real PNG or JPEG bytes."""

import io
import json

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorboardX.record_writer import RecordWriter

CIFAR10 = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')


def picture(number, size, channels=3):
    """Return a smooth uint8 image whose top left pixel holds its number in base 256."""
    y, x = np.mgrid[:size, :size] / size
    waves = [127 + 60 * np.sin(6 * x + number + c) + 60 * np.cos(4 * y - number * c) for c in range(channels)]
    image = np.stack(waves, axis=-1).astype(np.uint8)
    image[0, 0, 0], image[0, 0, -1] = divmod(number, 256)
    return image


def number_of(image):
    """Return the number that `picture` was given."""
    return int(image[0, 0, 0]) * 256 + int(image[0, 0, -1])


def write(data_dir, name, examples, *, version, features, image_format='png', split='train'):
    """Write examples (dicts; 'image' uint8 [H, W, C]) as TFDS data set `name`, such as 'imagenet_resized/64x64'.

    PIL images are how TFDS encodes without TensorFlow; a JPEG goes in as its own bytes.
    """
    dataset, _, config_name = name.partition('/')

    def encoded(image):
        if image_format == 'png':
            return Image.fromarray(image.squeeze())
        file = io.BytesIO()
        Image.fromarray(image).save(file, 'jpeg', quality=95)
        file.seek(0)
        return file

    def generate(self):
        for number, example in enumerate(examples):
            yield number, example | {'image': encoded(example['image'])}

    configs = [tfds.core.BuilderConfig(name=config_name, version=version)] if config_name else []
    with tfds.core.registered.skip_registration():
        builder = type(
            ''.join(word.capitalize() for word in dataset.split('_')),
            (tfds.core.GeneratorBasedBuilder,),
            {
                '__module__': __name__,
                'name': dataset,
                'VERSION': tfds.core.Version(version),
                'BUILDER_CONFIGS': configs,
                '_info': lambda self: self.dataset_info_from_configs(
                    features=tfds.features.FeaturesDict(features), supervised_keys=('image', 'label')
                ),
                '_split_generators': lambda self, manager: {split: self._generate_examples()},
                '_generate_examples': generate,
            },
        )
    builder(data_dir=data_dir, file_format='array_record').download_and_prepare()


def write_cifar10(data_dir, count):
    """Write `cifar10` 3.0.2: image i is `picture(i, 32)`, of class i mod 10."""
    features = {
        'id': tfds.features.Text(),
        'image': tfds.features.Image(shape=(32, 32, 3)),
        'label': tfds.features.ClassLabel(names=CIFAR10),
    }
    examples = [{'id': f'train_{i:05d}', 'image': picture(i, 32), 'label': i % 10} for i in range(count)]
    write(data_dir, 'cifar10', examples, version='3.0.2', features=features)


def write_imagenet_resized(data_dir, count):
    """Write `imagenet_resized/64x64` 0.1.0: image i is `picture(i, 64)`, of class 7i mod 1000."""
    names = tfds.core.tfds_path('image_classification/imagenet_resized_labels.txt')
    features = {
        'image': tfds.features.Image(shape=(64, 64, 3)),
        'label': tfds.features.ClassLabel(names_file=names),
    }
    examples = [{'image': picture(i, 64), 'label': 7 * i % 1000} for i in range(count)]
    write(data_dir, 'imagenet_resized/64x64', examples, version='0.1.0', features=features)


def write_imagenet2012(data_dir, sizes):
    """Write `imagenet2012` 5.1.0 with three classes: JPEGs of the sizes (H, W) in turn, image i of class i mod 3."""
    features = {
        'image': tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg'),
        'label': tfds.features.ClassLabel(names=['n01440764', 'n01443537', 'n01484850']),
        'file_name': tfds.features.Text(),
    }
    images = [picture(i, max(size))[: size[0], : size[1]] for i, size in enumerate(sizes)]
    examples = [{'image': image, 'label': i % 3, 'file_name': f'{i}.JPEG'} for i, image in enumerate(images)]
    write(data_dir, 'imagenet2012', examples, version='5.1.0', features=features, image_format='jpeg')


def as_tfrecord(folder):
    """Convert a data set's own folder from ArrayRecord to TFRecord, TFDS's default."""
    from array_record.python.array_record_module import ArrayRecordReader

    for path in sorted(folder.glob('*.array_record-*')):
        reader = ArrayRecordReader(str(path))
        writer = RecordWriter(str(path).replace('array_record', 'tfrecord'))
        for record in reader.read_all():
            writer.write(record)
        writer.close()
        path.unlink()
    info = folder / 'dataset_info.json'
    described = json.loads(info.read_text())
    info.write_text(json.dumps(described | {'fileFormat': 'tfrecord'}))
