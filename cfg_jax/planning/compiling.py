"""A lowered training step, compiled: the time, the memory and the traffic between devices."""

import time

import jax

from cfg_jax.errors import first_line
from cfg_jax.planning import hlo
from cfg_jax.progress import shown


def compiled(lowered, count):
    """Compile a lowered step for `count` devices. Return {'seconds', 'bytes', 'total', 'sent'}, bytes per device.

    Where the step does not fit into memory: {'seconds', 'refused'}, the latter XLA's reason.
    """
    start = time.monotonic()
    try:
        with shown('compiling'):
            program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return {'seconds': time.monotonic() - start, 'refused': first_line(error)}
    seconds, sizes = time.monotonic() - start, program.memory_analysis()
    parts = {
        'arguments': sizes.argument_size_in_bytes,
        'temporary': sizes.temp_size_in_bytes,
        'results': sizes.output_size_in_bytes - sizes.alias_size_in_bytes,  # those not written over the arguments
        'code': sizes.generated_code_size_in_bytes,
    }
    sent = hlo.sent_bytes(program.as_text(), count)
    return {'seconds': seconds, 'bytes': parts, 'total': sum(parts.values()), 'sent': sent}
