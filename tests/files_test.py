"""Files are written whole or not at all, and JSON holds nothing that other programs cannot read."""

import json

import numpy as np
import pytest

from cfg_jax import files
from cfg_jax.errors import UserError


@pytest.mark.parametrize(
    ('content', 'where'),
    [
        ({'total': float('nan')}, 'total is nan'),
        ({'a': [1, {'b': (2.0, float('inf'))}]}, r'a\.1\.b\.1 is inf'),
        ([np.float64('-inf')], '0 is -inf'),
        (float('nan'), 'its content is nan'),
    ],
)
def test_json_never_holds_a_number_that_is_not_finite(tmp_path, content, where):
    path = tmp_path / 'a.json'
    with pytest.raises(UserError, match=rf'a\.json is not written: {where}, not a finite number\.$'):
        files.write_json(path, content)
    assert not list(tmp_path.iterdir())
    files.write_json(path, {'a': [1, 2.5, None, True, 'nan']})
    assert json.loads(path.read_text()) == {'a': [1, 2.5, None, True, 'nan']}
