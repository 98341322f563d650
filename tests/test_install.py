"""The installer hands pip's settings on to uv, asks each index once, and says what is missing."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import install
from install import Missing, Sources, find_sources, parse_pip_settings, shown, why_silent


@pytest.fixture
def dead_index() -> Iterator[str]:
    """An address where nobody listens: a port that is bound and never accepts."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/simple"


def folder_index(tmp_path: Path) -> str:
    return tmp_path.as_uri()


def test_the_environment_wins_over_the_install_section_over_the_global_one() -> None:
    listing = """
:env:.find-links='/c'
global.find-links='/a'
global.timeout='9'
install.find-links='/b'
install.timeout='7'
"""
    assert parse_pip_settings(listing) == {"find-links": "/c", "timeout": "7"}


def test_several_indexes_are_handed_to_uv_under_pips_rule() -> None:
    environment = Sources(("https://a/simple", "https://b/simple"), ("/wheels", "/more"), {}).for_uv({"HOME": "/h"})
    assert environment == {
        "HOME": "/h",
        "UV_DEFAULT_INDEX": "https://a/simple",
        "UV_INDEX": "https://b/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/wheels,/more",
    }


def test_what_the_user_has_told_uv_stays() -> None:
    environment = Sources(("https://a/simple",), (), {}).for_uv({"UV_DEFAULT_INDEX": "https://mine/simple"})
    assert environment["UV_DEFAULT_INDEX"] == "https://mine/simple"


def test_pips_certificate_and_timeout_reach_uv() -> None:
    environment = Sources((), (), {"cert": "/ca.crt", "default-timeout": "180"}).for_uv({})
    assert environment == {"UV_NO_INDEX": "1", "SSL_CERT_FILE": "/ca.crt", "UV_HTTP_TIMEOUT": "180"}


def test_an_index_that_does_not_answer_is_left_out_and_named(
    tmp_path: Path, dead_index: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = find_sources({"index-url": folder_index(tmp_path), "extra-index-url": dead_index})
    assert sources.indexes == (folder_index(tmp_path),)
    assert dead_index in capsys.readouterr().err


def test_without_any_index_the_error_names_it_and_the_ways_out(dead_index: str) -> None:
    with pytest.raises(Missing, match="no package index answers") as caught:
        find_sources({"index-url": dead_index})
    assert dead_index in str(caught.value)
    assert "PIP_INDEX_URL" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pips_no_index_asks_no_index(dead_index: str) -> None:
    assert find_sources({"index-url": dead_index, "no-index": "1"}).indexes == ()


def test_a_folder_of_wheels_that_is_not_there_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    assert find_sources({"no-index": "1", "find-links": f"{tmp_path} {gone}"}).find_links == (str(tmp_path),)
    assert str(gone) in capsys.readouterr().err


def test_an_address_is_shown_without_its_password() -> None:
    assert shown("https://me:secret@index.example/simple") == "https://index.example/simple"


def test_an_unreachable_address_has_a_reason(dead_index: str) -> None:
    assert "refused" in (why_silent(dead_index) or "")


def test_an_old_python_is_told_which_one_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(install, "PYTHONS", ((3, 99), (4, 0)))
    with pytest.raises(Missing, match="make install PYTHON="):
        install.check_machine(tmp_path / "venv")


def test_a_full_disk_is_noticed_before_anything_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(install, "DISK_GB", 10**9)
    with pytest.raises(Missing, match="make room"):
        install.check_machine(tmp_path / "venv")


def fake_uv(tmp_path: Path, *, fails_with_pins: int) -> Path:
    """A uv that writes down how it was called, and fails where constraints.txt is asked for."""
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
        f'case "$*" in *-e*constraints.txt*) exit {fails_with_pins};; esac\nexit 0\n'
    )
    uv.chmod(0o755)
    return uv


def test_an_index_without_a_pinned_version_gets_what_fits_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install.install_project(fake_uv(tmp_path, fails_with_pins=1), "cpu", Sources((), (), {}))
    assert "constraints.txt" not in (tmp_path / "calls").read_text().splitlines()[-1]
    assert "constraints.txt pins" in capsys.readouterr().err


def test_a_download_that_fails_is_not_tried_again_without_pins(tmp_path: Path) -> None:
    with pytest.raises(Missing, match="run it again"):
        install.install_project(fake_uv(tmp_path, fails_with_pins=2), "cpu", Sources((), (), {}))
    assert len([line for line in (tmp_path / "calls").read_text().splitlines() if " -e " in line]) == 1


def test_the_gpu_environment_is_not_held_to_the_pins_of_the_cpu_one(tmp_path: Path) -> None:
    install.install_project(fake_uv(tmp_path, fails_with_pins=2), "gpu", Sources((), (), {}))
    assert "constraints.txt" not in (tmp_path / "calls").read_text()
