"""The command line: python -m cfg_jax.main --config=configs/digits.py [--mode=...] [--config.section.key=value]."""

import contextlib
import importlib
import sys

from absl import app

from cfg_jax import command_line, runtime
from cfg_jax.config import needs_much_memory
from cfg_jax.distributed import join
from cfg_jax.distributed.job import INTERRUPTED, USER_ERROR, Stopped, the_job
from cfg_jax.errors import UserError, disk_errors


def main(argv):
    arguments = command_line.arguments(argv)
    config, workdir = arguments.config, arguments.workdir
    # sets XLA's flags, so everything that imports JAX is imported after it
    runtime.configure(keep_memory=needs_much_memory(config))
    joined = join.join(**arguments.joining)
    if joined:
        the_job.joined()
    modes = [arguments.mode]
    if arguments.mode == 'train' and config.eval.at_end:
        modes += ['sample', 'evaluate']
    with disk_errors(workdir), runtime.devices_errors():
        if joined:
            from cfg_jax.distributed import processes

            if arguments.mode == 'train' and processes.is_first():
                workdir.mkdir(parents=True, exist_ok=True)
            processes.check_shared(workdir)
        jobs = [importlib.import_module(f'cfg_jax.jobs.{mode}') for mode in modes]
        if arguments.mode == 'train' and config.eval.at_end:
            jobs[-1].check_to_come(config, workdir)  # the last job would find it days later
        for job in jobs:
            job.run(config, workdir)
    the_job.finish()


def run():
    """Run the program and exit; in a job of several processes all exit with the same status.

    0: done. 2: one line on stderr says what the user can mend. 75: stopped by SIGTERM; rerun the same command to
    resume. 130: stopped by Ctrl-C. Anything else: a crash.
    """
    for stream in (sys.stdout, sys.stderr):  # names of files and classes may hold what the terminal cannot show
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors='backslashreplace')
    the_job.watch()
    try:
        app.run(main, flags_parser=command_line.parse)
    except UserError as error:
        the_job.end(USER_ERROR, f'error: {error}')
    except Stopped as stopped:
        the_job.end(stopped.status, str(stopped))
    except KeyboardInterrupt:
        the_job.end(INTERRUPTED, 'stopped: rerun the same command to resume from what was saved')
    except Exception as error:
        the_job.crash(error)


if __name__ == '__main__':
    run()
