"""The command: what it refuses, where it listens, how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

import tokenizer
from lvm import export
from lvm.playground.__main__ import Playground, default_store, listen, main
from tokenizer.cli import InputError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def command(make_model, tok, tmp_path: Path) -> Playground:
    tokenizer.save(tok, tmp_path / "tok")
    export.write(make_model(tokenizer=tok.id), tmp_path / "model")
    return Playground(
        model=tmp_path / "model", tokenizer=tmp_path / "tok", store=tmp_path / "store", port=0
    )


def test_bad_options_and_missing_files_are_refused(command, tmp_path: Path):
    def refused(words: str, **changes) -> None:
        with pytest.raises(InputError, match=words):
            main(replace(command, **changes))

    refused("no model folder", model=tmp_path / "nowhere")
    refused("no tokenizer folder", tokenizer=tmp_path / "nowhere")
    refused("--examples .*: no such folder", examples=tmp_path / "nowhere")
    refused("there is no manifest.json", data=tmp_path / "nowhere")
    refused("--host nowhere.invalid --port 0 cannot be listened on", host="nowhere.invalid")
    for bad in ({"port": 70_000}, {"port": -1}, {"store_mb": 0}, {"waiting": -1}):
        refused("wanted at least 1, at least 0, and 0 to 65535", **bad)


def test_a_tokenizer_of_another_model_is_refused(command, make_model, tmp_path: Path):
    export.write(make_model(tokenizer="0" * 64), tmp_path / "other")
    with pytest.raises(InputError, match="the same code is another picture"):
        main(replace(command, model=tmp_path / "other"))


def test_a_port_in_use_is_one_message_before_anything_is_loaded(command, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        words = f"--host 127.0.0.1 --port {port} cannot be listened on .*in use.*another --port"
        with pytest.raises(InputError, match=words):
            main(replace(command, port=port, model=tmp_path / "nowhere"))
    listen("127.0.0.1", port).close()


def test_without_the_web_packages_it_says_what_to_install(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "lvm.playground.serve", raising=False)
    monkeypatch.delattr("lvm.playground.serve", raising=False)
    with pytest.raises(
        InputError, match=r"starlette and uvicorn .*large-vision-models\[playground"
    ):
        main(command)


def test_the_store_is_in_the_users_cache(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_store() == tmp_path / "lvm-playground"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_store() == Path.home() / ".cache" / "lvm-playground"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_it_prints_its_address_serves_and_ends_when_told_to(command, name, tmp_path: Path):
    arguments = [command.model, "--tokenizer", command.tokenizer, "--port", 0]
    arguments += ["--store", command.store]
    process = subprocess.Popen(
        [sys.executable, "-m", "lvm.playground", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"open (http://127\.0\.0\.1:\d+) ", line)
        assert address, (line, process.stderr)
        with urllib.request.urlopen(address[1] + "/api/about") as answer:
            assert b"limits" in answer.read()
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (out, err) == ("", "")
    assert process.returncode == (0 if name == "SIGINT" else -signal.SIGTERM)
