"""The flags of the command line, parsed in this process."""

import pytest
from absl import flags

from cfg_jax import command_line
from tests import tiny

DIGITS = f'--config={tiny.ROOT}/configs/digits.py'


@pytest.fixture
def parsed(monkeypatch):
    """Return the function (*flags) -> `command_line.Arguments`; the process's flags are left as they were."""

    def parse(*arguments):
        argv = ['main.py', *map(str, arguments)]
        monkeypatch.setattr('sys.argv', argv)
        return command_line.arguments(command_line.parse(argv))

    names = set(flags.FLAGS)
    yield parse
    for name in set(flags.FLAGS) - names:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


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
