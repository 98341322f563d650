"""Keys are kept as hashes, shown once, and shut out at once."""

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from rlhf_ray.errors import ConfigError, InputError
from rlhf_ray.serving import auth
from rlhf_ray.serving.auth import Caller, KeyStore


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "keys.db")


def test_a_key_names_its_caller_and_role(store: KeyStore) -> None:
    keys = {role: store.create(f"{role}-1", role) for role in auth.ROLES}
    assert {role: store.caller(key) for role, key in keys.items()} == {
        role: Caller(key.split("_")[1], f"{role}-1", role) for role, key in keys.items()
    }


def test_the_file_holds_no_key_and_only_its_owner_reads_it(store: KeyStore, tmp_path: Path) -> None:
    key = store.create("phone", "app")
    store.close()
    secret = key.rpartition("_")[2].encode()
    assert not [path for path in tmp_path.iterdir() if secret[:16] in path.read_bytes()]
    assert stat.S_IMODE((tmp_path / "keys.db").stat().st_mode) == 0o600


def test_keys_are_256_random_bits_and_differ(store: KeyStore) -> None:
    made = {store.create(f"k{i}", "app") for i in range(20)}
    assert len({key.split("_", 2)[2] for key in made}) == 20
    assert all(auth._KEY.fullmatch(key) for key in made)


def test_what_is_almost_a_key_is_none(store: KeyStore) -> None:
    key = store.create("phone", "app")
    other = store.create("tablet", "app")
    last = "A" if key[-1] != "A" else "B"
    crossed = key[:14] + other[14:]
    for wrong in ("", "rlhf_", key[:-1], key[:-1] + last, key + "A", key.upper(), f" {key}", crossed, "\ud800", "é"):
        assert store.caller(wrong) is None, wrong


def test_a_revoked_key_is_none_at_once_for_every_process(store: KeyStore, tmp_path: Path) -> None:
    key = store.create("phone", "app")
    door = KeyStore(tmp_path / "keys.db")
    assert door.caller(key) is not None
    store.revoke("phone")
    assert door.caller(key) is None
    assert door.any()
    with pytest.raises(InputError, match="no valid key called 'phone'; there are: none"):
        store.revoke("phone")


def test_revoking_the_last_key_does_not_open_the_door(store: KeyStore, tmp_path: Path) -> None:
    assert not store.any()
    store.create("phone", "app")
    store.revoke("phone")
    assert KeyStore(tmp_path / "keys.db").any()


def test_a_running_door_notices_the_first_key(store: KeyStore, tmp_path: Path) -> None:
    door = KeyStore(tmp_path / "keys.db")
    assert not door.any()
    store.create("phone", "app")
    assert door.any()


def test_a_name_is_given_once(store: KeyStore) -> None:
    store.create("phone", "app")
    store.revoke("phone")
    with pytest.raises(InputError, match="choose another name"):
        store.create("phone", "app")
    for name in ("", "Phone", "a b", "-a", "a" * 65, "a/b"):
        with pytest.raises(InputError, match="key name"):
            store.create(name, "app")
    with pytest.raises(InputError, match="no role 'root'; there are: app, annotator, trainer, admin"):
        store.create("tablet", "root")


def test_use_is_noted_at_most_once_a_minute(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    key = store.create("phone", "app")
    assert store.listed()[0].last_used_at is None
    start = datetime(2026, 1, 1, tzinfo=UTC)
    noted = []
    for seconds in (0, 59, 61):
        monkeypatch.setattr(auth, "_now", lambda seconds=seconds: start + timedelta(seconds=seconds))
        store.caller(key)
        noted.append(store.listed()[0].last_used_at)
    assert noted == [start, start, start + timedelta(seconds=61)]


def test_a_list_says_everything_but_the_key(store: KeyStore) -> None:
    key = store.create("phone", "app")
    [listed] = store.listed()
    assert (listed.name, listed.role, listed.revoked_at) == ("phone", "app", None)
    assert key.startswith(f"rlhf_{listed.prefix}_")
    assert key.rpartition("_")[2] not in repr(listed)


def test_keys_are_kept_in_a_file(tmp_path: Path) -> None:
    KeyStore(f"sqlite:///{tmp_path}/k.db").create("phone", "app")
    for url in ("postgresql://host/db", "sqlite://", "nonsense:", ""):
        with pytest.raises(ConfigError, match="sqlite:///folder"):
            KeyStore(url)
