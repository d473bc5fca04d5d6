"""The private names of other packages that cfg_jax uses: all of them are listed here, exist, and do what is needed.

They may change with any release of JAX or Orbax; `pytest tests/private_names_test.py` tells whether a new one will do.
"""

import ast
import importlib
import inspect
import subprocess
import sys

import jax
import orbax.checkpoint as ocp
import pytest

from tests import processes_test, tiny

# (file, name), as `private_names` finds them
USED = {
    ('distributed/join.py', 'jax._src.distributed.global_state'),
    ('distributed/join.py', 'jax._src.cloud_tpu_init.running_in_cloud_tpu_vm'),
    ('distributed/join.py', 'jax._src.clusters.GceTpuCluster.is_env_present'),
    ('distributed/join.py', 'jax._src.clusters.GceTpuCluster.get_process_count'),
    ('training/checkpoints.py', 'orbax.checkpoint.CheckpointManager._wait_for_checkpointers'),
}


def is_private(name):
    return any(part.startswith('_') and not part.startswith('__') for part in name.split('.'))


def private_names(source):
    """Find the private names of other packages in a file: imported, attributes of imports, inherited or overridden."""
    tree = ast.parse(source)
    imported, found = {}, set()  # imported: name in the file -> full name
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.add(alias.name)
                name = alias.asname or alias.name.split('.')[0]
                imported[name] = alias.name if alias.asname else name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found.add(f'{node.module}.{alias.name}')
                imported[alias.asname or alias.name] = f'{node.module}.{alias.name}'

    def full_name(node):
        """Return 'jax.numpy.x' for an expression of names and dots that starts with an imported name, else None."""
        if isinstance(node, ast.Name):
            return imported.get(node.id)
        start = full_name(node.value) if isinstance(node, ast.Attribute) else None
        return start and f'{start}.{node.attr}'

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(full_name(node))
        elif isinstance(node, ast.ClassDef):
            defined, used = members(node)
            for base in filter(None, map(full_name, node.bases)):
                found |= {f'{base}.{name}' for name in used - defined}
                found |= {f'{base}.{name}' for name in defined if inherits(base, name)}
    found = {name for name in found if name and is_private(name) and not is_ours(name)}
    return {name for name in found if not any(other.startswith(f'{name}.') for other in found)}


def members(class_node):
    """Return the private names that a class defines, and those that it uses of `self` and `super()`."""
    defined, used = set(), set()
    for node in ast.walk(class_node):
        if isinstance(node, ast.FunctionDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ('self', 'super()'):
            (defined if isinstance(node.ctx, ast.Store) else used).add(node.attr)
    return [{name for name in names if is_private(name)} for names in (defined, used)]


def is_ours(name):
    package = name.split('.')[0]
    return package == 'cfg_jax' or package in sys.stdlib_module_names


def inherits(base, name):
    """Return True if a class of another package has this private name."""
    module, _, class_name = base.rpartition('.')
    return not is_ours(base) and hasattr(getattr(importlib.import_module(module), class_name), name)


def test_every_private_name_is_listed():
    package = tiny.ROOT / 'cfg_jax'
    found = {
        (str(path.relative_to(package)), name)
        for path in package.rglob('*.py')
        for name in private_names(path.read_text())
    }
    assert found == USED


MANAGER = 'import orbax.checkpoint as ocp\nclass A(ocp.CheckpointManager):\n    def '


@pytest.mark.parametrize(
    ('source', 'expected'),
    [
        ('import jax._src.core', 'jax._src.core'),
        ('from jax._src import core as c', 'jax._src.core'),
        ('import jax\njax._src.core.x()', 'jax._src.core.x'),
        ('def f():\n    import jax as j\n    j.tree._leaf', 'jax.tree._leaf'),
        ('from orbax import checkpoint\ncheckpoint.test_utils._log(1)', 'orbax.checkpoint.test_utils._log'),
        (f'{MANAGER}f(self):\n        self._checkpointer', 'orbax.checkpoint.CheckpointManager._checkpointer'),
        (f'{MANAGER}_finalize(self, step): pass', 'orbax.checkpoint.CheckpointManager._finalize'),
    ],
)
def test_a_new_private_name_is_noticed(source, expected):
    assert private_names(source) == {expected}


def test_own_names_and_python_are_not_noticed():
    own = ['import jax, os', 'from cfg_jax import build', 'os._exit(build._y)', 'jax.__version__']
    assert private_names('\n'.join([*own, MANAGER.split('\n', 1)[1] + 'f(self): self._x = 1'])) == set()
    assert private_names(MANAGER + '_x(self): self._y = self._x') == set()


STORE = """
import json, sys, threading, time
from cfg_jax import runtime
from cfg_jax.distributed import join
runtime.configure()
join.join()
job = join.jax_job()
assert job.coordinator_address == join.os.environ['JAX_COORDINATOR_ADDRESS']
client, me, other = job.client, job.process_id, 1 - job.process_id
client.key_value_set(f'a/{me}', 'first')
client.key_value_set(f'a/{me}', f'{me} of {job.num_processes}', allow_overwrite=True)
print(client.blocking_key_value_get(f'a/{other}', 60_000))
client.wait_at_barrier('all', 60_000)
print(sorted(key[-3:] + ' ' + value for key, value in client.key_value_dir_get('a/')))
print(client.key_value_dir_get('nothing/'))
import jax
assert (jax.process_index(), jax.process_count()) == (me, job.num_processes)
jax.distributed.shutdown()
"""


def test_the_record_of_the_job_and_its_store():
    """jax._src.distributed.global_state, in two processes."""
    for index, (status, out, err) in enumerate(processes_test.run_script(STORE, 2, devices=1)):
        assert status == 0, err
        read, entries, nothing = out.splitlines()
        assert read in ('first', f'{1 - index} of 2')  # the other one may not have overwritten it yet
        assert entries == str(['a/0 0 of 2', 'a/1 1 of 2']) and nothing == '[]'


def test_a_process_alone_has_no_record_of_a_job():
    code = 'from cfg_jax.distributed import join; job = join.jax_job(); print(job.client, job.coordinator_address)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tiny.ROOT)
    assert done.stdout.strip() == 'None None', done.stderr


def test_jax_takes_an_empty_list_of_devices_for_all():
    """Otherwise it would give each process of SLURM or Open MPI a single GPU. join_test holds that it does not."""
    from jax._src.clusters import ClusterEnv

    given = {'cluster_detection_method': 'slurm', 'initialization_timeout': 1}
    found = ClusterEnv.auto_detect_unset_distributed_params('a:1', 2, 0, [], **given)
    assert found == ('a:1', 2, 0, [])


def test_the_detection_of_tpu_pods(monkeypatch):
    from jax._src import cloud_tpu_init, clusters
    from jax._src.clusters import cloud_tpu_cluster

    assert cloud_tpu_init.running_in_cloud_tpu_vm in (True, False)
    assert issubclass(clusters.GceTpuCluster, clusters.ClusterEnv)
    metadata = {'agent-worker-number': '1', 'worker-network-endpoints': 'a:0:10.0.0.1,b:1:10.0.0.2', 'tpu-env': ''}
    monkeypatch.setattr(cloud_tpu_cluster, 'running_in_cloud_tpu_vm', True)
    monkeypatch.setattr(cloud_tpu_cluster, 'get_metadata', lambda key: (metadata[key], 200))
    for name in ('TPU_SKIP_MDS_QUERY', 'MEGASCALE_NUM_SLICES'):
        monkeypatch.delenv(name, raising=False)
    assert clusters.GceTpuCluster.is_env_present() and clusters.GceTpuCluster.get_process_count() == 2


def test_orbax_waits_for_a_save_in_a_method_that_can_be_overridden(tmp_path, monkeypatch):
    """It raises there what has made a save in the background fail, once; the next caller would not hear of it."""
    assert list(inspect.signature(ocp.CheckpointManager._wait_for_checkpointers).parameters) == ['self']
    from cfg_jax.training import checkpoints

    manager = checkpoints._Manager(tmp_path.absolute())
    manager.save(1, args=ocp.args.StandardSave({'a': jax.numpy.ones(3)}))
    manager.wait_until_finished()
    assert manager.failure is None and manager.latest_step() == 1

    def fail(self):
        raise OSError('no room')

    with monkeypatch.context() as patched:
        patched.setattr(ocp.CheckpointManager, '_wait_for_checkpointers', fail)
        manager.save(2, args=ocp.args.StandardSave({'a': jax.numpy.ones(3)}))
        with pytest.raises(OSError, match='no room'):
            manager.wait_until_finished()
    assert str(manager.failure) == 'no room'
    ocp.CheckpointManager._wait_for_checkpointers(manager)
    manager.close()
