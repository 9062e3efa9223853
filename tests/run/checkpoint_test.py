"""Checkpoints: what comes back is what was saved, and no damage goes unseen or unsaid."""

import gc
import json
import random
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmp.run import checkpoint, manifest
from jaxmp.training.state import TrainState

META = {"config": {"name": "digits", "steps": 3}}


def state_at(step: int) -> TrainState:
    """A state with optimizer namedtuples, a key and 16-bit statistics, different at each step."""
    rng = np.random.default_rng(step)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"Dense_0": {"kernel": normal(30, 40), "bias": normal(40)}, "scale": normal()}
    state = TrainState.create(
        params,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
        model_state={"batch_stats": {"mean": normal(8).astype(jnp.bfloat16)}},
        rng=jax.random.key(step),
    )
    noise = lambda x: x + normal(*x.shape).astype(x.dtype)
    return state.replace(step=jnp.int32(step), opt_state=jax.tree.map(noise, state.opt_state))


def bits(tree) -> list[bytes]:
    """Every leaf's bytes, PRNG keys' too."""
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(plain(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]


def assert_same(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    kinds = lambda tree: [(leaf.dtype, leaf.shape) for leaf in jax.tree.leaves(tree)]
    assert kinds(state) == kinds(expected)
    assert bits(state) == bits(expected)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A directory with checkpoints 10, 20 and 30, not to be changed."""
    directory = tmp_path_factory.mktemp("written")
    with checkpoint.open_store(directory, keep=3) as store:
        for step in (10, 20, 30):
            store.save(step, state_at(step), META | {"at": step})
    return directory


@pytest.fixture
def saved(written, tmp_path):
    """A copy of the checkpoints 10, 20 and 30."""
    return shutil.copytree(written, tmp_path / "checkpoints")


def restore(directory, wanted=None) -> checkpoint.Restored | None:
    with checkpoint.open_store(directory) as store:
        return store.restore_latest(
            jax.eval_shape(lambda: state_at(0)) if wanted is None else wanted
        )


# Saving and restoring.


def test_reading_changes_nothing_and_damage_is_told(saved):
    wanted = jax.eval_shape(lambda: state_at(0))
    interrupted = saved / "40.saving"
    interrupted.write_text("a run beside this saves")
    files = lambda: sorted(str(path) for path in saved.rglob("*"))
    before = files()
    assert_same(checkpoint.read(saved, wanted).state, state_at(30))
    read = checkpoint.read(saved, wanted, 10)
    assert (read.step, read.meta) == (10, META | {"at": 10})
    assert_same(read.state, state_at(10))
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint 15 in .* 10, 20, 30"):
        checkpoint.read(saved, wanted, 15)
    with pytest.raises(checkpoint.CheckpointError, match="there is none at all"):
        checkpoint.read(saved / "nowhere", wanted)
    assert files() == before
    DAMAGES["truncated file"](saved / "30")
    before = files()
    with pytest.raises(checkpoint.CheckpointError, match=r"Checkpoint 30 in .* is damaged"):
        checkpoint.read(saved, wanted)
    assert files() == before


def test_the_newest_state_comes_back_bit_for_bit(saved):
    restored = restore(saved)
    assert (restored.step, restored.meta, restored.notes) == (30, META | {"at": 30}, [])
    assert_same(restored.state, state_at(30))
    assert_same(restore(saved, wanted=state_at(7)).state, state_at(30))


def test_restored_leaves_can_be_donated(saved):
    step = jax.jit(
        lambda s: jax.tree.map(lambda x: x, s.replace(step=s.step + 1)), donate_argnums=0
    )
    advanced = step(step(restore(saved).state))
    assert_same(advanced, state_at(30).replace(step=jnp.int32(32)))


def test_metadata_names_versions_and_every_leaf(saved):
    record = json.loads((saved / "30" / "meta" / "metadata").read_text())
    assert (record["format"], record["step"], record["meta"]) == (1, 30, META | {"at": 30})
    assert record["versions"]["jax"] == jax.__version__
    assert {"python", "jaxmp", "flax", "optax", "orbax-checkpoint"} <= record["versions"].keys()
    assert len(record["leaves"]) == len(jax.tree.leaves(state_at(0)))
    kernel = record["leaves"]["params/Dense_0/kernel"]
    assert (kernel["shape"], kernel["dtype"]) == ([30, 40], "float32")
    assert len(kernel["fingerprint"]) == 16
    assert record["leaves"]["rng"]["dtype"] == "key<threefry2x32>"
    assert record["leaves"]["model_state/batch_stats/mean"]["dtype"] == "bfloat16"


def test_an_empty_directory_gives_nothing_and_says_nothing(tmp_path):
    with checkpoint.open_store(tmp_path / "new" / "deep") as store:
        assert store.restore_latest(state_at(0)) is None
        assert (store.steps(), store.notes) == ([], [])
        store.wait()


@pytest.mark.parametrize("donate", [True, False])
def test_the_state_may_be_donated_or_overwritten_right_after_save(tmp_path, donate):
    rng = np.random.default_rng(0)
    host = {f"leaf{i}": rng.normal(size=(500, 2000)).astype(np.float32) for i in range(4)}
    expected = bits(host)
    state = {**{name: jnp.array(array) for name, array in host.items()}, "numpy": host["leaf0"]}
    wipe = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with checkpoint.open_store(tmp_path) as store:
        store.save(1, state, {})
        arrays = {name: x for name, x in state.items() if name != "numpy"}
        arrays = jax.block_until_ready(wipe(arrays)) if donate else None
        state["numpy"][:] = -1
        assert store.restore_latest(state).step == 1  # waits for the save under way
        assert bits(store.restore_latest(state | host).state) == [*expected, expected[0]]


def test_a_save_under_way_does_not_count(tmp_path, monkeypatch):
    begun, gate = [], threading.Event()
    write = manifest.write
    monkeypatch.setattr(
        manifest, "write", lambda folder: (begun.append(1), gate.wait(), write(folder))
    )
    with checkpoint.open_store(tmp_path) as store:
        store.save(1, state_at(1), {})
        assert store.steps() == []
        gate.set()
        store.wait()
        assert (store.steps(), begun) == ([1], [1])


def test_keeps_the_newest_and_every_nth(tmp_path):
    with checkpoint.open_store(tmp_path, every=10, keep=2, keep_every=50) as store:
        due = [step for step in range(1, 121) if store.due(step)]
        assert due == list(range(10, 121, 10))
        for step in due:
            store.save(step, {"x": jnp.full(3, step)}, {})
        store.wait()
        assert store.steps() == [50, 100, 110, 120]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["100", "110", "120", "50"]
    with checkpoint.open_store(tmp_path, every=0) as store:
        assert not any(store.due(step) for step in range(100))


def test_the_newest_step_is_not_written_twice_and_older_ones_are_refused(saved):
    before = (saved / "30" / manifest.NAME).read_bytes()
    with checkpoint.open_store(saved) as store:
        store.save(30, state_at(99), META, wait=True)
        with pytest.raises(checkpoint.CheckpointError, match="checkpoint 30 is later"):
            store.save(25, state_at(25), META)
    assert (saved / "30" / manifest.NAME).read_bytes() == before


def test_a_state_of_shards_comes_back_on_other_devices(tmp_path):
    program = """
import sys, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxmp.run import checkpoint
array = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
place = lambda n: NamedSharding(jax.make_mesh((n,), ("d",), axis_types=(AxisType.Auto,)), P("d"))
with checkpoint.open_store(sys.argv[1]) as store:
    store.save(1, {"w": jax.device_put(array, place(8)), "key": jax.random.key(1)}, {})
    for n in (8, 4, 1):
        spec = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place(n))
        got = store.restore_latest({"w": spec, "key": jax.random.key(0)}).state["w"]
        assert got.sharding == place(n) and (np.asarray(got) == array).all()
"""
    environment = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": ":".join(sys.path),
    }
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=True)
    wanted = {"w": jax.ShapeDtypeStruct((16, 24), jnp.float32), "key": jax.random.key(0)}
    expected = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    assert_same(restore(tmp_path, wanted).state, {"w": expected, "key": jax.random.key(1)})


# States that do not fit.


def other_state(**changes):
    return state_at(0).replace(**changes)


@pytest.mark.parametrize(
    "wanted, told",
    [
        (
            other_state(params={**state_at(0).params, "scale": jnp.zeros((), jnp.bfloat16)}),
            "leaf params/scale is float32[] there and bfloat16[] here.",
        ),
        (
            other_state(model_state={"batch_stats": {"mean": jnp.zeros(9, jnp.bfloat16)}}),
            "leaf model_state/batch_stats/mean is bfloat16[8] there and bfloat16[9] here.",
        ),
        (
            other_state(model_state={}),
            "leaf model_state/batch_stats/mean is bfloat16[8] there and absent here.",
        ),
        (
            other_state(params={**state_at(0).params, "new": jnp.zeros(2), "newer": jnp.zeros(2)}),
            "leaf params/new is absent there and float32[2] here, and one more leaf differs.",
        ),
        (
            other_state(rng=jax.random.key(0, impl="rbg")),
            "leaf rng is key<threefry2x32>[] there and key<rbg>[] here.",
        ),
        (
            other_state(rng=jax.random.PRNGKey(0)),
            "leaf rng is key<threefry2x32>[] there and uint32[2] here.",
        ),
        (other_state(step=0), "leaf step is int32[] there and int64[] here."),
    ],
    ids=["dtype", "shape", "missing", "new", "generator", "old key", "Python number"],
)
def test_another_state_is_refused_by_the_leafs_name(saved, wanted, told):
    with pytest.raises(checkpoint.CheckpointMismatchError) as caught:
        restore(saved, wanted)
    assert told in str(caught.value)
    assert "Checkpoint 30" in str(caught.value)
    assert restore(saved).notes == []  # nothing was set aside


def test_objects_that_are_no_arrays_are_refused_by_name(tmp_path):
    with checkpoint.open_store(tmp_path) as store:
        with pytest.raises(ValueError, match="Leaf a/b is a str, and a checkpoint holds arrays"):
            store.save(1, {"a": {"b": "text"}}, {})
        with pytest.raises(ValueError, match="Two leaves of the state have the same path a/b"):
            store.save(1, {"a": {"b": 1}, "a/b": 2}, {})
        assert store.restore_latest({"x": 1}) is None


# Damage.


def data_file(step_folder):
    """The largest file: the one that holds the leaves."""
    return max(
        step_folder.glob("state/**/*"), key=lambda p: p.stat().st_size if p.is_file() else -1
    )


def swap_bytes(folder):
    path = data_file(folder)
    data = bytearray(path.read_bytes())
    first, second = len(data) // 3, len(data) // 2
    assert data[first] != data[second]
    data[first], data[second] = data[second], data[first]
    path.write_bytes(data)


def swap_files(folder):
    first, second = sorted(p for p in folder.glob("state/ocdbt.process_0/d/*"))[:2]
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def rewrite(path, change):
    path.write_bytes(change(path.read_bytes()))


DAMAGES = {
    "truncated file": lambda f: rewrite(data_file(f), lambda data: data[: len(data) // 2]),
    "zeroed file": lambda f: rewrite(data_file(f), lambda data: bytes(len(data))),
    "missing data files": lambda f: [p.unlink() for p in f.glob("state/ocdbt.process_0/d/*")],
    "missing metadata": lambda f: (f / "meta" / "metadata").unlink(),
    "missing Orbax metadata": lambda f: (f / "_CHECKPOINT_METADATA").unlink(),
    "empty directory": empty,
    "garbage JSON": lambda f: (f / "meta" / "metadata").write_text("{{{"),
    "garbage Orbax JSON": lambda f: (f / "_CHECKPOINT_METADATA").write_text("]"),
    "emptied data directory": lambda f: empty(f / "state"),
    "deleted Orbax manifest": lambda f: (f / "state" / "manifest.ocdbt").unlink(),
    "deleted own manifest": lambda f: (f / manifest.NAME).unlink(),
    "deleted commit mark": lambda f: (f / "commit_success.txt").unlink(),
    "swapped bytes": swap_bytes,
    "swapped files": swap_files,
    "a file too many": lambda f: (f / "state" / "stray").touch(),
    "appended byte": lambda f: rewrite(data_file(f), lambda data: data + b"\0"),
}


def assert_fell_back(directory, broken=30, good=20):
    """Restores and checks that `broken` was named and set aside, `good` resumed from bit for bit."""
    with checkpoint.open_store(directory) as store:
        restored = store.restore_latest(state_at(0))
        assert restored.step == good
        assert_same(restored.state, state_at(good))
        (note,) = restored.notes
        assert note.startswith(f"checkpoint {broken} is damaged: ")
        assert note.endswith(f"; set aside as {broken}.corrupt; resuming from {good}")
        assert (directory / f"{broken}.corrupt").is_dir()
        assert not (directory / str(broken)).exists()
        # The run goes on: saves of steps up to the broken one succeed, and are found.
        for step in (good + 5, broken):
            store.save(step, state_at(step), META, wait=True)
        assert store.steps()[-2:] == [good + 5, broken]
    assert_same(restore(directory).state, state_at(broken))
    return note


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_set_aside_and_the_run_goes_on(saved, damage):
    DAMAGES[damage](saved / "30")
    before = {p.name: p.read_bytes() for p in (saved / "30").rglob("*") if p.is_file()}
    assert_fell_back(saved)
    aside = {p.name: p.read_bytes() for p in (saved / "30.corrupt").rglob("*") if p.is_file()}
    assert aside == before  # set aside as it was found


def flip(path, index, bit):
    data = bytearray(path.read_bytes())
    data[index] ^= 1 << bit
    path.write_bytes(data)


def assert_flip_is_seen(directory, path, index, bit):
    """Flips a bit of checkpoint 30, expects it to be set aside, and puts all back."""
    relative = path.relative_to(directory / "30")
    flip(path, index, bit)
    restored = restore(directory)
    assert restored.step == 20, (relative, index, bit)
    (note,) = restored.notes
    assert f"checkpoint 30 is damaged: file {relative} differs" in note or manifest.NAME in str(
        path
    )
    (directory / "30.corrupt").rename(directory / "30")
    flip(path, index, bit)


def test_twenty_random_bit_flips_are_each_seen(saved):
    draw = random.Random(0)
    files = sorted(path for path in (saved / "30").rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    for path in draw.choices(files, weights=sizes, k=20):
        assert_flip_is_seen(saved, path, draw.randrange(path.stat().st_size), draw.randrange(8))
    assert restore(saved).step == 30


def test_a_bit_flip_in_any_file_is_seen(saved):
    draw = random.Random(1)
    files = sorted(path for path in (saved / "30").rglob("*") if path.is_file())
    assert len(files) > 10
    for path in files:
        assert_flip_is_seen(saved, path, draw.randrange(path.stat().st_size), draw.randrange(8))
    assert restore(saved).step == 30


def forge(directory, step, change):
    """Writes the step anew from a changed state, but with the metadata of the true one."""
    folder = directory / str(step)
    record = (folder / "meta" / "metadata").read_bytes()
    shutil.rmtree(folder)
    with checkpoint.open_store(directory) as store:
        store.save(step, change(state_at(step)), META | {"at": step})
    (folder / "meta" / "metadata").write_bytes(record)
    manifest.write(folder)


def test_a_wrong_bit_in_a_leaf_is_seen_even_if_all_files_agree(saved):
    def change(state):
        kernel = np.array(state.params["Dense_0"]["kernel"])
        kernel.view(np.uint32)[3, 4] ^= 1
        state.params["Dense_0"]["kernel"] = jnp.asarray(kernel)
        return state

    forge(saved, 30, change)
    note = assert_fell_back(saved)
    assert "leaf params/Dense_0/kernel differs from its fingerprint" in note


def test_two_broken_in_a_row(saved):
    DAMAGES["truncated file"](saved / "30")
    DAMAGES["empty directory"](saved / "20")
    restored = restore(saved)
    assert restored.step == 10
    assert_same(restored.state, state_at(10))
    assert [note.split(":")[0] for note in restored.notes] == [
        "checkpoint 30 is damaged",
        "checkpoint 20 is damaged",
    ]
    assert restored.notes[1].endswith("set aside as 20.corrupt; resuming from 10")


def test_the_same_step_broken_twice_is_set_aside_twice(saved):
    DAMAGES["truncated file"](saved / "30")
    assert_fell_back(saved)
    DAMAGES["zeroed file"](saved / "30")
    restored = restore(saved)
    assert restored.step == 25
    assert "set aside as 30.corrupt-2; resuming from 25" in restored.notes[0]


def test_all_broken_is_an_error_until_somebody_decides(saved):
    for step in (10, 20, 30):
        DAMAGES["zeroed file"](saved / str(step))
    for _ in range(2):  # a second start does not begin anew by itself either
        with pytest.raises(checkpoint.CheckpointDamagedError) as caught:
            restore(saved)
        assert "set aside as 10.corrupt, 20.corrupt, 30.corrupt. Put back" in str(caught.value)
    assert sorted(p.name for p in saved.iterdir()) == ["10.corrupt", "20.corrupt", "30.corrupt"]


def test_what_orbax_cannot_read_is_not_set_aside_when_its_files_are_whole(saved, monkeypatch):
    import orbax.checkpoint as ocp

    def fail(*args, **kwargs):
        raise MemoryError("no memory for 3 TB\nand more lines")

    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
    with pytest.raises(checkpoint.CheckpointError, match="is undamaged, but Orbax cannot read it"):
        restore(saved)
    assert sorted(p.name for p in saved.iterdir()) == ["10", "20", "30"]


# Killed while saving.


def test_killed_before_the_commit(saved):
    shutil.copytree(saved / "30", saved / "40.orbax-checkpoint-tmp")
    (saved / "40.saving").write_text("{}")
    restored = restore(saved)
    assert restored.step == 30
    assert restored.notes == [
        "the run was killed while it saved checkpoint 40; the unfinished files were removed"
    ]
    assert sorted(p.name for p in saved.iterdir()) == ["10", "20", "30"]
    assert restore(saved).notes == []


def unseal(directory, step):
    """As if the run was killed after Orbax's commit and before the manifest."""
    folder = directory / str(step)
    record = json.loads((folder / "meta" / "metadata").read_text())
    (directory / f"{step}.saving").write_text(json.dumps(record, sort_keys=True, indent=1))
    (folder / manifest.NAME).unlink()


def test_killed_after_the_commit(saved):
    unseal(saved, 30)
    restored = restore(saved)
    assert_same(restored.state, state_at(30))
    assert "killed while it finished checkpoint 30" in restored.notes[0]
    assert manifest.difference(saved / "30") is None
    assert sorted(p.name for p in saved.iterdir()) == ["10", "20", "30"]


def test_killed_after_the_manifest(saved):
    (saved / "30.saving").write_text("{}")
    assert restore(saved).notes == []
    assert not (saved / "30.saving").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["truncated file", "missing data files", "missing metadata"])
def test_killed_after_the_commit_and_damaged(saved, damage):
    unseal(saved, 30)
    DAMAGES[damage](saved / "30")
    restored = restore(saved)
    assert restored.step == 20
    assert restored.notes[0].startswith("checkpoint 30 was not finished when the run was killed: ")
    assert restored.notes[0].endswith("; set aside as 30.unfinished; resuming from 20")
    gc.collect()  # coroutines of Orbax's failed reader warn when they end: let them end here


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_first_save_that_was_never_finished_is_no_checkpoint(saved):
    for step in (10, 20):
        shutil.rmtree(saved / str(step))
    unseal(saved, 30)
    DAMAGES["zeroed file"](saved / "30")
    with checkpoint.open_store(saved) as store:
        assert store.restore_latest(state_at(0)) is None
        assert "set aside as 30.unfinished" in store.notes[0]
        gc.collect()  # as above
        store.save(10, state_at(10), META, wait=True)
        assert store.steps() == [10]


# Saves that fail.


def test_a_full_disk_is_told_at_the_next_call_and_can_be_survived(tmp_path, monkeypatch):
    write = manifest.write

    def full(folder):
        raise OSError(28, "No space left on device")

    with checkpoint.open_store(tmp_path) as store:
        store.save(1, state_at(1), META, wait=True)
        monkeypatch.setattr(manifest, "write", full)
        store.save(2, state_at(2), META)
        with pytest.raises(checkpoint.CheckpointError) as caught:
            store.save(3, state_at(3), META)
        told = f"Checkpoint 2 could not be written to {tmp_path}: the disk is full. Checkpoint 1 is"
        assert told in str(caught.value)
        monkeypatch.setattr(manifest, "write", write)
        store.save(4, state_at(4), META, wait=True)
        assert store.steps() == [1, 4]


FILE_LIMIT = """
import resource, signal, sys
import jax.numpy as jnp, numpy as np
from jaxmp.run import checkpoint
small, large = ({"x": jnp.asarray(np.random.default_rng(0).normal(size=n))} for n in (10, 10**6))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = checkpoint.open_store(sys.argv[1])
store.save(1, small, {}, wait=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
store.save(2, large, {})
try:
    store.wait()
except checkpoint.CheckpointError as error:
    print(error)
store.save(3, small, {}, wait=True)
print(store.steps(), sorted(path.name for path in store.directory.iterdir()))
store.close()
"""


def test_a_disk_that_takes_no_more_bytes(tmp_path):
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", FILE_LIMIT, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    told, left = result.stdout.splitlines()
    assert told.startswith(f"Checkpoint 2 could not be written to {tmp_path}: ")
    assert "Checkpoint 1 is untouched." in told
    assert left == "[1, 3] ['1', '3']"


def test_settings_out_of_range_are_refused(tmp_path):
    for wrong in ({"keep": 0}, {"every": -1}, {"keep_every": -5}):
        with pytest.raises(ValueError, match="Expected keep of at least 1"):
            checkpoint.open_store(tmp_path, **wrong)
