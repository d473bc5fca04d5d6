"""Every configuration key, declared once. Files in configs/ call `default()` and override what differs.

Override from the command line with --config.section.key=value.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def default():
    """The default config: the paper's method, with sizes that an experiment has to choose."""
    config = ConfigDict()
    config.seed = 0  # parameters, data order, training noise

    config.data = data = ConfigDict()
    data.source = 'digits'  # 'digits' (scikit-learn's) | 'tfds' | 'folder' (of images, or a zip file of one)
    data.name = ''  # tfds: its name, such as 'imagenet_resized/64x64'; '' where data_dir is the data set's own folder
    data.split = 'train'  # tfds
    data.data_dir = placeholder(str)  # tfds: where data sets lie; unset: ~/tensorflow_datasets. folder: the folder
    data.image_size = 8  # pixels a side
    data.image_channels = 1
    data.num_classes = 10  # labels are 0 .. num_classes - 1; the null label is num_classes
    data.resampling = 'box'  # folder and --mode=prepare, to image_size: 'box' | 'adm' | 'center_crop'
    data.upsample = False  # folder and --mode=prepare: enlarge images smaller than image_size instead of refusing them
    data.flip = False  # mirror images at random
    data.random_crop = False  # a random square of 0.8 to 1 times the image's side, resized: for classifiers
    data.num_threads = 0  # reading threads a process; 0 reads between steps
    data.num_workers = 0  # reading processes, each with num_threads

    config.diffusion = diffusion = ConfigDict()
    diffusion.schedule = 'cosine'  # 'cosine' (continuous) | ADM's tables of 1000 steps: 'adm_linear', 'adm_cosine'
    diffusion.logsnr_min = -20.0  # cosine: λ at u = 1, noise
    diffusion.logsnr_max = 20.0  # cosine: λ at u = 0, data
    diffusion.prediction = 'eps'  # what the network outputs: 'eps' | 'x' | 'v'

    config.model = model = ConfigDict()
    model.kind = 'unet'  # 'unet' | 'classifier' (its encoder under an attention pool, for noisy images)
    model.labels = 'null'  # unet: 'null' (the classes and a null label) | 'classes' (no null label) | 'none'
    model.learn_variance = False  # unet: as many channels again for the variance; needs one of ADM's tables
    model.channels = 64  # width of the first level
    model.channel_mult = (1, 2)  # width of each level, in units of `channels`; each level halves the image
    model.num_blocks = 1  # residual blocks a level
    model.attention_resolutions = ()  # image sizes (pixels) with attention
    model.num_heads = 1  # of each attention, unless head_channels says how wide a head is
    model.head_channels = placeholder(int)
    model.num_groups = 32  # of every group norm
    model.dropout = 0.0
    model.remat = False  # recompute activations in the backward pass: less memory, a third more FLOPs
    model.dtype = 'float32'  # compute: 'float32' | 'bfloat16'; parameters are float32

    config.loss = loss = ConfigDict()
    loss.p_uncond = 0.1  # probability that a label is dropped to the null label; 0 unless model.labels is 'null'
    loss.target = 'eps'  # the squared error is on 'eps' (the paper's) | 'x' | 'v', whatever the network predicts
    loss.low_discrepancy = False  # u of a batch spread evenly instead of independently

    config.optim = optim = ConfigDict()
    optim.name = 'adam'  # 'adam' | 'adamw'
    optim.learning_rate = 1e-4  # peak
    optim.warmup_steps = 0  # linear
    optim.decay = 'constant'  # 'constant' | 'cosine' (to 0 at train.num_steps)
    optim.b1 = 0.9
    optim.b2 = 0.999
    optim.eps = 1e-8
    optim.weight_decay = 0.0  # adamw
    optim.clip_norm = 1.0  # of the gradient; 0: off
    optim.ema_decay = 0.9999

    config.train = train = ConfigDict()
    train.batch_size = 64  # images an update, over all devices
    train.accumulation_steps = 1  # parts that a batch is computed in, one after the other
    train.fsdp = False  # parameters, EMA and optimizer state split over the devices instead of a copy on each
    train.num_steps = 1000  # updates
    train.log_every = 100  # steps
    train.checkpoint_every = 1000  # steps; and at the end
    train.keep_checkpoints = 2
    train.grid_every = 1000  # steps between sample grids; 0: none
    train.grid_images = 100  # images in such a grid

    config.guidance = guidance = ConfigDict()
    guidance.function = 'classifier_free'  # | 'conditional' | 'unconditional', or one's own: 'my_module:my_function'
    guidance.classifier_workdir = ''  # of a trained classifier, to guide with its gradient too
    guidance.classifier_weight = 0.0  # what that gradient is multiplied by
    guidance.clip_first = False  # clip the predicted x before the classifier's gradient moves it (ADM), not after
    guidance.classifier_form = 'eps'  # 'eps' (ADM's Algorithm 2) | 'mean' (its Algorithm 1; ancestral only)

    config.sample = sample = ConfigDict()
    sample.sampler = 'ancestral'  # 'ancestral' | 'ddim'
    sample.num_steps = 256  # network evaluations an image (T)
    sample.spacing = ''  # ADM's tables: 'ddim25' or '10,15,20' instead of num_steps evenly spaced ones
    sample.v = 0.3  # ancestral, where no variance is learned: it lies this far from σ~² to σ²_{t|s}, in the logarithm
    sample.eta = 0.0  # ddim: 0 deterministic, 1 the posterior's variance
    sample.clip_x = True  # clip the predicted x to [-1, 1]
    sample.guidance_weight = placeholder(float)  # the paper's w, 0 is off; set this or guidance_scale; unset: 0
    sample.guidance_scale = placeholder(float)  # 1 + w
    sample.labels = ''  # ids, '0,1,2', or class names, 'cat,dog'; '' is all classes
    sample.label_order = 'balanced'  # 'balanced' (in turn) | 'random'
    sample.num_images = 100
    sample.batch_size = 100  # images that a device draws at once
    sample.shard_images = 1000  # images a file, while they are drawn
    sample.npz = True  # write all images as one .npz too, as ADM's evaluator takes them
    sample.seed = 0

    config.eval = evaluate = ConfigDict()
    evaluate.at_end = False  # training ends with --mode=sample and --mode=evaluate
    evaluate.folder = ''  # of the workdir, where the results go; '' is the workdir itself
    evaluate.judge = ''  # the features' network: 'inception' | 'digits'
    evaluate.judge_steps = 2000  # digits: of its training
    evaluate.inception_weights = ''  # inception: path of weights-inception-2015-12-05-6726825d.pth
    evaluate.samples = ''  # an .npz (arr_0 uint8 NHWC, arr_1 labels) or a folder of images to judge, instead of a model
    evaluate.reference = ''  # an .npz of statistics (ours or ADM's); '': of the data set's own images
    evaluate.reference_images = 50_000  # of the data set's own, evenly spread; 0: all (16 kB of memory each)
    evaluate.guidance_weights = (0.0, 0.1, 0.3, 0.5, 1.0, 2.0, 4.0)
    evaluate.samplers = ()  # as config.sample.sampler, a curve each; (): that one
    evaluate.num_steps = ()  # as config.sample.num_steps, a curve each; (): that one
    evaluate.classifier_weights = ()  # a sweep over these instead, at the guidance weight of config.sample
    evaluate.compare_with = ''  # another folder of the workdir that holds a curve, to draw both in comparison.png
    evaluate.bits_per_dim = False  # bound the data's likelihood under the conditional model instead of sampling
    evaluate.num_samples = 1000  # for each weight, balanced over the classes
    evaluate.allow_few_samples = False  # FID of no more samples than the judge has features, which means little
    evaluate.keep_samples = True  # keep the sets of images that this job draws, to judge them anew
    evaluate.split_images = 5000  # of each part that the Inception score is the mean over
    evaluate.nearest_k = 3  # neighbours that set the radius in precision and recall

    config.prepare = prepare = ConfigDict()
    prepare.path = ''  # --mode=prepare: a folder or zip of images, CIFAR-10's or ImageNet's archive; see README
    prepare.num_workers = 0  # processes; 0: one a core
    prepare.num_shards = 0  # files; 0: one for 10,000 images, of small data sets up to 16

    config.inspect = inspect = ConfigDict()
    inspect.num_images = 10_000  # --mode=inspect: decoded for the pixels' statistics, spread over the data set
    inspect.seconds = 10.0  # --mode=inspect: of reading, to measure the pipeline

    config.plan = plan = ConfigDict()
    plan.topology = ''  # --mode=plan: '' (the devices at hand) or a TPU slice, such as 'v5e:4x4' or 'v4:2x2x4'
    plan.compile = True  # compile the training step for it; otherwise estimate
    plan.utilisation = 0.4  # part of the peak FLOP/s that training is assumed to reach
    plan.price = 0.0  # of a device for an hour, in any currency, for the cost; 0: not known

    config.convert = convert = ConfigDict()
    convert.path = (
        ''  # --mode=convert: OpenAI's .pt file, or a .safetensors file, to become a checkpoint of the workdir
    )
    convert.to = ''  # --mode=convert: the .safetensors file that the workdir's EMA parameters are written to
    convert.new_attention_order = False  # of a .pt file: ADM's 64x64 diffusion model has it, no other
    return config


def changed(config, changes):
    """A copy of the config with {'section.key': value} in it."""
    copy = config.copy_and_resolve_references()
    with copy.unlocked():
        copy.update_from_flattened_dict(changes)
    return copy


def imagenet(size, resampling='box'):
    """The default config with what all ImageNet experiments share, at `size` pixels a side.

    Data of each resampling have a name of their own, for they are not the same images: 'box' is the CFG paper's (at
    64 pixels TFDS publishes it), 'adm' ADM's.
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
    """What ADM's diffusion models share: learned variances, no null label, 250 steps, a classifier to guide them."""
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
    """What ADM's noisy classifiers share."""
    config = imagenet(size, 'adm')
    config.data.random_crop = True
    config.diffusion.schedule = 'adm_cosine' if size == 64 else 'adm_linear'
    config.model.kind = 'classifier'
    config.model.channels = 128
    config.model.head_channels = 64
    config.optim.name = 'adamw'
    config.optim.clip_norm = 0.0
    config.optim.ema_decay = 0.0  # what guides is the parameters themselves
    return config
