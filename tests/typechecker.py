"""The type checker that tests/conftest.py installs: beartype, with an int allowed where a float is expected."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
