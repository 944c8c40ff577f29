"""Uploads of a trained adapter, to a small hub that speaks HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")  # nobody listens there
    with HubServer() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        yield server


def test_adapter_and_tokenizer_are_uploaded(make_trainer, hub: HubServer, tmp_path: Path):
    trainer = make_trainer()
    trainer.train()
    url = trainer.push_to_hub(repo_id="me/sums", private=True, token=TOKEN)
    assert url == f"{hub.url}/me/sums/commit/1" and hub.private == {"me/sums": True}
    files = hub.repositories["me/sums"]
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json", "README.md"} <= files.keys()
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    assert files["adapter_model.safetensors"] == weights.read_bytes()
    assert trainer.push_to_hub(token=TOKEN) == f"{hub.url}/me/run/commit/1", "the name of the run folder"


def test_a_run_uploads_at_its_end_and_a_failure_does_not_fail_it(make_trainer, hub: HubServer, monkeypatch, capsys):
    options = {"push_to_hub": True, "hub_model_id": "me/at-the-end"}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    make_trainer(**options).train()
    assert "adapter_model.safetensors" in hub.repositories["me/at-the-end"]
    assert f"uploaded to {hub.url}/me/at-the-end/commit/1" in capsys.readouterr().out
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert make_trainer(**options).train().global_step == 2
    shown = capsys.readouterr().out
    assert "could not upload to me/at-the-end on the Hub" in shown and "push_to_hub() tries again" in shown


def test_a_hub_that_cannot_be_reached_is_one_sentence(make_trainer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ValueError, match=r"could not upload to me/x on the Hub: .*\(log in with `hf auth login`\)"):
        make_trainer().push_to_hub(repo_id="me/x", token=TOKEN)
