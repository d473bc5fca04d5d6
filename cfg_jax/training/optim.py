"""The optimizer as one optax chain, and the moving average of the parameters."""

import jax
import numpy as np
import optax


def learning_rate(peak, *, warmup_steps=0, decay='constant', num_steps=None):
    """Return step -> learning rate: linear warm-up to `peak`, then 'constant', or down to 0 at `num_steps`.

    decay: 'cosine' or 'linear' for the latter.
    """
    if decay == 'constant':
        after = optax.constant_schedule(peak)
    elif decay == 'cosine':
        after = optax.cosine_decay_schedule(peak, max(num_steps - warmup_steps, 1))
    elif decay == 'linear':
        after = optax.linear_schedule(peak, 0.0, max(num_steps - warmup_steps, 1))
    else:
        raise ValueError(f"decay is {decay!r}; allowed: 'constant', 'cosine', 'linear'")
    if not warmup_steps:
        return after
    # step + 1, because a rate of 0 at step 0 would waste the first update
    return optax.join_schedules([lambda step: peak * (step + 1) / warmup_steps, after], [warmup_steps])


def by_rounds(rates, lengths):
    """Return step -> learning rate of rounds that follow each other: rates[i] is that of round i, lengths[i] steps."""
    ends = np.cumsum(lengths).tolist()
    return optax.join_schedules(rates, ends[:-1])


def make_optimizer(rate, *, name='adam', b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=0.0):
    """Return an optax chain: clipping of the gradient by its global norm (0: off), then 'adam' or 'adamw'."""
    if name == 'adam':
        if weight_decay:
            raise ValueError("weight_decay needs name='adamw'")
        update = optax.adam(rate, b1=b1, b2=b2, eps=eps)
    elif name == 'adamw':
        update = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    else:
        raise ValueError(f"optimizer is {name!r}; allowed: 'adam', 'adamw'")
    # both have an empty state, so that the state's tree is the same and a resumed run may change it
    return optax.chain(optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(), update)


def restarted(optimizer, opt_state, params):
    """Return the optimizer's first state for these parameters, but with the learning rate's step kept."""

    def counts(node):
        return isinstance(node, optax.ScaleByScheduleState)

    first = optimizer.init(params)
    return jax.tree.map(lambda new, old: old if counts(new) else new, first, opt_state, is_leaf=counts)


def ema(average, params, decay):
    """Return average + (1 - decay) (params - average), leaf by leaf."""
    return jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), average, params)
