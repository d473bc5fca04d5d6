"""The conversion job: weights of other programs into a workdir, or a workdir's weights into a file."""

import json
from pathlib import Path

import jax
import numpy as np

from cfg_jax import build, convert
from cfg_jax.checks import check_config
from cfg_jax.errors import UserError
from cfg_jax.sampling import generate
from cfg_jax.training import sharding
from cfg_jax.training.checkpoints import Checkpoints, config_differences
from cfg_jax.training.train_state import TrainState


def run(config, workdir):
    """config.convert.path into a checkpoint of `workdir`, or the newest checkpoint's EMA into config.convert.to."""
    check_config(config)
    path, to = config.convert.path, config.convert.to
    if bool(path) == bool(to):
        raise UserError('set one of config.convert.path (a .pt or .safetensors file to read) and config.convert.to.')
    if path:
        import_weights(config, Path(path), Path(workdir))
    else:
        export_weights(config, Path(to), workdir)


def import_weights(config, path, workdir):
    """Writes step 0 of `workdir`: parameters and EMA are the file's; training from there starts Adam and data anew."""
    params = from_safetensors(config, path) if path.suffix == '.safetensors' else from_openai(config, path)
    checkpoints = Checkpoints(workdir / 'checkpoints', build.run_identity(config))
    if (step := checkpoints.latest_step()) is not None:
        raise UserError(f'{workdir} holds checkpoints already, up to step {step}; use another --workdir.')
    state = TrainState(np.int32(0), params, params, jax.jit(build.optimizer(config).init)(params))
    names = [str(label) for label in range(config.data.num_classes)]
    checkpoints.save(0, state, config=config.to_dict(), class_names=names)
    checkpoints.close()
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f'wrote {count:,} parameters of {path} to {checkpoints.path(0)}', flush=True)


def from_openai(config, path):
    """The parameters of one of guided-diffusion's .pt files, for the config's network."""
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
        raise UserError(f'{path}: {error}') from None


def from_safetensors(config, path):
    """The parameters of a file that `export_weights` wrote, checked against the config's network."""
    params, metadata = convert.load_safetensors(path)
    try:
        saved = json.loads(metadata.get('config', '{}'))
    except ValueError:
        raise UserError(f'{path}: its metadata is damaged.') from None
    ours = json.loads(json.dumps(build.model_identity(config)))
    if saved and (differences := config_differences(ours, saved)):
        raise UserError(f'{path} is of another network: {differences[0]}.')
    expected, found = (
        {jax.tree_util.keystr(at): leaf.shape for at, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (jax.eval_shape(lambda: build.init_params(config, jax.random.key(0))), params)
    )
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f'{path} is not of this network: {name} is {found.get(name, "missing")} there and '
                f'{expected.get(name, "missing")} here.'
            )
    return params


def export_weights(config, to, workdir):
    """Writes the EMA parameters as safetensors, with the part of the config that says what they are."""
    if to.suffix != '.safetensors':
        raise UserError(f'config.convert.to is {str(to)!r}; it must end in .safetensors.')
    restored = generate.load(config, workdir, sharding.make_mesh())
    metadata = {'config': json.dumps(build.model_identity(config)), 'step': str(restored.step)}
    convert.save_safetensors(to, restored.tree, metadata)
    print(f'wrote {to}', flush=True)
