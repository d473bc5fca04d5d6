"""All configuration keys, each declared once. Files in configs/ call `default()` and override what differs.

Override from the command line with --config.section.key=value.
"""

from copy import deepcopy
from itertools import accumulate

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from cfg_jax.errors import UserError
from cfg_jax.training.meta import newest_config


def default():
    """Return the default config: the paper's method, with sizes that an experiment has to choose."""
    config = ConfigDict()
    config.seed = 0  # for parameters, data order and training noise

    config.data = data = ConfigDict()
    # 'digits' (scikit-learn's) | 'tfds' | 'folder' (a folder of images or a zip file of one) | 'mixture' (of Gaussians,
    # for --mode=laboratory alone)
    data.source = 'digits'
    data.name = ''  # tfds: such as 'imagenet_resized/64x64'; '' if data_dir is the data set's own folder
    data.split = 'train'  # tfds
    data.data_dir = placeholder(
        str
    )  # tfds: the folder of data sets, ~/tensorflow_datasets if unset. folder: the folder
    data.image_size = 8  # pixels per side
    data.image_channels = 1
    data.num_classes = 10  # labels are 0 .. num_classes - 1; the null label is num_classes
    data.resampling = 'box'  # folder and --mode=prepare, to image_size: 'box' | 'adm' | 'center_crop'
    data.upsample = False  # folder and --mode=prepare: enlarge images smaller than image_size instead of refusing them
    data.flip = False  # mirror images at random
    data.random_crop = False  # take a random square of 0.8 to 1 times the image's side, resized: for classifiers
    data.num_threads = 0  # reading threads per process; 0 reads between steps
    data.num_workers = 0  # reading processes, each with num_threads threads

    config.diffusion = diffusion = ConfigDict()
    diffusion.schedule = 'cosine'  # 'cosine' (continuous time) | ADM's tables of 1000 steps: 'adm_linear', 'adm_cosine'
    diffusion.logsnr_min = -20.0  # cosine: λ at u = 1 (noise)
    diffusion.logsnr_max = 20.0  # cosine: λ at u = 0 (data)
    diffusion.prediction = 'eps'  # the network's output: 'eps' | 'x' | 'v' | 'edm' (EDM's F, of an input scaled to 1)
    diffusion.sigma_data = 0.5  # EDM's standard deviation of the data, for its prediction and its weighting

    config.model = model = ConfigDict()
    model.kind = 'unet'  # 'unet' | 'classifier' (of noisy images: the UNet's encoder and an attention pool)
    model.labels = 'null'  # unet: 'null' (the classes and a null label) | 'classes' (no null label) | 'none'
    model.learn_variance = False  # unet: output the variance in extra channels; needs one of ADM's tables
    # unet: the network takes the guidance weight w and predicts what guidance would: one forward per step. It is
    # trained by distillation (config.distill) or by loss.guided
    model.guidance_input = False
    model.guidance_max = 4.0  # guidance_input: largest w of training, and of drawing; the least is 0
    model.channels = 64  # width of the first level
    model.channel_mult = (1, 2)  # width of each level, in units of `channels`; each level halves the image
    model.num_blocks = 1  # residual blocks per level
    model.attention_resolutions = ()  # image sizes (pixels) with attention
    model.num_heads = 1  # heads of each attention, unless head_channels is set
    model.head_channels = placeholder(int)  # width of a head
    model.num_groups = 32  # groups of every group norm
    model.dropout = 0.0
    model.remat = False  # recompute activations in the backward pass: less memory, a third more FLOPs
    model.dtype = 'float32'  # for computing: 'float32' | 'bfloat16'; parameters are always float32

    config.loss = loss = ConfigDict()
    loss.p_uncond = 0.1  # probability that a label is replaced by the null label; 0 unless model.labels is 'null'
    loss.target = 'eps'  # the squared error is measured on 'eps' (the paper) | 'x' | 'v', for any prediction
    # 'gft': a network that takes w (model.guidance_input) learns the guided prediction from the data (Chen et al. 2025)
    loss.guided = ''
    # a weight of that error on eps: '' (none: the target's own) | 'min_snr' | 'truncated_snr' | 'edm' | 'sigmoid'
    loss.weighting = ''
    loss.min_snr_gamma = 5.0  # min_snr: the weight on x is min(SNR, this)
    loss.sigmoid_bias = 2.0  # sigmoid: b of sigmoid(b - λ), as in Kingma & Gao; lower for large images (SiD2)
    loss.times = 'uniform'  # λ drawn: 'uniform' (the schedule of a uniform u) | 'edm' | 'logit_normal' (both normal)
    loss.low_discrepancy = False  # draw the u of a batch evenly spread, not independently

    config.optim = optim = ConfigDict()
    optim.name = 'adam'  # 'adam' | 'adamw'
    optim.learning_rate = 1e-4  # the peak, after warm-up
    optim.warmup_steps = 0  # steps of linear warm-up
    optim.decay = (
        'constant'  # | 'cosine', 'linear' (to 0 at train.num_steps: a resumed run with another moves to that curve)
    )
    optim.b1 = 0.9
    optim.b2 = 0.999
    optim.eps = 1e-8
    optim.weight_decay = 0.0  # adamw
    optim.clip_norm = 1.0  # largest norm of the gradient; 0: no clipping
    optim.ema_decay = 0.9999
    optim.ema_lengths = ()  # post-hoc EMA: sigma_rel of averages to keep besides, such as (0.05, 0.1); (): none
    optim.ema_snapshot_every = 0  # steps between snapshots of them, which give an average of any length afterwards

    config.distill = distill = ConfigDict()
    # 'guided' (Meng et al. 2023: a student that takes w learns the teacher guided by w) | 'progressive' (Salimans & Ho
    # 2022: a student learns two of its teacher's DDIM steps as one, round by round) | '' (no distillation)
    distill.method = ''
    distill.teacher = ''  # workdir of the teacher: the student begins with its parameters, their average
    # progressive: (steps of the student, training steps) of each round, such as ((16, 500), (8, 500)); the first round
    # learns from the teacher in twice the steps. train.num_steps is the sum of the training steps
    distill.rounds = ()

    config.train = train = ConfigDict()
    train.batch_size = 64  # images per update, over all devices
    train.accumulation_steps = (
        1  # compute a batch in so many parts, one after the other: less memory; may change on resume
    )
    train.fsdp = False  # split parameters, EMA and optimizer state over the devices, instead of a copy on each
    train.num_steps = 1000  # updates
    train.log_every = 100  # steps
    train.checkpoint_every = 1000  # steps; also at the end
    train.keep_checkpoints = 2
    train.keep_every = 0  # keep those of a multiple of so many steps too, as weak models; 0: none
    train.grid_every = 1000  # steps between sample grids; 0: none
    train.grid_images = 100  # images per grid

    config.guidance = guidance = ConfigDict()
    # 'classifier_free' | 'conditional' | 'unconditional' | 'learned' (the network takes w: model.guidance_input)
    # | 'my_module:my_function'
    guidance.function = 'classifier_free'
    # what to move away from: 'null' (the null label) | 'checkpoint' (a weaker model) | 'random_label' | 'time' (a wrong
    # λ) | 'attention' (maps that are the identity); '' is 'null' for classifier_free and nothing for the others
    guidance.weak = ''
    guidance.weak_workdir = ''  # checkpoint: the weak model's workdir; '' is the model's own, with another step or EMA
    guidance.weak_step = placeholder(int)  # checkpoint: its training step; the newest if unset
    # checkpoint: True (its EMA) | False (its parameters themselves) | sigma_rel of an EMA made of its snapshots
    guidance.weak_ema = FieldReference(True, field_type=object)
    guidance.weak_conditional = True  # checkpoint: with the labels; else with the null label
    guidance.time_scale = 1.0  # time: standard deviation of the noise in λ
    guidance.attention_resolutions = ()  # attention: image sizes (pixels) at which maps are the identity; (): all
    # how the difference is used: 'linear' (the paper) | 'rescale' | 'apg' | 'zero_star' | 'tangential'
    # | 'dynamic_threshold' | 'cfgpp' | 'my_module:my_function'
    guidance.rule = 'linear'
    guidance.rescale_factor = 0.7  # rescale: part of the result that gets the conditional's standard deviation
    guidance.apg_norm_threshold = 0.0  # apg: largest L2 norm of the difference in x; 0: no limit
    guidance.apg_eta = 0.0  # apg: factor of the difference's part along x
    guidance.dynamic_percentile = 99.5  # dynamic_threshold: of |x|, from which x is clipped and divided by it
    guidance.momentum = 0.0  # of a running sum of the differences over the calls of the network; APG uses -0.5
    guidance.interval = ()  # (λ_low, λ_high) in which guidance acts; () is everywhere
    guidance.schedule = 'constant'  # w over u, from noise to data: | 'linear' | 'cosine' | 'power' | 'module:function'
    guidance.schedule_power = 2.0  # power: w (p + 1) (1 - u)^p; the mean over u is w for every schedule
    guidance.classifier_workdir = ''  # workdir of a trained classifier, to guide with its gradient too
    guidance.classifier_weight = 0.0  # factor of that gradient
    guidance.clip_first = False  # clip the predicted x before the classifier's gradient moves it (ADM), not after
    guidance.classifier_form = 'eps'  # 'eps' (ADM's Algorithm 2) | 'mean' (its Algorithm 1; ancestral only)

    config.sample = sample = ConfigDict()
    sample.sampler = 'ancestral'  # | 'ddim' | 'dpmpp_2m' | 'dpmpp_2m_sde' | 'unipc_2' | 'heun' (two calls a step)
    sample.num_steps = 256  # T, steps per image; classifier-free guidance evaluates the network twice per step
    sample.spacing = ''  # ADM's tables: 'ddim25' or '10,15,20', instead of num_steps evenly spaced timesteps
    # the steps: 'u' (the schedule's time, evenly, both ends) | 'u_open' (without the last, which adds little: as
    # progressive distillation needs it) | 'logsnr' (λ, evenly) | 'karras' (EDM's)
    sample.grid = 'u'
    sample.logsnr_min = placeholder(float)  # logsnr and karras: λ of the first step, the schedule's or EDM's if unset
    sample.logsnr_max = placeholder(float)  # logsnr and karras: λ of the last step
    sample.rho = 7.0  # karras: its exponent
    sample.lower_order_final = (
        True  # dpmpp_2m, its sde, unipc_2: take the last step, which is long on 'u', with order 1
    )
    sample.v = 0.3  # ancestral, unless the variance is learned: (σ~²)^(1-v) (σ²_{t|s})^v (CFG paper, eq. 4)
    sample.eta = 0.0  # ddim: 0 is deterministic, 1 adds the posterior's variance
    sample.churn = 0.0  # heun: EDM's S_churn, noise added before steps
    sample.churn_interval = ()  # heun: (λ_low, λ_high) of the steps that get it; () is all
    sample.churn_noise = 1.0  # heun: EDM's S_noise
    sample.clip_x = True  # clip the predicted x to [-1, 1]
    sample.clip_percentile = 0.0  # with clip_x: first divide x by this percentile of |x| (Imagen: 99.5); 0: do not
    sample.guidance_weight = placeholder(float)  # the paper's w; 0 (also if unset) is no guidance
    sample.guidance_scale = placeholder(float)  # 1 + w, instead of guidance_weight
    sample.labels = ''  # ids ('0,1,2') or names ('cat,dog'; 'id:2', 'name:2' where 2 is both); '' is all classes
    sample.label_order = 'balanced'  # 'balanced' (in turn) | 'random'
    sample.num_images = 100
    sample.batch_size = 100  # images that a device draws at once, at most; no more than are asked for
    sample.shard_images = 1000  # images per file while they are drawn
    sample.npz = True  # also write all images as one .npz, which ADM's evaluator reads
    sample.seed = 0

    config.eval = evaluate = ConfigDict()
    evaluate.at_end = False  # training ends with --mode=sample and --mode=evaluate
    evaluate.folder = ''  # folder of the workdir for the results; '' is the workdir itself
    evaluate.judge = ''  # network of the features: 'inception' | 'dinov2' | 'lite0' | 'trained'; or 'trained,lite0'
    evaluate.judge_steps = 2000  # trained: training steps of the judge
    evaluate.inception_weights = ''  # inception: path of weights-inception-2015-12-05-6726825d.pth
    evaluate.dinov2_weights = ''  # dinov2: path of dinov2_vitl14_pretrain.pth
    evaluate.samples = ''  # judge an .npz (arr_0 uint8 NHWC, arr_1 labels) or a folder of images, instead of a model
    evaluate.reference = ''  # .npz of statistics (made here or by ADM); '': computed from the data set
    evaluate.reference_images = 50_000  # images of the data set for that, evenly spread; 0: all (16 kB of memory each)
    evaluate.held_out = ''  # images that training has not seen, a split or a folder: memorisation is measured
    evaluate.guidance_weights = (0.0, 0.1, 0.3, 0.5, 1.0, 2.0, 4.0)
    evaluate.steps = ()  # one curve per checkpoint of these training steps; (): the newest
    # one curve for each: True (the average of the parameters) | False (the parameters) | sigma_rel of an average that
    # is made of the snapshots of training (config.optim.ema_lengths), such as 0.05
    evaluate.ema = (True,)
    evaluate.weak_ema = ()  # one curve for each such guidance.weak_ema; (): config.guidance.weak_ema
    evaluate.intervals = ()  # one curve per guidance.interval, such as ((), (-1.0, 3.3)); (): config.guidance.interval
    evaluate.samplers = ()  # one curve per sampler; (): config.sample.sampler
    evaluate.num_steps = ()  # one curve per number of steps; (): config.sample.num_steps
    evaluate.variants = ''  # a file such as configs/variants/guidance.py: one curve per variant in it, and a ranking
    evaluate.search = False  # look for each curve's weight (and interval) of least FID, instead of judging all weights
    evaluate.search_samples = 500  # search: images at each point that it tries; num_samples confirm the best
    evaluate.search_rounds = 2  # search: how often the steps around the best point are halved
    evaluate.search_intervals = ()  # search: guidance.interval too, from ((low, high), ...); (): the curve's own
    evaluate.classifier_weights = ()  # sweep over these instead, at the guidance weight of config.sample
    evaluate.compare_with = ''  # another results folder of the workdir: draw both curves in comparison.png
    evaluate.bits_per_dim = (
        False  # bound the data's likelihood under the model, instead of sampling; without a classifier's part
    )
    evaluate.bound_weights = (0.0,)  # bits_per_dim: guidance weights, the first of which the others are compared with
    evaluate.bound_evaluations = 100  # bits_per_dim: network evaluations per image (ADM's tables: sample.num_steps)
    evaluate.bound_logsnr_max = 13.3  # bits_per_dim: λ at which 8-bit values are read off; at most diffusion.logsnr_max
    evaluate.num_samples = 1000  # images per weight, balanced over the classes
    evaluate.allow_few_samples = False  # allow FID with no more samples than the judge has features: it means little
    evaluate.keep_samples = True  # keep the images that this job draws, so that they can be judged again
    evaluate.split_images = 5000  # images in each part that the Inception score is the mean over
    evaluate.nearest_k = 3  # neighbours that set the radius in precision and recall
    evaluate.coverage_k = 5  # neighbours that set the radius in density and coverage

    config.prepare = prepare = ConfigDict()
    prepare.path = (
        ''  # --mode=prepare: a folder or zip of images, or the files of MNIST, CIFAR-10 or ImageNet; see docs/data.md
    )
    prepare.splits = ()  # splits of the archive to prepare, one after the other; (): config.data.split
    prepare.num_workers = 0  # processes; 0: one per core
    prepare.num_shards = 0  # files; 0: one per 10,000 images, up to 16 for small data sets

    config.inspect = inspect = ConfigDict()
    inspect.num_images = 10_000  # --mode=inspect: images decoded for the statistics of pixels, spread over the data set
    inspect.seconds = 10.0  # --mode=inspect: for how long the pipeline's speed is measured

    config.plan = plan = ConfigDict()
    plan.topology = ''  # --mode=plan: '' (this machine's devices) or a TPU slice such as 'v5e:4x4' or 'v4:2x2x4'
    plan.compile = True  # compile the training step for it, besides estimating
    plan.utilisation = 0.4  # fraction of the peak FLOP/s that training is assumed to reach
    plan.price = 0.0  # price of one device for an hour, in any currency, for the cost; 0: not known

    config.laboratory = laboratory = ConfigDict()  # --mode=laboratory, for data.source='mixture'
    laboratory.radius = 1.0  # distance of the classes' means from the origin
    laboratory.std = 0.5  # standard deviation of each class, in every direction
    laboratory.weights = (0.0, 0.5, 1.0, 2.0, 4.0)  # guidance weights w, increasing
    laboratory.num_samples = 5000  # samples drawn with guidance, per weight and sampler
    laboratory.target_samples = 200_000  # weighted samples that stand for the guided target, per weight
    laboratory.train_steps = 2000  # steps of training of the denoiser, and of the classifier
    laboratory.batch_size = 256  # samples per step
    laboratory.width = 128  # of the three hidden layers of both

    config.convert = convert = ConfigDict()
    convert.path = ''  # --mode=convert: a .pt file of OpenAI's or a .safetensors file, made a checkpoint of the workdir
    convert.to = ''  # --mode=convert: the .safetensors file to write the workdir's EMA parameters to
    convert.new_attention_order = False  # for a .pt file: True for ADM's 64x64 diffusion model, and only for it
    return config


def get_config(workdir):
    """Return the config in the newest checkpoint of `workdir`, with defaults for fields that are newer.

    So this file is a config file too: --config=cfg_jax/config.py:WORKDIR is what a --workdir without --config means.
    """
    saved = newest_config(workdir)
    if saved is None:
        raise UserError(f'no checkpoint in {workdir}, so there is no config; give one with --config.')
    return of_saved(saved)


def of_saved(saved):
    """Return the config that a checkpoint holds as a nested dict, with defaults for fields that are newer."""
    config = default()
    config.update(saved)
    if config.eval.judge == 'digits':  # the name of 'trained' in older checkpoints
        config.eval.judge = 'trained'
    return config


def needs_much_memory(config):
    """Return True if activations of a training step take some hundred megabytes or more.

    Counted in feature maps of the first level, float32: the digits' has 0.3 MB, and their step 25 MB; a network of 8M
    parameters on 16 images of 32x32 has 4 MB, and 800 MB.
    """
    return 4 * config.train.batch_size * config.data.image_size**2 * config.model.channels > 2**20


def changed(config, changes):
    """Return a copy of the config with {'section.key': value} in it."""
    copy = deepcopy(config)
    with copy.unlocked():
        copy.update_from_flattened_dict(changes)
    return copy


def imagenet(size, resampling='box'):
    """Return the default config with what all ImageNet experiments share, at `size` pixels per side.

    Each resampling has a data set of its own name, since the images differ: 'box' is the CFG paper's (at 64 pixels
    published by TFDS), 'adm' ADM's.
    """
    config = default()
    config.data.source = 'tfds'
    config.data.name = f'imagenet{size}_adm' if resampling == 'adm' else f'imagenet{size}'
    if size == 64 and resampling == 'box':
        config.data.name = 'imagenet_resized/64x64'
    config.data.resampling = resampling
    config.data.image_size = size
    config.data.image_channels = 3
    config.data.num_classes = 1000
    config.data.flip = True
    config.data.num_threads = 16

    config.model.attention_resolutions = (32, 16, 8)
    config.model.dtype = 'bfloat16'
    config.optim.ema_decay = 0.9999
    config.train.checkpoint_every = 10_000
    config.train.grid_every = 20_000
    config.eval.num_samples = 50_000
    return config


def adm(size):
    """Return what ADM's diffusion models share: learned variances, no null label, 250 steps, classifier guidance."""
    config = imagenet(size, 'adm')
    config.diffusion.schedule = 'adm_cosine' if size == 64 else 'adm_linear'
    config.model.labels = 'classes'
    config.model.learn_variance = True
    config.loss.p_uncond = 0.0
    config.optim.name = 'adamw'
    config.optim.clip_norm = 0.0
    config.guidance.function = 'conditional'
    config.guidance.clip_first = True
    config.sample.num_steps = 250
    config.sample.num_images = 16
    config.sample.batch_size = 16
    config.eval.guidance_weights = (0.0,)
    return config


def adm_classifier(size):
    """Return what ADM's noisy classifiers share."""
    config = imagenet(size, 'adm')
    config.data.random_crop = True
    config.diffusion.schedule = 'adm_cosine' if size == 64 else 'adm_linear'
    config.model.kind = 'classifier'
    config.model.channels = 128
    config.model.head_channels = 64
    config.optim.name = 'adamw'
    config.optim.clip_norm = 0.0
    config.optim.ema_decay = 0.0  # ADM guides with the parameters themselves, not with their average
    return config


def progressive(rounds):
    """Return {'section.key': value}, which turn the config of a teacher into that of its progressive students.

    rounds: config.distill.rounds.
    """
    return {
        'distill.method': 'progressive',
        'distill.rounds': rounds,
        'loss.target': 'eps',
        'loss.weighting': 'truncated_snr',
        'optim.learning_rate': 1e-3,
        'optim.decay': 'linear',
        'optim.warmup_steps': 0,
        'train.num_steps': sum(steps for _, steps in rounds),
        'sample.sampler': 'ddim',
        'sample.grid': 'u_open',
        'sample.logsnr_min': None,
        'sample.logsnr_max': None,
        'sample.num_steps': rounds[-1][0],
        'eval.steps': tuple(accumulate(steps for _, steps in rounds)),
        'eval.guidance_weights': (0.0, 0.3, 1.0),
    }
