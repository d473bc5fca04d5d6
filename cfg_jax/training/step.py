"""One training step, how it is compiled for a mesh of devices, and the summary of several steps' metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cfg_jax import runtime
from cfg_jax.training import optim, sharding


def make_train_step(
    loss,
    optimizer,
    *,
    learning_rate,
    ema_decay,
    quarter_edges,
    ema_gammas=None,
    accumulation_steps=1,
    split_over=None,
):
    """Return the function (state, {'image', 'label'}, key) -> (state, metrics).

    loss(params, images, labels, key) -> `losses.Loss`; images as the batch has them. In distillation it takes two more:
    the state's teacher_params, and step. learning_rate: step -> rate.
    quarter_edges: λ [5], increasing, the edges of four quarters. ema_gammas: {name: exponent} of state.averages, or
    None. split_over: the mesh over which state and gradients are split (FSDP); the parameters are then gathered for the
    network. None: they are whole on every device.

    key: the run's; a step uses fold_in(key, state.step). metrics: scalars of the step ('param_norm': of the parameters
    after it); sums and counts of the loss by quarter of λ [4] and by conditional/null label [2].
    """

    def placed(tree, *, fsdp):
        if split_over is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, sharding.state_shardings(tree, split_over, fsdp))

    def mean_loss(params, *arguments):
        per_image = loss(params, *arguments)
        return per_image.loss.mean(), per_image

    def loss_and_gradients(params, *arguments):
        whole = placed(params, fsdp=False)
        (_, per_image), gradients = jax.value_and_grad(mean_loss, has_aux=True)(whole, *arguments)
        return per_image, placed(gradients, fsdp=True)

    def accumulated(params, images, labels, key, *teaching):
        # Part p takes every accumulation_steps-th image, so that each device keeps the images that it has.
        parts = jax.tree.map(lambda a: a.reshape(-1, accumulation_steps, *a.shape[1:]).swapaxes(0, 1), (images, labels))

        def body(total, part):
            index, (images, labels) = part
            per_image, gradients = loss_and_gradients(params, images, labels, jax.random.fold_in(key, index), *teaching)
            return jax.tree.map(jnp.add, total, gradients), per_image

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, per_image = jax.lax.scan(body, zeros, (jnp.arange(accumulation_steps), parts))
        return jax.tree.map(jnp.ravel, per_image), jax.tree.map(lambda g: g / accumulation_steps, total)

    def train_step(state, batch, key):
        gradients_of = loss_and_gradients if accumulation_steps == 1 else accumulated
        step_key = jax.random.fold_in(key, state.step)
        teaching = () if state.teacher_params is None else (placed(state.teacher_params, fsdp=False), state.step)
        per_image, gradients = gradients_of(state.params, batch['image'], batch['label'], step_key, *teaching)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
        quarters = jax.nn.one_hot(jnp.searchsorted(quarter_edges[1:-1], per_image.logsnr), 4)
        kinds = jax.nn.one_hot(per_image.dropped.astype(jnp.int32), 2)
        metrics = {
            'loss': per_image.loss.mean(),
            'grad_norm': optax.tree.norm(gradients),
            'param_norm': optax.tree.norm(params),
            'learning_rate': learning_rate(state.step),
            'quarter_sums': _sums(quarters, per_image.loss),
            'quarter_counts': quarters.sum(0),
            'kind_sums': _sums(kinds, per_image.loss),
            'kind_counts': kinds.sum(0),
        }
        if per_image.correct is not None:
            metrics['quarter_correct'] = _sums(quarters, per_image.correct)
        ema_params = optim.ema(state.ema_params, params, ema_decay)
        next_state = state.replace(step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state)
        if ema_gammas:
            averages = {
                name: optim.power_ema(state.averages[name], params, gamma, next_state.step)
                for name, gamma in ema_gammas.items()
            }
            next_state = next_state.replace(averages=averages)
        return next_state, metrics

    return train_step


def _sums(membership, values):
    # where, not a product: one NaN loss must not spread to the other groups
    return jnp.where(membership > 0, values[:, None], 0.0).sum(0)


def sharded(init, train_step, mesh, *, fsdp):
    """Return (init, abstract state, training step), jitted for the devices of `mesh`, which need not exist here.

    init: () -> the first state. abstract state: its shapes, dtypes and shardings. The step donates its state.
    """
    shapes = jax.eval_shape(init)
    shardings = sharding.state_shardings(shapes, mesh, fsdp)
    options = runtime.compiler_options(mesh)
    placed = shardings, sharding.replicated(mesh)
    step = jax.jit(train_step, donate_argnums=0, out_shardings=placed, compiler_options=options)
    init = jax.jit(init, out_shardings=shardings, compiler_options=options)
    return init, sharding.abstract(shapes, shardings), step


def summarise(collected):
    """Return the means over a list of steps' metrics as {name: float}; NaN for a group without images."""
    total = jax.tree.map(lambda *values: np.sum(values, axis=0, dtype=np.float64), *collected)
    with np.errstate(invalid='ignore'):
        quarters = total['quarter_sums'] / total['quarter_counts']
        conditional, null = total['kind_sums'] / total['kind_counts']
        correct = total['quarter_correct'] / total['quarter_counts'] if 'quarter_correct' in total else []
    return {
        **{key: total[key] / len(collected) for key in ('loss', 'grad_norm', 'param_norm', 'learning_rate')},
        **{f'loss_logsnr_q{i + 1}': value for i, value in enumerate(quarters)},
        **{f'accuracy_logsnr_q{i + 1}': value for i, value in enumerate(correct)},
        **({} if 'quarter_correct' in total else {'loss_conditional': conditional, 'loss_null': null}),
    }
