"""Versions are numbered, whole and unchanged; what is wanted is the latest promotion that did not fail."""

import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sqlalchemy import delete, update

from rlhf_ray.errors import DataError, InfrastructureError, InputError, ModelError
from rlhf_ray.models import registry as module
from rlhf_ray.models.files import members_of
from rlhf_ray.models.policy import load_policy
from rlhf_ray.models.registry import Registry
from rlhf_ray.models.reward import load_reward_model, new_reward_model
from tests.models.tiny import make_policy_folder


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy_folder(tmp_path_factory.mktemp("policy") / "policy")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def changed(policy: Path, folder: Path, shift: float) -> Path:
    """A copy of a policy whose weights differ, so that it is another version."""
    shutil.copytree(policy, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + shift
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def publish_three(registry: Registry, policy: Path, tmp_path: Path) -> None:
    for shift in (0.1, 0.2, 0.3):
        registry.publish("policy", changed(policy, tmp_path / str(shift), shift), lineage={})


def test_a_published_policy_is_a_numbered_copy_that_loads(registry: Registry, policy: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(policy, tmp_path / "mine")
    version = registry.publish("policy", mine, lineage={"run_id": "demo", "step": 30})
    shutil.rmtree(mine)
    assert (version.number, version.lineage) == (1, {"run_id": "demo", "step": 30})
    assert registry.versions("policy") == [version] == [registry.version("policy", 1)]
    registry.verify(version)
    assert load_policy(version.folder).config.hidden_size == 32


def test_numbers_count_up_by_kind_and_the_same_files_are_the_same_version(
    registry: Registry, policy: Path, tmp_path: Path
) -> None:
    new_reward_model(policy, "decoder").save(tmp_path / "reward")
    first = registry.publish("policy", policy, lineage={"run_id": "a"})
    other = registry.publish("policy", changed(policy, tmp_path / "b", 0.5), lineage={})
    reward = registry.publish("reward_model", tmp_path / "reward", lineage={})
    assert [first.number, other.number, reward.number] == [1, 2, 1]
    assert registry.publish("policy", policy, lineage={"run_id": "again"}) == first
    assert registry.publish("policy", first.folder, lineage={}) == first
    assert load_reward_model(reward.folder).score([]) == []


def test_an_ensemble_is_published_with_all_its_members(registry: Registry, policy: Path, tmp_path: Path) -> None:
    for seed, place in enumerate((tmp_path / "reward", tmp_path / "reward" / "members" / "1")):
        new_reward_model(policy, "decoder", seed=seed).save(place)
    version = registry.publish("reward_model", tmp_path / "reward", lineage={})
    registry.verify(version)
    assert registry.publish("reward_model", version.folder, lineage={}) == version
    assert members_of(version.folder) == [version.folder, version.folder / "members" / "1"]
    other = version.folder / "members" / "1" / "config.json"
    other.chmod(0o644)
    other.write_text(other.read_text() + " ")
    with pytest.raises(ModelError, match=r"members/1/config\.json"):
        registry.verify(version)


def test_a_member_that_is_a_link_or_not_finite_is_not_published(
    registry: Registry, policy: Path, tmp_path: Path
) -> None:
    new_reward_model(policy, "decoder").save(tmp_path / "reward")
    member = tmp_path / "reward" / "members" / "1"
    new_reward_model(policy, "decoder", seed=1).save(tmp_path / "other")
    member.parent.mkdir()
    member.symlink_to(tmp_path / "other")
    with pytest.raises(ModelError, match="is a link"):
        registry.publish("reward_model", tmp_path / "reward", lineage={})
    member.unlink()
    changed(tmp_path / "other", member, float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        registry.publish("reward_model", tmp_path / "reward", lineage={})
    assert registry.versions("reward_model") == []


def test_only_weights_and_text_are_copied(registry: Registry, policy: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(policy, tmp_path / "mine")
    for stray in ("modeling_evil.py", "pytorch_model.bin", "training_args.pt", ".hidden.json.swp", "setup.sh"):
        (mine / stray).write_text("boo")
    (mine / "subfolder").mkdir()
    version = registry.publish("policy", mine, lineage={})
    assert {path.name for path in version.folder.iterdir()} == {*(p.name for p in policy.iterdir()), "manifest.json"}


def test_links_are_refused(registry: Registry, policy: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(policy, tmp_path / "mine")
    (tmp_path / "secret.txt").write_text("secret")
    (mine / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ModelError, match=r"notes\.txt is a link"):
        registry.publish("policy", mine, lineage={})


def test_a_model_with_code_of_its_own_is_refused_and_the_code_never_runs(
    registry: Registry, policy: Path, tmp_path: Path
) -> None:
    mine, canary = shutil.copytree(policy, tmp_path / "mine"), tmp_path / "canary"
    config = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}))
    (mine / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    with pytest.raises(ModelError, match="auto_map"):
        registry.publish("policy", mine, lineage={})
    assert not canary.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(
    registry: Registry, policy: Path, tmp_path: Path, value: float
) -> None:
    mine = shutil.copytree(policy, tmp_path / "mine")
    weights = load_file(mine / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], value)
    save_file(weights, mine / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not finite \(model\.norm\.weight\)"):
        registry.publish("policy", mine, lineage={})
    assert registry.versions("policy") == []


def test_what_does_not_load_leaves_no_trace(registry: Registry, policy: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(policy, tmp_path / "mine")
    os.truncate(mine / "model.safetensors", 1000)
    for kind in ("policy", "reward_model"):
        with pytest.raises(ModelError):
            registry.publish(kind, mine, lineage={})
    with pytest.raises(ModelError, match="has 2 labels"):
        registry.publish("reward_model", policy, lineage={})
    assert [*(registry.root / "policies").iterdir(), *(registry.root / "reward_models").iterdir()] == []


def test_a_folder_without_a_row_is_a_crashs_and_its_number_is_given_to_the_next(
    registry: Registry, policy: Path
) -> None:
    left = registry.root / "policies" / "00000001"
    left.mkdir()
    (left / "half.safetensors").write_bytes(b"half")
    version = registry.publish("policy", policy, lineage={})
    assert version.folder == left
    registry.verify(version)


def in_a_child(work: Callable[[], object]) -> int:
    """The pid of a process that does something and ends, with exit code 0 where it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


@pytest.mark.parametrize("death", [(module, "_write_manifest"), (Registry, "_number"), (module, "insert")])
def test_killed_before_manifest_name_or_commit_there_is_no_version_and_the_next_is_whole(
    registry: Registry, policy: Path, death: tuple[object, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(*death, lambda *_, **__: os._exit(9))
        child = in_a_child(lambda: Registry(registry.root).publish("policy", policy, lineage={}))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert registry.versions("policy") == []
    version = registry.publish("policy", policy, lineage={})
    registry.verify(version)
    assert version.number == 1


def flip_a_bit(folder: Path, rng: random.Random) -> None:
    file = folder / rng.choice(["model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"])
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.chmod(0o644)
    file.write_bytes(data)


def add_a_file(folder: Path, rng: random.Random) -> None:
    (folder / rng.choice(["pytorch_model.bin", "evil.py", "adapter_config.json"])).write_text("{}")


def drop_a_file(folder: Path, rng: random.Random) -> None:
    (folder / rng.choice(sorted(path.name for path in folder.iterdir()))).unlink()


def list_what_is_there(folder: Path, rng: random.Random) -> None:
    """Change a file and the manifest with it: the number's own sha256 lies in the database."""
    flip_a_bit(folder, rng)
    files = {path.name: module._hash(path) for path in folder.iterdir() if path.name != "manifest.json"}
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


def link_a_file(folder: Path, rng: random.Random) -> None:
    moved = (folder / "config.json").rename(folder.parent / "elsewhere.json")
    (folder / "config.json").symlink_to(moved)


@pytest.mark.parametrize("mutate", [flip_a_bit, add_a_file, drop_a_file, list_what_is_there, link_a_file])
def test_every_change_of_a_published_folder_is_noticed_and_not_promoted(
    registry: Registry, policy: Path, mutate: Callable[[Path, random.Random], None]
) -> None:
    version = registry.publish("policy", policy, lineage={})
    whole = shutil.copytree(version.folder, registry.root / "whole")
    for seed in range(10):
        shutil.rmtree(version.folder)
        shutil.copytree(whole, version.folder)
        mutate(version.folder, random.Random(seed))
        with pytest.raises(ModelError, match=r"policy 1 (was changed|cannot be read)"):
            registry.promote("policy", 1, by="me")
    assert registry.promoted("policy") is None


def wanted(registry: Registry) -> int | None:
    version = registry.promoted("policy")
    return version.number if version else None


def test_the_latest_promotion_is_wanted_and_rollback_promotes_the_one_before_anew(
    registry: Registry, policy: Path, tmp_path: Path
) -> None:
    publish_three(registry, policy, tmp_path)
    assert wanted(registry) is None
    for number in (1, 3):
        registry.promote("policy", number, by="ann", reason="better")
    assert wanted(registry) == 3
    assert registry.rollback("policy", by="bob").number == 1 == wanted(registry)
    assert registry.rollback("policy", by="bob").number == 3 == wanted(registry)
    lines = [(row.number, row.by, row.reason, row.state) for row in registry.history("policy")]
    assert lines[1:3] == [(3, "ann", "better", "promoted"), (1, "bob", "rollback of 3", "promoted")]


def test_a_promotion_that_failed_leaves_the_one_before_wanted(registry: Registry, policy: Path, tmp_path: Path) -> None:
    publish_three(registry, policy, tmp_path)
    registry.promote("policy", 1, by="ann")
    registry.promote("policy", 2, by="ann")
    registry.fail("policy", 2, by="service", reason="canary: empty answer")
    assert wanted(registry) == 1
    last = registry.history("policy")[-1]
    assert (last.number, last.state, last.of, last.reason) == (2, "failed", 2, "canary: empty answer")
    registry.promote("policy", 2, by="ann", reason="mended the machine")
    assert wanted(registry) == 2


def test_a_failure_takes_back_its_own_version_and_not_a_newer_promotion(
    registry: Registry, policy: Path, tmp_path: Path
) -> None:
    publish_three(registry, policy, tmp_path)
    for number in (1, 2, 3):
        registry.promote("policy", number, by="ann")
    registry.fail("policy", 2, by="service", reason="slow to notice")
    assert wanted(registry) == 3
    registry.fail("policy", 2, by="service", reason="said twice")
    assert len(registry.history("policy")) == 4
    assert registry.rollback("policy", by="ann").number == 1


def test_with_nothing_to_go_back_to_rollback_says_so(registry: Registry, policy: Path) -> None:
    with pytest.raises(InputError, match="nothing to go back to"):
        registry.rollback("policy", by="ann")
    registry.publish("policy", policy, lineage={})
    registry.promote("policy", 1, by="ann")
    registry.promote("policy", 1, by="ann")
    with pytest.raises(InputError, match="nothing to go back to"):
        registry.rollback("policy", by="ann")


def test_a_number_that_is_not_there_is_answered_with_those_that_are(
    registry: Registry, policy: Path, tmp_path: Path
) -> None:
    publish_three(registry, policy, tmp_path)
    with pytest.raises(InputError, match=r"no policy 7 .*: 1, 2, 3"):
        registry.promote("policy", 7, by="ann")
    with pytest.raises(InputError, match=r"no reward model 1 .*: none yet"):
        registry.version("reward_model", 1)


def test_rows_are_never_changed(registry: Registry, policy: Path) -> None:
    registry.publish("policy", policy, lineage={})
    registry.promote("policy", 1, by="ann")
    for statement in (delete(module._promotions), update(module._versions).values(number=9)):
        with pytest.raises(DataError, match="append-only"), registry._database.writing() as connection:
            connection.execute(statement)
    assert wanted(registry) == 1


def test_lineage_is_plain_json(registry: Registry, policy: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        registry.publish("policy", policy, lineage={"kl": float("nan")})
    assert [path.name for path in (registry.root / "policies").iterdir()] == []


def test_two_processes_publish_and_promote_at_once(registry: Registry, policy: Path, tmp_path: Path) -> None:
    folders = [changed(policy, tmp_path / str(i), i / 10) for i in range(1, 7)]

    def work(mine: list[Path]) -> None:
        opened = Registry(registry.root)
        for folder in mine:
            opened.promote("policy", opened.publish("policy", folder, lineage={}).number, by="p")

    children = [in_a_child(partial(work, half)) for half in (folders[:3], folders[3:])]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    versions = registry.versions("policy")
    assert [version.number for version in versions] == [1, 2, 3, 4, 5, 6]
    assert len(registry.history("policy")) == 6
    for version in versions:
        registry.verify(version)


def test_a_place_that_cannot_be_written_is_the_users_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="name another folder"):
        Registry(tmp_path / "file")


def test_a_full_disk_leaves_no_version(registry: Registry, policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "fsync", full)
    with pytest.raises(InfrastructureError, match="No space left"):
        registry.publish("policy", policy, lineage={})
    assert registry.versions("policy") == []
    assert list((registry.root / "policies").iterdir()) == []
