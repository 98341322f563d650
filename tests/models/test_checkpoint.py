import errno
import json
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from rlhf_ray.errors import NoValidCheckpoint
from rlhf_ray.models import checkpoint
from rlhf_ray.models.checkpoint import Checkpoint, newest_valid, prune, save_checkpoint

Mutation = Callable[[Path, random.Random], None]


def save(folder: Path, step: int) -> Path:
    generator = torch.Generator().manual_seed(step)
    weights = {"a": torch.randn(7, 3, generator=generator), "b": torch.tensor(float(step))}
    tensors = {"policy": weights, "optimizer": {"0.exp_avg": torch.randn(5, generator=generator)}}
    return save_checkpoint(folder, step, tensors=tensors, state={"step": step, "kl": {"coef": 0.1}})


def found(folder: Path) -> Checkpoint:
    newest = newest_valid(folder)
    assert newest is not None
    return newest


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    tied = torch.randn(4, 2)
    tensors = {"policy": {"head": tied, "embedding": tied, "view": tied.T}, "empty": {}}
    state = {"cursor": 3, "rate": 0.1 + 0.2, "names": ["ä"]}
    save_checkpoint(tmp_path, 10, tensors=tensors, state=state)
    newest = found(tmp_path)
    assert (newest.step, newest.state, newest.passed_over) == (10, state, ())
    assert newest.path == tmp_path / "step_00000010"
    assert newest.tensors["empty"] == {}
    assert all(torch.equal(newest.tensors["policy"][name], wanted) for name, wanted in tensors["policy"].items())


def test_numbers_come_back_bit_by_bit(tmp_path: Path) -> None:
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    save_checkpoint(tmp_path, 1, tensors={"odd": {"x": odd, "n": torch.tensor(2**62)}}, state={})
    back = found(tmp_path).tensors["odd"]
    assert torch.equal(back["x"].view(torch.int32), odd.view(torch.int32))
    assert back["n"].item() == 2**62


def test_the_newest_of_several_is_found(tmp_path: Path) -> None:
    for step in (20, 5, 100_000_000, 10):
        save(tmp_path, step)
    assert found(tmp_path).step == 100_000_000


def test_no_checkpoint_yet_is_none_and_not_an_error(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "absent") is None
    (tmp_path / "step_00000010.tmp-ab12").mkdir()
    (tmp_path / "notes").mkdir()
    assert newest_valid(tmp_path) is None


def test_the_manifest_lists_every_file_with_size_and_sha256(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["schema"], manifest["step"]) == (1, 10)
    assert set(manifest["files"]) == {file.name for file in path.iterdir()} - {"manifest.json"}
    assert all(entry["bytes"] == (path / name).stat().st_size for name, entry in manifest["files"].items())


def flip_a_bit(path: Path, rng: random.Random) -> None:
    file = rng.choice(sorted(path.iterdir()))
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    file = rng.choice(sorted(path.iterdir()))
    os.truncate(file, rng.randrange(file.stat().st_size))


def delete_a_file(path: Path, rng: random.Random) -> None:
    rng.choice(sorted(path.iterdir())).unlink()


def swap_two_files(path: Path, rng: random.Random) -> None:
    one, other = rng.sample(sorted(path.iterdir()), 2)
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def swap_with_an_older_one(path: Path, rng: random.Random) -> None:
    name = rng.choice([file.name for file in sorted(path.iterdir()) if file.name != "optimizer.safetensors"])
    shutil.copyfile(path.parent / "step_00000010" / name, path / name)


def empty_the_manifest(path: Path, rng: random.Random) -> None:
    (path / "manifest.json").write_bytes(rng.choice([b"", b"{}", b"[]", b"null", b"\xff", b'{"schema": 1}']))


def append(path: Path, rng: random.Random) -> None:
    with rng.choice(sorted(path.iterdir())).open("ab") as file:
        file.write(b"\n")


MUTATIONS = [flip_a_bit, truncate, delete_a_file, swap_two_files, swap_with_an_older_one, empty_the_manifest, append]


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_every_mutation_is_detected_and_the_previous_checkpoint_used(tmp_path: Path, mutate: Mutation) -> None:
    save(tmp_path, 10)
    whole = shutil.copytree(save(tmp_path, 20), tmp_path / "whole")
    for seed in range(30):
        shutil.rmtree(tmp_path / "step_00000020")
        shutil.copytree(whole, tmp_path / "step_00000020")
        mutate(tmp_path / "step_00000020", random.Random(seed))
        newest = found(tmp_path)
        assert newest.step == 10, seed
        assert newest.state["step"] == 10
        assert len(newest.passed_over) == 1


def test_without_the_hashes_changed_bytes_would_go_unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Agreeing(str):
        def __ne__(self, _: object) -> bool:
            return False

    class Digest:
        def hexdigest(self) -> str:
            return Agreeing()

    save(tmp_path, 10)
    path = save(tmp_path, 20)
    data = bytearray((path / "policy.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "policy.safetensors").write_bytes(data)
    assert found(tmp_path).step == 10
    monkeypatch.setattr(checkpoint.hashlib, "file_digest", lambda *_: Digest())
    assert found(tmp_path).step == 20


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_where_none_verifies_a_run_does_not_start_over(tmp_path: Path, mutate: Mutation) -> None:
    save(tmp_path, 10)
    mutate(save(tmp_path, 20), random.Random(0))
    (tmp_path / "step_00000010" / "state.json").unlink()
    with pytest.raises(NoValidCheckpoint, match=r"step_00000020.*step_00000010: state\.json is missing"):
        newest_valid(tmp_path)


class Damage(NamedTuple):
    do: Callable[[Path], Any]
    reason: str


@pytest.mark.parametrize(
    "damage",
    [
        Damage(lambda path: (path / "policy.safetensors").unlink(), "policy.safetensors is missing"),
        Damage(lambda path: os.truncate(path / "state.json", 3), "state.json has 3 bytes, not "),
        Damage(lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        Damage(lambda path: (path / "manifest.json").write_bytes(b""), "manifest.json is empty"),
        Damage(lambda path: path.rename(path.with_name("step_00000030")), "manifest.json is of step 20"),
    ],
)
def test_what_was_passed_over_says_which_and_why(tmp_path: Path, damage: Damage) -> None:
    save(tmp_path, 10)
    damage.do(save(tmp_path, 20))
    [reason] = found(tmp_path).passed_over
    assert reason.startswith(str(tmp_path / "step_000000"))
    assert damage.reason in reason


def test_a_checkpoint_of_a_newer_program_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "SCHEMA", 2)
        save(tmp_path, 20)
    [reason] = found(tmp_path).passed_over
    assert "has schema 2; this program reads 1" in reason


def test_a_step_reached_again_replaces_its_broken_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 10)
    delete_a_file(save(tmp_path, 20), random.Random(0))
    save(tmp_path, 20)
    assert found(tmp_path).step == 20
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000010", "step_00000020"}


def record_syncs(monkeypatch: pytest.MonkeyPatch, events: list[str]) -> None:
    """Each fsync by the name of what it syncs, and the rename that gives a checkpoint its name."""
    fsync, rename = os.fsync, Path.rename

    def recorded(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split(".tmp-")[0])
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        events.append(f"rename to {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(Path, "rename", renamed)


def test_files_are_on_disk_before_the_manifest_and_that_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    record_syncs(monkeypatch, events)
    save(tmp_path, 10)
    assert set(events[:3]) == {"policy.safetensors", "optimizer.safetensors", "state.json"}
    assert events[3:] == ["manifest.json", "step_00000010", "rename to step_00000010", tmp_path.name]


@pytest.mark.parametrize("death", range(6))
def test_killed_at_any_sync_the_old_checkpoint_or_the_new_one_is_found(tmp_path: Path, death: int) -> None:
    save(tmp_path, 10)
    child = os.fork()
    if child == 0:
        calls = iter(range(100))
        os.fsync = lambda _: os._exit(9) if next(calls) == death else None
        save(tmp_path, 20)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    newest = found(tmp_path)
    assert newest.step == (20 if death == 5 else 10)  # the sixth sync follows the rename
    assert (newest.state["step"], newest.passed_over) == (newest.step, ())


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)
    size = 4 * (7 * 3 + 1 + 5)  # the tensors alone, without what must be free beside them
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))
    with pytest.raises(OSError, match="needs more than") as error:
        save(tmp_path, 20)
    assert error.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000010"]


def test_a_write_that_fails_midway_leaves_no_trace(tmp_path: Path) -> None:
    save(tmp_path, 10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(tmp_path, 20, tensors={"policy": {"a": torch.zeros(1000)}}, state={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000010"]
    assert found(tmp_path).step == 10


def test_a_state_that_is_not_json_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_checkpoint(tmp_path, 10, tensors={}, state={"loss": float("nan")})
    assert newest_valid(tmp_path) is None


def test_pruning_keeps_the_newest_and_clears_a_crashs_leftovers(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    (tmp_path / "step_00000050.tmp-ab12").mkdir()
    deleted = prune(tmp_path, keep=2)
    assert [path.name for path in deleted] == ["step_00000020", "step_00000010"]
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000030", "step_00000040"}


def test_pruning_counts_only_checkpoints_that_verify(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    for broken in (30, 40):
        (tmp_path / f"step_000000{broken}" / "manifest.json").unlink()
    assert prune(tmp_path, keep=2) == []
    assert found(tmp_path).step == 20


def test_pruning_also_keeps_the_checkpoint_that_leads_to_the_best_step(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step)
    assert [path.name for path in prune(tmp_path, keep=2, best=25)] == ["step_00000030", "step_00000010"]
    (tmp_path / "step_00000020" / "state.json").unlink()  # no longer good for anything
    save(tmp_path, 15)
    assert [path.name for path in prune(tmp_path, keep=2, best=25)] == ["step_00000020"]
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000015", "step_00000040", "step_00000050"}
