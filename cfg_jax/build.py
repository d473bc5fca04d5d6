"""From a config to the parts it names: model, schedule, loss, optimizer, data, sampler."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax import diffusion, guidance, losses, optim, samplers, schedules
from cfg_jax.data import pipeline, sources
from cfg_jax.errors import UserError
from cfg_jax.models.unet import UNet


def model_identity(config):
    """The part of the config that fixes what a checkpoint's parameters mean, as a nested dict of plain values."""
    plain = config.to_dict()
    data = {key: plain['data'][key] for key in ('image_size', 'image_channels', 'num_classes')}
    how = ('dropout', 'remat', 'dtype')  # how the network is computed and trained, not what it is
    model = {key: value for key, value in plain['model'].items() if key not in how}
    return {'data': data, 'diffusion': plain['diffusion'], 'model': model}


def check(config):
    """Raises UserError for the first value that is not allowed, with the field's name."""

    def one_of(name, *allowed):
        value = config
        for key in name.split('.'):
            value = value[key]
        if value not in allowed:
            raise UserError(f'config.{name} is {value!r}; allowed: {", ".join(map(repr, allowed))}.')

    def require(holds, name, value, allowed):
        if not holds:
            raise UserError(f'config.{name} is {value!r}; it must be {allowed}.')

    one_of('data.source', 'digits', 'tfds')
    one_of('diffusion.prediction', 'eps', 'x', 'v')
    one_of('model.dtype', 'float32', 'bfloat16')
    one_of('loss.target', 'eps', 'x', 'v')
    one_of('optim.name', 'adam', 'adamw')
    one_of('optim.decay', 'constant', 'cosine')
    one_of('sample.sampler', 'ancestral', 'ddim')
    one_of('eval.judge', '', 'digits')
    for section, key, least in (
        ('data', 'image_size', 1),
        ('data', 'image_channels', 1),
        ('data', 'num_classes', 1),
        ('data', 'num_threads', 0),
        ('data', 'num_workers', 0),
        ('model', 'num_blocks', 1),
        ('optim', 'warmup_steps', 0),
        ('train', 'num_steps', 1),
        ('train', 'log_every', 1),
        ('train', 'checkpoint_every', 1),
        ('train', 'keep_checkpoints', 1),
        ('train', 'grid_every', 0),
        ('train', 'grid_images', 1),
        ('sample', 'num_steps', 1),
        ('sample', 'num_images', 1),
        ('sample', 'batch_size', 1),
        ('eval', 'num_samples', 1),
        ('eval', 'nearest_k', 1),
    ):
        require(config[section][key] >= least, f'{section}.{key}', config[section][key], f'at least {least}')
    require(0 <= config.loss.p_uncond <= 1, 'loss.p_uncond', config.loss.p_uncond, 'between 0 and 1')
    require(0 <= config.model.dropout < 1, 'model.dropout', config.model.dropout, 'at least 0 and below 1')
    require(0 <= config.optim.ema_decay < 1, 'optim.ema_decay', config.optim.ema_decay, 'at least 0 and below 1')
    require(0 <= config.sample.v <= 1, 'sample.v', config.sample.v, 'between 0 and 1')
    require(0 <= config.sample.eta <= 1, 'sample.eta', config.sample.eta, 'between 0 and 1')
    require(
        config.diffusion.logsnr_min < config.diffusion.logsnr_max,
        'diffusion.logsnr_min',
        config.diffusion.logsnr_min,
        'below logsnr_max',
    )
    require(
        not config.optim.weight_decay or config.optim.name == 'adamw',
        'optim.weight_decay',
        config.optim.weight_decay,
        "0 unless config.optim.name is 'adamw'",
    )
    levels = len(config.model.channel_mult)
    require(levels, 'model.channel_mult', config.model.channel_mult, 'a tuple of at least one number')
    reduction = 2 ** (levels - 1)
    require(
        config.data.image_size % reduction == 0,
        'data.image_size',
        config.data.image_size,
        f'a multiple of {reduction}: the {levels} levels of config.model.channel_mult halve it {levels - 1} times',
    )
    for mult in config.model.channel_mult:
        width = config.model.channels * mult
        require(
            width % config.model.num_groups == 0,
            'model.num_groups',
            config.model.num_groups,
            f'a divisor of every width, {width} among them',
        )
    guidance_weight(config)


def guidance_weight(config):
    """The paper's w, from config.sample.guidance_weight or guidance_scale = 1 + w, of which one may be set."""
    weight, scale = config.sample.guidance_weight, config.sample.guidance_scale
    if weight is not None and scale is not None:
        raise UserError(
            f'both config.sample.guidance_weight ({weight:g}) and config.sample.guidance_scale ({scale:g}) are set; '
            'set one of them: scale = 1 + weight.'
        )
    if scale is not None:
        return scale - 1.0
    return 0.0 if weight is None else weight


def image_shape(config):
    """(H, W, C)."""
    return (config.data.image_size, config.data.image_size, config.data.image_channels)


def null_label(config):
    """The label id of the unconditional model."""
    return config.data.num_classes


def source(config):
    """The data set, checked against the config's image shape and number of classes."""
    if config.data.source == 'digits':
        data = sources.digits()
    else:
        data = sources.TfdsSource(config.data.name, config.data.split, config.data.data_dir, image_shape(config))
    if tuple(data.image_shape) != image_shape(config):
        raise UserError(
            f'the images of {config.data.source!r} are {data.image_shape}, not {image_shape(config)} '
            '(config.data.image_size, config.data.image_channels).'
        )
    if len(data.class_names) != config.data.num_classes:
        raise UserError(
            f'{config.data.source!r} has {len(data.class_names)} classes, not {config.data.num_classes} '
            '(config.data.num_classes).'
        )
    return data


def train_batches(config, data):
    """This process's endless iterator over batches of the source `data`."""
    return pipeline.train_batches(
        data,
        batch_size=config.train.batch_size // jax.process_count(),
        seed=config.seed,
        flip=config.data.flip,
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def to_unit_range(images):
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x):
    """float [-1, 1] -> uint8 [0, 255], rounded; values outside are clipped."""
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def schedule(config):
    """u -> λ."""
    return partial(
        schedules.cosine_logsnr, logsnr_min=config.diffusion.logsnr_min, logsnr_max=config.diffusion.logsnr_max
    )


def unet(config):
    """The network, a flax module."""
    return UNet(
        channels=config.model.channels,
        channel_mult=tuple(config.model.channel_mult),
        num_blocks=config.model.num_blocks,
        attention_resolutions=tuple(config.model.attention_resolutions),
        num_heads=config.model.num_heads,
        head_channels=config.model.head_channels,
        dropout=config.model.dropout,
        num_groups=config.model.num_groups,
        remat=config.model.remat,
        dtype=jnp.dtype(config.model.dtype),
        num_labels=config.data.num_classes + 1,
        out_channels=config.data.image_channels,
    )


def init_params(config, key):
    """Fresh parameters of the network."""
    arguments = jnp.zeros((1, *image_shape(config))), jnp.zeros((1,)), jnp.zeros((1,), jnp.int32)
    return unet(config).init(key, *arguments)['params']


def loss(config):
    """(params, x [B, H, W, C], labels [B], key) -> `losses.Loss`, the paper's Algorithm 1."""
    module = unet(config)

    def of_params(params, x, labels, key):
        loss_key, dropout_key = jax.random.split(key)

        def network(z, logsnr, labels):
            return module.apply({'params': params}, z, logsnr, labels, train=True, rngs={'dropout': dropout_key})

        return losses.diffusion_loss(
            network,
            x,
            labels,
            loss_key,
            schedule=schedule(config),
            null_label=null_label(config),
            p_uncond=config.loss.p_uncond,
            prediction=config.diffusion.prediction,
            target=config.loss.target,
            low_discrepancy=config.loss.low_discrepancy,
        )

    return of_params


def learning_rate(config):
    """step -> learning rate."""
    return optim.learning_rate(
        config.optim.learning_rate,
        warmup_steps=config.optim.warmup_steps,
        decay=config.optim.decay,
        num_steps=config.train.num_steps,
    )


def optimizer(config):
    """The optax chain."""
    return optim.make_optimizer(
        learning_rate(config),
        name=config.optim.name,
        b1=config.optim.b1,
        b2=config.optim.b2,
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
        clip_norm=config.optim.clip_norm,
    )


def guidance_function(config):
    """The function config.guidance.function names: of cfg_jax.guidance, or 'module:function' of the user's own.

    It has the signature of `guidance.classifier_free`.
    """
    name = config.guidance.function
    module_name, _, function_name = name.rpartition(':')
    try:
        module = importlib.import_module(module_name) if module_name else guidance
        return getattr(module, function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"config.guidance.function is {name!r}; allowed: 'classifier_free' or 'module:function' ({error})."
        ) from None


def model(config, params):
    """The trained network as guidance sees it: (z, λ, labels) -> Prediction."""
    module = unet(config)

    def predict(z, logsnr, labels):
        output = module.apply({'params': params}, z, logsnr, labels)
        return diffusion.Prediction(diffusion.network_eps(output, z, logsnr, config.diffusion.prediction))

    return predict


def sampler(config):
    """(params, seed, image indices [B], labels [B], weight) -> x [B, H, W, C] in [-1, 1]; all of them traced."""
    guide = guidance_function(config)

    def sample(params, seed, indices, labels, weight):
        keys = samplers.image_keys(seed, indices)
        z = samplers.step_noise(keys, 0, image_shape(config))
        denoise = guide(model(config, params), labels, weight, null_label=null_label(config))
        logsnrs = schedules.logsnr_grid(schedule(config), config.sample.num_steps)
        if config.sample.sampler == 'ddim':
            return samplers.ddim(denoise, z, logsnrs, keys, eta=config.sample.eta, clip_x=config.sample.clip_x)
        return samplers.ancestral(denoise, z, logsnrs, keys, v=config.sample.v, clip_x=config.sample.clip_x)

    return sample


def judge(config, data):
    """(judge, real images uint8 [N, H, W, C], their labels): the network that config.eval.judge names.

    'digits' is trained here, on all of `data`.
    """
    from cfg_jax.judges import digits

    examples = [data[index] for index in range(len(data))]
    images = np.stack([example['image'] for example in examples])
    labels = np.array([example['label'] for example in examples])
    judge, accuracy = digits.train(images, labels, config.data.num_classes)
    print(f'judge  accuracy {accuracy:.4f} on the fifth of the images held out from it', flush=True)
    return judge, images, labels
