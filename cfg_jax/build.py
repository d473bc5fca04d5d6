"""Building the parts that a config names: data, schedule, network, loss, optimizer, training step.

`build_sampling` builds guidance and samplers.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax import diffusion, distillation, losses, phema, schedules
from cfg_jax.errors import UserError
from cfg_jax.models.classifier import NoisyClassifier
from cfg_jax.models.unet import UNet
from cfg_jax.training import optim, sharding, step
from cfg_jax.training.train_state import TrainState

# ADM's schedules: λ of each of 1000 timesteps
TABLES = {'adm_linear': schedules.linear_beta_logsnr, 'adm_cosine': schedules.iddpm_cosine_logsnr}
# laws of log(sigma / alpha) by which training draws λ: EDM's (table 1), and the logit-normal times of Esser et al. 2024
TIMES = {'edm': {'mean': -1.2, 'std': 1.2}, 'logit_normal': {'mean': 0.0, 'std': 1.0}}


def model_identity(config):
    """Return the part of the config that fixes the meaning of a checkpoint's parameters: a nested dict."""
    plain = config.to_dict()
    data = {key: plain['data'][key] for key in ('image_size', 'image_channels', 'num_classes')}
    computing = ('dropout', 'remat', 'dtype')  # they change how the network is computed and trained, not what it is
    model = {key: value for key, value in plain['model'].items() if key not in computing}
    return {'data': data, 'diffusion': plain['diffusion'], 'model': model}


def run_identity(config):
    """Return the part of the config that may not change when a run is resumed: a nested dict of plain values.

    Free to change are the number of steps, the learning rate, clipping, dropout, precision, the parts that a batch is
    computed in, the data's place, how often snapshots of averages are saved, and how the data is read, logged and
    sampled. The averages themselves are not: one that is begun later is not that of the whole run.
    """
    plain, model = config.to_dict(), model_identity(config)
    data_keys = ('source', 'name', 'split', 'resampling', 'upsample', 'flip', 'random_crop')
    data = {key: plain['data'][key] for key in data_keys}
    # learning_rate and clip_norm are what one changes to rescue a run that diverged
    free = ('learning_rate', 'clip_norm', 'ema_snapshot_every')
    optim = {key: value for key, value in plain['optim'].items() if key not in free}
    # a student learns its teacher's clipped steps
    sample = {'sample': {'clip_x': plain['sample']['clip_x']}} if config.distill.method == 'progressive' else {}
    run = {
        **sample,
        'seed': plain['seed'],
        'loss': plain['loss'],
        'distill': {key: plain['distill'][key] for key in ('method', 'rounds')},
        'optim': optim,
        'train': {'batch_size': plain['train']['batch_size']},
    }
    return {**model, **run, 'data': data | model['data']}


def training_keys(config):
    """Return two keys, of the network's first parameters and of the steps: all randomness in training."""
    return _training_keys(np.uint32(config.seed))


@jax.jit  # one program, not seven
def _training_keys(seed):
    key = jax.random.fold_in(jax.random.key(seed), np.uint32(2**32 - 1))  # differs from every image's
    return tuple(jax.random.split(key))


def image_shape(config):
    """Return (H, W, C)."""
    return (config.data.image_size, config.data.image_size, config.data.image_channels)


def null_label(config):
    """Return the label id of the unconditional model."""
    return config.data.num_classes


def data_name(config):
    """Return the name of the data set for titles and tables."""
    return config.data.name or config.data.data_dir or config.data.source


def source(config):
    """Return the data set, a `data.sources.Source`, checked against the config's image shape and number of classes."""
    data = _open_source(config, config.data.split, config.data.data_dir)
    if len(data.class_names) != config.data.num_classes:
        raise UserError(
            f'the data ({data_name(config)}) has {len(data.class_names)} classes, not {config.data.num_classes} '
            '(config.data.num_classes).'
        )
    return data


def held_out_source(config):
    """Return the images of config.eval.held_out as a `data.sources.Source`, whatever their classes; None if unset."""
    if not config.eval.held_out:
        return None
    split, place = config.data.split, config.data.data_dir
    if config.data.source == 'folder':
        place = config.eval.held_out
    else:
        split = config.eval.held_out
    try:
        return _open_source(config, split, place)
    except UserError as error:
        raise UserError(f'the held-out images (config.eval.held_out): {error}') from None


def _open_source(config, split, place):
    """Return the data set of a split or folder, checked against the config's image shape."""
    from cfg_jax.data import sources  # drawing with a trained model needs no library that reads data

    resampling = {key: config.data[key] for key in ('resampling', 'upsample')}
    if config.data.source == 'mixture':
        raise UserError("config.data.source is 'mixture', which has no images: it is for --mode=laboratory alone.")
    if config.data.source == 'digits':
        data = sources.digits()
    elif config.data.source == 'folder':
        if not place:
            raise UserError('config.data.data_dir is not set; give a folder of images or a zip file of one.')
        data = sources.FolderSource(place, image_shape(config), **resampling)
    else:
        data = sources.TfdsSource(config.data.name, split, place, image_shape(config), **resampling)
    if tuple(data.image_shape) != image_shape(config):
        raise UserError(
            f'the images of {config.data.source!r} are {data.image_shape}, not {image_shape(config)} '
            '(config.data.image_size, config.data.image_channels).'
        )
    if not len(data):
        raise UserError('the data set has no images (config.data.data_dir, config.data.split).')
    return data


def train_batches(config, data, mesh=None):
    """Return the endless iterator over this process's part of the batches: the rows that its devices in `mesh` hold."""
    from cfg_jax.data import pipeline

    return pipeline.train_batches(
        data,
        batch_size=config.train.batch_size,
        seed=config.seed,
        flip=config.data.flip,
        random_crop=config.data.random_crop,
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
        rows=None if mesh is None else sharding.process_rows(config.train.batch_size, mesh),
    )


def table(config):
    """Return λ of every timestep of one of ADM's schedules, float64 [T]; None for the continuous schedule."""
    tabulated = TABLES.get(config.diffusion.schedule)
    return tabulated() if tabulated else None


def schedule(config):
    """Return the function u -> λ."""
    tabulated = table(config)
    if tabulated is not None:
        return schedules.table_logsnr(tabulated)
    return partial(
        schedules.cosine_logsnr, logsnr_min=config.diffusion.logsnr_min, logsnr_max=config.diffusion.logsnr_max
    )


def training_schedule(config):
    """Return the function u -> λ by which training draws λ, of a uniform u."""
    if config.loss.times == 'uniform':
        return schedule(config)
    low, high = logsnr_range(config)
    return partial(schedules.normal_logsnr, **TIMES[config.loss.times], logsnr_min=low, logsnr_max=high)


def network(config):
    """Return the network, a flax module: a `UNet` or a `NoisyClassifier`."""
    tabulated = table(config)
    encoder = {
        'channels': config.model.channels,
        'channel_mult': tuple(config.model.channel_mult),
        'num_blocks': config.model.num_blocks,
        'attention_resolutions': tuple(config.model.attention_resolutions),
        'num_heads': config.model.num_heads,
        'head_channels': config.model.head_channels,
        'dropout': config.model.dropout,
        'num_groups': config.model.num_groups,
        'remat': config.model.remat,
        'dtype': jnp.dtype(config.model.dtype),
        'time_input': schedules.continuous_time_input if tabulated is None else schedules.table_time_input(tabulated),
    }
    if config.model.kind == 'classifier':
        return NoisyClassifier(**encoder, num_classes=config.data.num_classes)
    num_labels = {'null': config.data.num_classes + 1, 'classes': config.data.num_classes, 'none': 0}
    channels = config.data.image_channels * (2 if config.model.learn_variance else 1)
    return UNet(
        **encoder,
        num_labels=num_labels[config.model.labels],
        out_channels=channels,
        guidance_input=config.model.guidance_input,
    )


def init_params(config, key):
    """Return fresh parameters of the network."""
    arguments = [jnp.zeros((1, *image_shape(config))), jnp.zeros((1,))]
    if config.model.kind == 'unet':
        arguments.append(jnp.zeros((1,), jnp.int32))
    return network(config).init(key, *arguments)['params']


def apply_network(config, module):
    """Return the function (params, z, λ, labels, weight, **options) -> the raw output of a UNet.

    z is scaled as config.diffusion.prediction asks. weight: as the module takes it. options: the module's, and
    network_logsnr [B], the λ that the network is given in place of its own.
    """
    parameters = config.diffusion.prediction, config.diffusion.sigma_data

    def apply(params, z, logsnr, labels, weight=None, *, network_logsnr=None, **options):
        z = diffusion.network_input(z, logsnr, *parameters)
        seen = logsnr if network_logsnr is None else network_logsnr
        return module.apply({'params': params}, z, seen, labels, weight, **options)

    return apply


def loss_weighting(config):
    """Return the function (λ, rate) -> log of the weight of the error on eps; None for no weight."""
    if not config.loss.weighting:
        return None
    return partial(
        losses.WEIGHTINGS[config.loss.weighting],
        gamma=config.loss.min_snr_gamma,
        sigma_data=config.diffusion.sigma_data,
        bias=config.loss.sigmoid_bias,
    )


def loss(config):
    """Return the function (params, x [B, H, W, C], labels [B], key) -> `losses.Loss`.

    It is the paper's Algorithm 1; with a learned variance, Improved DDPM's hybrid loss; for a classifier, the
    cross-entropy.
    """
    module = network(config)

    def of_params(params, x, labels, key):
        loss_key, dropout_key = jax.random.split(key)
        training = {'train': True, 'rngs': {'dropout': dropout_key}}
        spread = {'low_discrepancy': config.loss.low_discrepancy}
        if config.model.kind == 'classifier':
            apply = partial(module.apply, {'params': params}, **training)
            return losses.classifier_loss(apply, x, labels, loss_key, schedule=schedule(config), **spread)
        apply = partial(apply_network(config, module), params, **training)
        dropping = {'null_label': null_label(config), 'p_uncond': config.loss.p_uncond}
        if config.model.learn_variance:
            return losses.hybrid_loss(apply, x, labels, loss_key, logsnrs=table(config), **dropping, **spread)
        if config.loss.guided:
            frozen, (loss_key, weight_key) = partial(apply_network(config, module), params), jax.random.split(loss_key)
            guided = {'null_label': null_label(config), 'weight_max': config.model.guidance_max}
            apply = losses.guidance_free(apply, frozen, weight_key, **guided)
        return losses.diffusion_loss(
            apply,
            x,
            labels,
            loss_key,
            schedule=training_schedule(config),
            prediction=config.diffusion.prediction,
            target=config.loss.target,
            sigma_data=config.diffusion.sigma_data,
            weighting=loss_weighting(config),
            low_discrepancy=config.loss.low_discrepancy,
            **dropping,
        )

    return of_params


# ---------------------------------------------------------------- distillation


def teacher_network(config):
    """Return the network of the teacher: the student's own, but without the weight if it learns to take it."""
    guided = config.distill.method == 'guided'
    return network(config).clone(guidance_input=config.model.guidance_input and not guided, dropout=0.0)


def round_starts(config):
    """Return the training steps at which rounds of progressive distillation begin: [0, ...]; [0] without rounds."""
    return [0, *round_ends(config)[:-1]]


def round_ends(config):
    """Return the training steps after which rounds of progressive distillation have made their students; [] without."""
    return np.cumsum([length for _, length in config.distill.rounds], dtype=int).tolist()


def kept_steps(config):
    """Return the steps whose checkpoints are there when training has ended: a sorted list."""
    train, ends = config.train, {*round_ends(config), config.train.num_steps}
    saved = sorted({*range(train.checkpoint_every, train.num_steps + 1, train.checkpoint_every), *ends})
    regular = {step for step in saved if train.keep_every and step % train.keep_every == 0}
    return sorted({*saved[-train.keep_checkpoints :], *regular, *ends})


def snapshot_steps(config):
    """Return the steps after which snapshots of the averages are saved: a sorted list, [] if the run keeps none."""
    every, last = config.optim.ema_snapshot_every, config.train.num_steps
    return sorted({*range(every, last, every), last}) if config.optim.ema_lengths else []


def student_steps(config, step):
    """Return how many sampling steps the student is made for after `step` training steps; None for any other model."""
    begun = [steps for start, (steps, _) in zip(round_starts(config), config.distill.rounds) if start < max(step, 1)]
    return begun[-1] if begun else None


def student_step(config, num_steps, name='config.sample.num_steps'):
    """Return the training step at which the round of students of `num_steps` ends; None without rounds.

    Raises UserError if no round has students of so many steps. name: what errors call the number.
    """
    if not config.distill.rounds:
        return None
    of_steps = {steps: end for (steps, _), end in zip(config.distill.rounds, round_ends(config))}
    if num_steps not in of_steps:
        raise UserError(
            f'{name} is {num_steps}; there are students of {", ".join(map(str, of_steps))} steps '
            '(config.distill.rounds).'
        )
    return of_steps[num_steps]


def distillation_loss(config):
    """Return the function (params, x [B, H, W, C], labels [B], key, teacher_params, step) -> `losses.Loss`."""
    student, teacher = (apply_network(config, module) for module in (network(config), teacher_network(config)))
    weight_max = config.model.guidance_max if config.model.guidance_input else 0.0
    starts = jnp.array(round_starts(config)[1:], jnp.int32)
    common = {
        'schedule': training_schedule(config),
        'weight_max': weight_max,
        'prediction': config.diffusion.prediction,
        'target': config.loss.target,
        'sigma_data': config.diffusion.sigma_data,
        'weighting': loss_weighting(config),
        'low_discrepancy': config.loss.low_discrepancy,
    }

    def of_params(params, x, labels, key, teacher_params, step):
        loss_key, dropout_key = jax.random.split(key)
        apply = partial(student, params, train=True, rngs={'dropout': dropout_key})
        teach = partial(teacher, teacher_params)
        if config.distill.method == 'guided':
            return distillation.guided_loss(apply, teach, x, labels, loss_key, null_label=null_label(config), **common)
        number = jnp.array([steps for steps, _ in config.distill.rounds])[jnp.searchsorted(starts, step, side='right')]
        clip_x = config.sample.clip_x
        return distillation.progressive_loss(
            apply, teach, x, labels, loss_key, num_steps=number, clip_x=clip_x, **common
        )

    return of_params


def learning_rate(config):
    """Return the function step -> learning rate; each round of distillation has the whole curve."""

    def curve(num_steps):
        return optim.learning_rate(
            config.optim.learning_rate,
            warmup_steps=config.optim.warmup_steps,
            decay=config.optim.decay,
            num_steps=num_steps,
        )

    lengths = [length for _, length in config.distill.rounds]
    return optim.by_rounds(list(map(curve, lengths)), lengths) if lengths else curve(config.train.num_steps)


def moved_learning_rate(config, saved, step):
    """Return a line that says how another config.train.num_steps moves the learning rate at `step`; '' if it does not.

    saved: the config of the checkpoint that is resumed, a nested dict.
    """
    now, before = config.train.num_steps, saved['train']['num_steps']
    if config.optim.decay == 'constant' or now == before or step >= now:
        return ''
    old = optim.learning_rate(
        **{key: saved['optim'][key] for key in ('warmup_steps', 'decay')},
        peak=saved['optim']['learning_rate'],
        num_steps=before,
    )
    return (
        f'changed since: config.train.num_steps is {now:,} now and was {before:,} when saved: '
        f'config.optim.decay={config.optim.decay!r} now means the curve that ends at step {now:,}, so the learning '
        f'rate is {float(learning_rate(config)(step)):.3g} after step {step:,}, where it was {float(old(step)):.3g}'
    )


def optimizer(config):
    """Return the optimizer, an optax chain."""
    return optim.make_optimizer(
        learning_rate(config),
        name=config.optim.name,
        b1=config.optim.b1,
        b2=config.optim.b2,
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
        clip_norm=config.optim.clip_norm,
    )


def ema_gammas(config):
    """Return {name: exponent} of the averages of config.optim.ema_lengths, such as {'0.05': 16.97}."""
    return {f'{length:g}': float(phema.gamma(length)) for length in config.optim.ema_lengths}


def quarter_edges(config):
    """Return λ at u = 1, 3/4, 1/2, 1/4, 0: [5], increasing. Training draws the four quarters equally often."""
    return jax.jit(training_schedule(config))(np.array([1.0, 0.75, 0.5, 0.25, 0.0], np.float32))


def train_step(config, mesh=None):
    """Return the training step, as `training.step.make_train_step` gives it. mesh: needed if config.train.fsdp."""
    loss_of_x = distillation_loss(config) if config.distill.method else loss(config)

    def loss_of_images(params, images, *arguments):
        return loss_of_x(params, diffusion.to_unit_range(images), *arguments)

    return step.make_train_step(
        loss_of_images,
        optimizer(config),
        learning_rate=learning_rate(config),
        ema_decay=config.optim.ema_decay,
        ema_gammas=ema_gammas(config),
        quarter_edges=quarter_edges(config),
        accumulation_steps=config.train.accumulation_steps,
        split_over=mesh if config.train.fsdp else None,
    )


def first_state(config, params):
    """Return the `TrainState` before the first step; in distillation with room for the teacher's parameters."""
    state = TrainState.create(params, optimizer(config), ema_gammas(config))
    if not config.distill.method:
        return state
    learned = ('weight_in', 'weight_out') if config.distill.method == 'guided' else ()
    teacher_params = {name: tree for name, tree in params.items() if name not in learned}
    return state.replace(teacher_params=jax.tree.map(jnp.copy, teacher_params))


def sharded_training(config, mesh):
    """Return (init, abstract state, training step), jitted for `mesh`, as `training.step.sharded` gives them."""
    init_key, _ = training_keys(config)

    def init():
        return first_state(config, init_params(config, init_key))

    return step.sharded(init, train_step(config, mesh), mesh, fsdp=config.train.fsdp)


def distillation_start(config, abstract_state):
    """Return the jitted function (state, teacher_params) -> the state in which a round of distillation begins.

    abstract_state: with the shardings of its result. The teacher's parameters become the student's and their average's;
    those that only the student has stay.
    """

    def start(state, teacher_params):
        params = {**state.params, **teacher_params}
        opt_state = optim.restarted(optimizer(config), state.opt_state, params)
        copies = [jax.tree.map(jnp.copy, tree) for tree in (params, teacher_params)]
        return state.replace(params=params, ema_params=copies[0], opt_state=opt_state, teacher_params=copies[1])

    return jax.jit(start, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract_state))


def logsnr_range(config):
    """Return (λ_min, λ_max) of the schedule."""
    tabulated = table(config)
    if tabulated is None:
        return config.diffusion.logsnr_min, config.diffusion.logsnr_max
    return float(tabulated[-1]), float(tabulated[0])


def attention_sizes(config):
    """Return the image sizes at which the network has attention: those that the config names, and the lowest."""
    lowest = config.data.image_size // 2 ** (len(config.model.channel_mult) - 1)
    return tuple(sorted({*config.model.attention_resolutions, lowest}, reverse=True))


def model(config, params):
    """Return the trained network as guidance sees it: (z, λ, labels) -> Prediction.

    Keywords: network_logsnr [B], λ that the network is told in place of its own; identity_attention [B], bool, the
    images whose attention is the identity, at config.guidance.attention_resolutions (all by default); weight [B], the
    guidance weight that the network takes, with config.model.guidance_input.
    """
    apply = apply_network(config, network(config))
    prediction, sigma_data = config.diffusion.prediction, config.diffusion.sigma_data
    resolutions = tuple(config.guidance.attention_resolutions) or attention_sizes(config)

    def predict(z, logsnr, labels, *, network_logsnr=None, identity_attention=None, weight=None):
        options = {}
        if identity_attention is not None:
            options = {'identity_attention': identity_attention, 'identity_resolutions': resolutions}
        output, v = apply(params, z, logsnr, labels, weight, network_logsnr=network_logsnr, **options), None
        if config.model.learn_variance:
            output, v = diffusion.split_variance(output)
        return diffusion.Prediction(diffusion.network_eps(output, z, logsnr, prediction, sigma_data), v)

    return predict


def log_prob(config, params):
    """Return a trained noisy classifier as guidance sees it: (z, λ, labels) -> log p(label | z, λ), [B]."""
    module = network(config)

    def predict(z, logsnr, labels):
        return losses.label_log_prob(module.apply({'params': params}, z, logsnr), labels)

    return predict
