import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cfg_jax import files
from cfg_jax.errors import UserError, disk_errors
from cfg_jax.evaluation import columns
from cfg_jax.sampling.labels import parse_labels
from cfg_jax.trained import check_same_order
from tests import tiny


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A workdir that one whole command made: training, then sampling and evaluating, as configs/digits.py asks for."""
    workdir = tmp_path_factory.mktemp('trained')
    done = tiny.main(*tiny.flags(eval__at_end=True), f'--workdir={workdir}')
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_the_whole_command(trained):
    workdir, out = trained
    before = [line for line in out.split('step 2/4')[0].splitlines() if not re.match('compiling|initialising', line)]
    assert len(before) == 1  # the parameters' table is a file
    assert f'parameters ({workdir}/parameters.txt), 1,797 images, 1 cpu device\n' in out
    assert 'Total: ' in (workdir / 'parameters.txt').read_text()
    assert re.search(r'^step 4/4  loss \d+\.\d+  [\d.]+ images/s  \d+s left$', out, re.MULTILINE)
    written = {path.name for path in workdir.iterdir()}
    pictures = {'tradeoff.png', 'tradeoff.svg', 'means.png', 'means.svg'}
    assert {'checkpoints', 'metrics.jsonl', 'tensorboard', 'tradeoff.csv', 'means.csv', *pictures} <= written
    assert {'report.html', 'results.csv', 'sample_sets', 'references'} <= written
    assert {'samples_w0.png', 'samples_w1.png', 'samples_over_w.png', 'sample_ancestral3_v1_w0_seed0.npz'} <= written
    assert not [name for name in written if name.endswith('.tmp')]


def test_the_table(trained):
    text = (trained[0] / 'tradeoff.csv').read_text()
    assert text.splitlines()[0] == ','.join(columns.TRADEOFF)
    rows = list(csv.DictReader(text.splitlines()))
    assert [float(row['guidance_weight']) for row in rows] == [0, 1]
    for row in rows:
        assert (row['num_samples'], row['num_steps'], row['sampler'], row['seed']) == ('40', '3', 'ancestral', '0')
        assert float(row['fid']) > 0 and 1 <= float(row['inception_score']) <= 10
        assert all(0 <= float(row[key]) <= 1 for key in ('precision', 'recall', 'accuracy'))


def test_accuracy_by_class_averages_to_the_accuracy(trained):
    by_class = list(csv.DictReader((trained[0] / 'accuracy_by_class.csv').open()))
    assert [row['class'] for row in by_class] == list('0123456789')
    for row in csv.DictReader((trained[0] / 'tradeoff.csv').open()):
        each = [float(line[f'w={float(row["guidance_weight"]):g}']) for line in by_class]
        assert np.mean(each) == pytest.approx(float(row['accuracy']), abs=1e-3)  # four images of each class


def test_a_comparison_of_two_curves(trained):
    """A second folder's curve, drawn with the first; its costs are counted: one forward a step against two."""
    arguments = ['--mode=evaluate', f'--workdir={trained[0]}', '--config.eval.folder=plain']
    plainly = {'guidance__function': 'conditional', 'eval__guidance_weights': (0.0,)}
    done = tiny.forked_main(*tiny.flags(**plainly, eval__compare_with='.'), *arguments)
    assert done.returncode == 0, done.stderr
    (*_, guided), (*_, plain) = (
        list(csv.DictReader((folder / 'costs.csv').read_text().splitlines()))
        for folder in (trained[0], trained[0] / 'plain')
    )
    assert (guided['network_evaluations'], plain['network_evaluations']) == ('6', '3')
    assert float(plain['seconds_per_image']) > 0 and plain['classifier_gradients'] == '0'
    assert Image.open(trained[0] / 'plain' / 'comparison.png').width > 500
    done = tiny.forked_main(*tiny.flags(eval__compare_with='nowhere'), *arguments)
    assert 'config.eval.compare_with' in one_line_of_error(done)


def test_several_samplers_and_steps_with_the_readmes_own_guidance(trained, tmp_path):
    """The five lines of docs/own_guidance.md run. Each sampler has a curve in one report, beside the other evaluation,
    not over it; the results of every evaluation stand in one table of the workdir."""
    page = (tiny.ROOT / 'docs' / 'own_guidance.md').read_text()
    (tmp_path / 'noisy.py').write_text(page.split('```python\n')[1].split('```')[0])
    before, table = list(csv.DictReader((trained[0] / 'results.csv').open())), (trained[0] / 'tradeoff.csv').read_text()
    own = {'guidance__function': 'noisy:weaker', 'eval__folder': 'interval'}
    done = tiny.forked_main(
        *tiny.flags(eval__samplers=('ancestral', 'ddim'), eval__num_steps=(5,), **own),
        '--mode=evaluate',
        f'--workdir={trained[0]}',
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (trained[0] / 'tradeoff.csv').read_text() == table
    folder = trained[0] / 'interval'
    curves = ('ancestral5', 'ddim5')
    assert {f'tradeoff_{curve}.png' for curve in curves} | {f'samples_{curve}_over_w.png' for curve in curves} <= {
        path.name for path in folder.iterdir()
    }
    rows = list(csv.DictReader((folder / 'tradeoff.csv').open()))
    assert [(row['sampler'], row['num_steps'], row['guidance_weight']) for row in rows] == [
        ('ancestral', '5', '0'), ('ancestral', '5', '1'), ('ddim', '5', '0'), ('ddim', '5', '1'),
    ]  # fmt: skip
    results = list(csv.DictReader((trained[0] / 'results.csv').open()))
    assert results[: len(before)] == before and len(results) == len(before) + 4
    for row in results:
        assert row['judge'].startswith('trained:sha256:') and len(row['reference_sha256']) == 64
    # w = 0 of the two samplers are other images, and each row's hash is that of its own
    assert len({row['samples_sha256'] for row in results[len(before) :]}) == 4
    assert 'ddim, 5 steps' in (folder / 'report.html').read_text()


def test_a_second_evaluation_draws_nothing_anew(trained):
    shards = {path: path.stat().st_mtime_ns for path in (trained[0] / 'sample_sets').rglob('shard_*.npz')}
    results = list(csv.DictReader((trained[0] / 'results.csv').open()))[:2]
    done = tiny.forked_main(*tiny.flags(eval__folder='again'), '--mode=evaluate', f'--workdir={trained[0]}')
    assert done.returncode == 0 and 'images/s' not in done.stdout, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in (trained[0] / 'sample_sets').rglob('shard_*.npz')} == shards
    again = list(csv.DictReader((trained[0] / 'results.csv').open()))[-2:]
    for row in (*results, *again):
        del row['date'], row['folder']
    assert again == results


def test_bits_per_dim(trained):
    flags = tiny.flags(eval__bits_per_dim=True, eval__bound_evaluations=5, eval__bound_weights=(0.0, 1.0))
    done = tiny.forked_main(*flags, '--mode=evaluate', f'--workdir={trained[0]}')
    assert done.returncode == 0, done.stderr
    result = json.loads((trained[0] / 'bits_per_dim.json').read_text())
    assert result['num_images'] == 40 and result['num_steps'] == 5 and result['logsnr_max'] == 13.3
    assert result['total'] > 8 > result['standard_error'] > 0 < result['prior'] < 1e-6
    line = next(line for line in done.stdout.splitlines() if '±' in line)  # four steps of training: vacuous, and said
    assert (
        'above 8, which 8-bit values cost if all are equally likely' in line
        and 'at w = 0 (' in line
        and 'wrote' in done.stdout
    )
    rows = list(csv.DictReader((trained[0] / 'bits_per_dim.csv').open()))
    assert [row['guidance_weight'] for row in rows] == ['0', '1'] and float(rows[0]['above_first']) == 0
    assert float(rows[1]['above_first_error']) > 0 and rows[0]['total'] == f'{result["total"]:.6g}'


def test_names_that_the_terminal_cannot_show(tmp_path):
    """A folder's Latin-1 name, printed to an ASCII stream: one line, not the traceback of an encoder."""
    for name in ('caf\udce9', 'cafés'):
        flags = tiny.flags(data__source='folder', data__data_dir=str(tmp_path / name))
        environment = {**tiny.environment(), 'PYTHONIOENCODING': 'ascii:strict'}
        done = tiny.main(*flags, f'--workdir={tmp_path / "run"}', env=environment)
        shown = {'caf\udce9': r'caf\udce9', 'cafés': r'caf\xe9s'}[name]
        assert shown in one_line_of_error(done)


def sample(workdir, **changes):
    done = tiny.forked_main(*tiny.flags(**changes), '--mode=sample', f'--workdir={workdir}')
    assert done.returncode == 0, done.stderr
    png, npz = re.search(r'wrote (\S+\.png) and (\S+\.npz)', done.stdout).groups()
    with np.load(npz) as arrays:
        return Image.open(png), arrays['arr_0'], arrays['arr_1'], png


def test_sample_writes_the_classes_asked_for(trained):
    picture, images, labels, _ = sample(trained[0], sample__labels='7,2', sample__num_images=6)
    assert images.shape == (6, 8, 8, 1) and images.dtype == np.uint8
    assert labels.tolist() == [7, 2, 7, 2, 7, 2]
    # two rows of three: 8 pixels and 2 between them, enlarged 4 times; a title, and a margin with the names
    assert 14 < picture.height - 4 * (2 + 2 * 10) < 30 and picture.width > 4 * (2 + 3 * 10)


def test_a_scale_is_a_weight_plus_one_and_the_seed_matters(trained):
    _, weighted, _, weight_path = sample(trained[0], sample__guidance_weight=2.0)
    _, scaled, _, scale_path = sample(trained[0], sample__guidance_scale=3.0)
    np.testing.assert_array_equal(scaled, weighted)
    assert scale_path == weight_path
    _, other, _, other_path = sample(trained[0], sample__guidance_weight=2.0, sample__seed=1)
    assert not np.array_equal(weighted, other) and weight_path != other_path


def test_more_images_leave_the_first_ones_as_they_are(trained):
    _, few, _, _ = sample(trained[0], sample__num_images=14)
    _, many, _, _ = sample(trained[0], sample__num_images=64)
    np.testing.assert_array_equal(many[:14], few)


BAD = {
    'a label too large': (['--mode=sample', '--config.sample.labels=10'], r'label 10 is not a class; allowed: 0 to 9'),
    'a negative label': (['--mode=sample', '--config.sample.labels=-1'], r'label -1 is not a class; allowed: 0 to 9'),
    'an unknown class': (
        ['--mode=sample', '--config.sample.labels=cat'],
        r"label 'cat' is not a class; .*sample\.labels",
    ),
    'an unknown field': (['--config.model.chanels=4'], r"unknown config field 'chanels' Did you mean \"channels\""),
    'an unknown section': (['--config.modle.channels=4'], r'unknown config field .*modle'),
    'a value of the wrong type': (['--config.model.channels=many'], r'channels.*many'),
    'weight and scale': (
        ['--mode=sample', '--config.sample.guidance_weight=1', '--config.sample.guidance_scale=2'],
        r'both config\.sample\.guidance_weight \(1\) and config\.sample\.guidance_scale \(2\) are set',
    ),
    "another config's checkpoints": (
        ['--config.model.channels=12'],
        r"holds another config's checkpoints: config\.model\.channels is 12 now and was 8 when saved",
    ),
    'sampling with another model': (
        ['--mode=sample', '--config.diffusion.prediction=v'],
        r"another config's checkpoints: config\.diffusion\.prediction is 'v' now and was 'eps' when saved",
    ),
    'no sampling steps': (
        ['--mode=sample', '--config.sample.num_steps=0'],
        r'config\.sample\.num_steps is 0; it must be at least 1',
    ),
    'an image that the levels do not halve': (
        ['--config.model.channel_mult=(1,1,1,1,1)'],
        r'config\.data\.image_size is 8; it must be a multiple of 16: config\.model\.channel_mult has 5 levels',
    ),
    'an unknown sampler': (
        ['--config.sample.sampler=euler'],
        r"config\.sample\.sampler is 'euler'; allowed: 'ancestral', 'ddim'",
    ),
    'an unknown guidance': (
        ['--mode=sample', '--config.guidance.function=nowhere:rule'],
        r'config\.guidance\.function.*nowhere',
    ),
    'an unknown guidance, before training': (
        ['--config.guidance.function=foo'],
        r"config\.guidance\.function is 'foo'; allowed: 'classifier_free', 'conditional', 'unconditional'",
    ),
    'a function that is no guidance': (
        ['--mode=sample', '--config.guidance.function=json:dumps'],
        r"config\.guidance\.function is 'json:dumps'; allowed: 'classifier_free'",
    ),
    'labels that only the sampling at the end would refuse': (
        ['--config.eval.at_end=True', '--config.sample.labels=cat'],
        r"label 'cat' is not a class",
    ),
    'nothing to convert': (['--mode=convert'], r'set one of config\.convert\.path .* and config\.convert\.to'),
    'a classifier that is not one': (
        ['--mode=sample', '--config.guidance.classifier_workdir=/nowhere'],
        r'no checkpoint in /nowhere/checkpoints',
    ),
    'a slice that there is not': (
        ['--mode=plan', '--config.plan.topology=v5e:3x3'],
        r"config\.plan\.topology is 'v5e:3x3'; allowed: .* v5e: 1x1 2x2",
    ),
    'an unknown mode': (['--mode=dream'], r'mode.*train'),
    'no judge': (
        ['--mode=evaluate', '--config.eval.judge='],
        r"config\.eval\.judge is not set; allowed: 'dinov2', 'inception', 'lite0', 'trained'",
    ),
    'too few samples, before any is drawn': (
        ['--mode=evaluate', '--config.eval.allow_few_samples=False', '--config.sample.seed=9'],
        r'40 samples of 64 features.*config\.eval\.allow_few_samples',
    ),
    'no data': (
        ['--config.data.source=tfds', '--config.data.name=imagenet_resized/64x64', '--config.data.data_dir=/nowhere'],
        r'no data set .*config\.data\.data_dir',
    ),
}


def one_line_of_error(done):
    """The error that a failed command shows: one line, no traceback."""
    assert done.returncode not in (0, 1), done.stdout + done.stderr
    assert 'Traceback' not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert done.stderr.splitlines()[-1] == line
    return line


@pytest.mark.parametrize('case', BAD)
def test_bad_input(trained, case):
    arguments, message = BAD[case]
    before = sorted(path.name for path in trained[0].rglob('*'))
    done = tiny.forked_main(*tiny.flags(), *arguments, f'--workdir={trained[0]}')
    assert re.search(message, one_line_of_error(done)), done.stderr
    assert sorted(path.name for path in trained[0].rglob('*')) == before


def test_no_checkpoint(tmp_path):
    for empty in (tmp_path / 'missing', tmp_path):
        done = tiny.forked_main(*tiny.flags(), '--mode=sample', f'--workdir={empty}')
        assert re.search(r'no checkpoint in .*checkpoints; train first', one_line_of_error(done))


def test_a_workdir_that_cannot_be(tmp_path):
    (tmp_path / 'file').write_text('')
    done = tiny.forked_main(*tiny.flags(), f'--workdir={tmp_path}/file/below')
    assert 'cannot be written' in one_line_of_error(done)
    (tmp_path / 'loop').symlink_to('loop')
    for name in ('/proc/foo', f'{tmp_path}/loop/x', f'{tmp_path}/{"x" * 300}', f'{tmp_path}/file/below'):
        with pytest.raises(UserError, match=r' cannot be written: .*--workdir'), disk_errors(name):
            files.write(Path(name) / 'metrics.jsonl', b'')
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):  # a mistake of the program's own
        (tmp_path / 'missing').read_text()


def test_no_config():
    assert 'no config' in one_line_of_error(tiny.forked_main())
    assert 'nowhere.py' in one_line_of_error(tiny.forked_main('--config=nowhere.py'))


def test_a_batch_that_the_devices_do_not_divide(tmp_path):
    done = tiny.main(*tiny.flags(train__batch_size=12), f'--workdir={tmp_path}', devices=8)
    assert re.search(r'batch of 12 images does not divide over 8 devices.*multiple of 8', one_line_of_error(done))


def test_sampling_survives_a_damaged_newest_checkpoint(trained, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(trained[0], workdir)
    shutil.rmtree(workdir / 'checkpoints' / '4' / 'state')
    done = tiny.forked_main(*tiny.flags(), '--mode=sample', f'--workdir={workdir}')
    assert done.returncode == 0, done.stderr
    assert 'checkpoint 4 is damaged' in done.stdout
    assert (workdir / 'checkpoints' / '4').is_dir()  # a job that only reads moves nothing


def test_labels_by_name():
    assert parse_labels('dog, cat', ('cat', 'dog')) == [1, 0]
    assert parse_labels('', ('cat', 'dog')) == [0, 1]
    assert parse_labels('1,1', ('cat', 'dog')) == [1, 1]
    assert parse_labels('1', ('2', '1', '0')) == [1]  # a number is an id
    with pytest.raises(UserError, match=r"label '2' may mean id:2 \('10'\) or id:4 \('2'\): write that instead"):
        parse_labels('2,10', tuple(sorted(map(str, range(12)))))  # as old checkpoints order them
    assert parse_labels('2,10', tuple(map(str, range(12)))) == [2, 10]
    assert parse_labels('name:2,id:2,10', tuple(map(str, range(1, 11)))) == [1, 2, 9]
    assert parse_labels('cafe\u0301', ('caf\u00e9',)) == [0]
    for text in ('--3', '³', '1.0', 'Cat', 'name:1', 'id:cat', 'id:2', 'cat,'):
        with pytest.raises(UserError, match='is not a class; allowed: 0 to 1'):
            parse_labels(text, ('cat', 'dog'))
    with pytest.raises(UserError, match='label 2 is not a class'):
        parse_labels('2', ('cat', 'dog'))


def test_a_classifier_knows_the_models_classes_in_the_same_order():
    names = tuple(map(str, range(12)))
    check_same_order(names, names, 'classifier', 'config.guidance.classifier_workdir')
    check_same_order(('caf\u00e9', 'tea'), ('cafe\u0301', 'tea'), 'classifier', 'config.guidance.classifier_workdir')
    check_same_order(
        names, ('cat', *names[1:]), 'classifier', 'classifier_workdir'
    )  # imported weights have numbers for names
    with pytest.raises(UserError, match=r'label 2 is .2. to the model but .10. to that in classifier; both'):
        check_same_order(names, tuple(sorted(names)), 'classifier', 'config.guidance.classifier_workdir')


def test_labels_by_names_with_commas():
    names = ('tench, Tinca tinca', 'goldfish, Carassius auratus', 'a', 'b', 'a,b')
    assert parse_labels('tench, Tinca tinca', names) == [0]
    assert parse_labels('goldfish, Carassius auratus,3, tench, Tinca tinca,a', names) == [1, 3, 0, 2]
    assert parse_labels('id:4,name:tench, Tinca tinca', names) == [4, 0]
    for text, item in [('tench', 'tench'), ('tench, Tinca tinca,foo', 'foo'), ('foo,tench, Tinca tinca', 'foo')]:
        with pytest.raises(UserError, match=f"label '{item}' is not a class; .*'tench, Tinca tinca'"):
            parse_labels(text, names)
    with pytest.raises(UserError, match=r"label 'a,b' may mean id:2 \('a'\) or id:4 \('a,b'\)"):
        parse_labels('0,a,b', names)
