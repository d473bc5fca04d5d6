"""The flags of the command line, parsed in this process."""

import json
import re
import shlex
import shutil

import pytest
from absl import flags

from cfg_jax import command_line, config_files
from cfg_jax.errors import UserError
from tests import tiny

DIGITS = f'--config={tiny.ROOT}/configs/digits.py'


@pytest.fixture
def parsed(monkeypatch):
    """Return the function (*flags) -> `command_line.Arguments`; the process's flags are left as they were."""

    def forget():
        for name in set(flags.FLAGS) - names:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
        for name in ('config', 'workdir', 'mode'):
            flags.FLAGS[name].unparse()

    def parse(*arguments):
        forget()
        argv = ['main.py', *map(str, arguments)]
        monkeypatch.setattr('sys.argv', argv)
        return command_line.arguments(command_line.parse(argv))

    names = set(flags.FLAGS)
    yield parse
    forget()


@pytest.mark.parametrize(
    ('field', 'texts', 'value'),
    [
        ('eval.guidance_weights', ('(0.0,)', '(2.0,)'), (2.0,)),
        ('eval.guidance_weights', ('0.5', '(1.0, 2.0)'), (1.0, 2.0)),
        ('model.channel_mult', ('(1,2)', '(1,2,4)', '(1,)'), (1,)),
        ('eval.samplers', ('ddim', "('ancestral','ddim')"), ('ancestral', 'ddim')),
        ('eval.samplers', ('ancestral', 'ddim'), ('ddim',)),
        ('eval.num_steps', ('(2,)', '()'), ()),
        ('sample.num_images', ('3', '5'), 5),
        ('data.name', ('a', 'b'), 'b'),
    ],
)
def test_the_last_of_a_repeated_flag_wins(parsed, field, texts, value):
    config = parsed(DIGITS, *(f'--config.{field}={text}' for text in texts)).config
    section, key = field.split('.')
    assert config[section][key] == value and type(config[section][key]) is type(value)


def saved_in(workdir, step, config, **more):
    folder = workdir / 'checkpoints' / str(step) / 'meta'
    folder.mkdir(parents=True)
    content = {'config': json.loads(json.dumps(config.to_dict())), 'class_names': ['a'], **more}
    (folder / 'metadata').write_text(json.dumps(content))


def test_a_workdir_knows_its_config(parsed, tmp_path):
    """Without --config the newest readable checkpoint's is used; flags override it, and newer fields are filled in."""
    config = tiny.config(model__channels=12, eval__guidance_weights=(0.0, 3.0))
    del config.plan['price']
    saved_in(tmp_path, 9, config)
    saved_in(tmp_path, 10, tiny.config(), checksum=1)  # damaged
    (tmp_path / 'checkpoints' / '11').mkdir()
    found = parsed('--mode=sample', f'--workdir={tmp_path}', '--config.sample.labels=3,8')
    assert (found.mode, found.workdir, found.config.sample.labels) == ('sample', tmp_path, '3,8')
    assert found.config.model.channels == 12 and found.config.eval.guidance_weights == (0.0, 3.0)
    assert found.config.plan.price == 0.0 and found.config.is_locked
    assert parsed('--workdir', tmp_path, DIGITS).config.model.channels == 16


def test_no_config_and_no_checkpoint(parsed, tmp_path):
    for words, there in (
        ([], ''),
        ([f'--workdir={tmp_path}'], f'; there is no checkpoint in {tmp_path}'),
        ([f'--workdir={tmp_path}', '--config.eval.folder=a'], f'; there is no checkpoint in {tmp_path}'),
    ):
        with pytest.raises(UserError, match=f'no config{there}; give one of configs/.*or a --workdir with checkpoints'):
            parsed(*words)


def test_the_last_config_counts_wherever_it_stands(parsed):
    config = parsed('--config=nowhere.py', '--config.seed=3', DIGITS, '--config.seed=4').config
    assert (config.seed, config.model.channels) == (4, 16)


def test_the_data_choose_the_default_mode(parsed):
    exact = f'--config={tiny.ROOT}/configs/mixture2d.py'
    assert parsed(DIGITS).mode == 'train' and parsed(exact).mode == 'laboratory'
    assert parsed(exact, '--mode=laboratory').workdir.name == 'mixture2d'
    with pytest.raises(UserError, match=r"--mode=train does not go with config\.data\.source='mixture'; use 'laborat"):
        parsed(exact, '--mode=train')
    with pytest.raises(UserError, match=r"--mode=laboratory does not go with config\.data\.source='digits'; use ano"):
        parsed(DIGITS, '--mode=laboratory')


def test_help(parsed, capsys):
    """It says what every mode does, gives five commands, and says where results are and where fields are explained."""
    for flag in ('--help', '-h', '--helpshort', '-helpfull'):
        with pytest.raises(SystemExit) as ended:
            parsed(flag)
        assert ended.value.code == 0
    out = capsys.readouterr().out.split('usage: ')[1]
    for mode in command_line.MODES:
        assert re.search(rf'^  {mode} +\S.*$', out, re.MULTILINE)
    commands = re.findall(r'^  (python -m cfg_jax\.main (?:.*\\\n)*.*)$', out, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:  # all of their flags exist
        words = shlex.split(command.replace('\\\n', '').replace('DIR', '/data').replace('=N', '=2'))[3:]
        if any('--workdir' in word for word in words):
            words.insert(0, DIGITS)
        parsed(*words)
    assert 'Results go to --workdir (runs/NAME' in out and 'explained in cfg_jax/config.py' in out


@pytest.mark.parametrize(
    ('path', 'first'),
    [
        ('configs/digit.py', 'digits'),
        ('imagenet64', 'imagenet64'),
        ('configs/adm256', 'adm256'),
        ('nowhere/cifar.py:x', 'cifar10'),
    ],
)
def test_a_wrong_config_path(parsed, monkeypatch, path, first):
    monkeypatch.chdir(tiny.ROOT)
    with pytest.raises(UserError) as wrong:
        parsed(f'--config={path}')
    line = str(wrong.value)
    assert line.startswith(f'there is no config file {path.split(":")[0]!r}; there are configs/{first}.py, ')
    assert len(line.split(', ')) == len(list((tiny.ROOT / 'configs').glob('*.py')))


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('def get_config(:', r'line 1: SyntaxError'),
        ('import nothing_like_this\n\ndef get_config(): pass', r'line 1: ModuleNotFoundError'),
        (
            'from cfg_jax.config import default\n\n\ndef get_config():\n    default().modle.channels = 1',
            r'line 5: AttributeError: .*modle',
        ),
        ('def get_config():\n    return int("x")', r'line 2: ValueError: invalid literal'),
    ],
)
def test_a_mistake_in_a_config_file(parsed, tmp_path, text, message):
    (tmp_path / 'mine.py').write_text(text)
    with pytest.raises(UserError, match=rf'^{tmp_path}/mine\.py, {message}'):
        parsed(f'--config={tmp_path}/mine.py')


def test_every_path_of_a_config_expands(parsed, monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    shutil.copy(tiny.ROOT / 'configs' / 'digits.py', tmp_path / 'mine.py')
    flags_ = [f'--config.{field}=~/a b' for field in config_files.PATHS]
    found = parsed('--config=~/mine.py', '--workdir=~/w', *flags_)
    for field in config_files.PATHS:
        section, key = field.split('.')
        assert found.config[section][key] == f'{tmp_path}/a b'
    assert found.workdir == tmp_path / 'w'
    with pytest.raises(UserError, match=r"config\.convert\.to is '~nobody_at_all/x', but the home folder of '~nobody"):
        parsed(DIGITS, '--config.convert.to=~nobody_at_all/x')


def test_no_path_is_forgotten():
    """Every field whose comment calls it a path, a file, a folder, a workdir or an archive expands, but for names."""
    text, found, section = (tiny.ROOT / 'cfg_jax' / 'config.py').read_text(), set(), ''
    for line in text.split('def get_config')[0].splitlines():
        section = line.split()[0].split('.')[1] if re.match(r'    config\.\w+ = \w+ = ConfigDict', line) else section
        if field := re.match(
            r"    \w+\.(\w+) = (?:''|placeholder\(\n?).*?# .*\b(path|file|folder|workdir|zip)\b", line
        ):
            found.add(f'{section}.{field[1]}')
    names = {'data.source', 'data.name', 'eval.folder', 'eval.compare_with'}  # folders inside the workdir, or no paths
    assert found - names <= set(config_files.PATHS) and len(found) > 5


def test_each_folder_of_images_has_a_workdir_of_its_own(parsed):
    names = [
        parsed('--config=configs/folder.py', f'--config.data.data_dir={place}').workdir
        for place in ('a/cats/', 'dogs.zip')
    ]
    assert list(map(str, names)) == ['runs/folder_cats', 'runs/folder_dogs']
    assert str(parsed('--config=configs/folder.py', '--config.data.data_dir=cats', '--workdir=w').workdir) == 'w'
