"""The conversion job: another program's weights into a workdir, or a workdir's weights into a file."""

import json
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from cfg_jax import build, convert, trained
from cfg_jax.checks import check_config
from cfg_jax.config import default
from cfg_jax.errors import UserError
from cfg_jax.training.checkpoints import Checkpoints, as_json, config_differences, merged
from cfg_jax.training.train_state import TrainState


def run(config, workdir):
    """Make config.convert.path a checkpoint of `workdir`, or write its EMA parameters to config.convert.to.

    They are those of the newest checkpoint, or of the student of config.sample.num_steps where there are several.
    """
    check_config(config)
    path, to = config.convert.path, config.convert.to
    if bool(path) == bool(to):
        raise UserError(
            'set one of config.convert.path (a .pt or .safetensors file to read) and config.convert.to (a .safetensors '
            'file to write).'
        )
    if path:
        import_weights(config, Path(path), Path(workdir))
    else:
        export_weights(config, Path(to), workdir)


def import_weights(config, path, workdir):
    """Write step 0 of `workdir` with the file's parameters, also as EMA; training continues with a fresh optimizer."""
    if config.distill.method:
        raise UserError(
            f"config.distill.method is {config.distill.method!r}; it must be '' to read config.convert.path: a "
            "student's checkpoints hold its teacher too."
        )
    params = from_safetensors(config, path) if path.suffix == '.safetensors' else from_openai(config, path)
    with Checkpoints(workdir / 'checkpoints', build.run_identity(config)) as checkpoints:
        if (step := checkpoints.latest_step()) is not None:
            raise UserError(f'{workdir} already holds checkpoints, up to step {step}; use another --workdir.')
        averages = dict.fromkeys(build.ema_gammas(config), params) or None
        opt_state = jax.jit(build.optimizer(config).init)(params)
        state = TrainState(np.int32(0), params, params, opt_state, averages=averages)
        names = [str(label) for label in range(config.data.num_classes)]
        checkpoints.save(0, state, config=config.to_dict(), class_names=names)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f'wrote {count:,} parameters of {path} to {checkpoints.path(0)}', flush=True)


def from_openai(config, path):
    """Return the parameters in one of guided-diffusion's .pt files, for the config's network."""
    state_dict = convert.load_openai_state_dict(path)
    read = {'unet': convert.openai_unet_params, 'classifier': convert.openai_classifier_params}[config.model.kind]
    try:
        return read(
            state_dict,
            build.network(config),
            config.data.image_size,
            new_attention_order=config.convert.new_attention_order,
            in_channels=config.data.image_channels,
        )
    except UserError as error:
        raise UserError(f'{path}: {error} (config.convert.path).') from None


def from_safetensors(config, path):
    """Return the parameters in a file written by `export_weights`, checked against the config's network."""
    params, metadata = convert.load_safetensors(path)
    try:
        saved = json.loads(metadata.get('config', '{}'))
    except ValueError:
        raise UserError(f'{path}: its metadata is damaged (config.convert.path).') from None
    saved = saved and merged(as_json(build.model_identity(default())), saved)  # older files lack newer fields
    if saved and (differences := config_differences(as_json(build.model_identity(config)), saved)):
        raise UserError(f'{path} holds another network: {"; ".join(differences)}.')
    expected = flatten_dict(jax.eval_shape(lambda: build.init_params(config, jax.random.key(0))), sep='/')
    try:
        convert.check_fits(flatten_dict(params, sep='/'), {name: leaf.shape for name, leaf in expected.items()})
    except UserError as error:
        raise UserError(f'{path}: {error} (config.convert.path).') from None
    return params


def export_weights(config, to, workdir):
    """Write the EMA parameters as safetensors, with the part of the config that says which network they belong to."""
    if to.suffix != '.safetensors':
        raise UserError(f'config.convert.to is {str(to)!r}; it must end in .safetensors.')
    model = trained.load(config, workdir)
    metadata = {'config': json.dumps(build.model_identity(config)), 'step': str(model.step)}
    convert.save_safetensors(to, model.params, metadata)
    print(f'wrote {to}', flush=True)
