import json
import subprocess
import sys

import ldm_layout
import pytest

from sdlora.cli.main import main
from sdlora.config import BaseSection
from sdlora.families.inspect import inspect_base
from sdlora.families.tiny import tiny_pipeline
from sdlora.storage import sha256_of_file


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mix.safetensors"
    ldm_layout.write_checkpoint(tiny_pipeline("sdxl"), path, markers=("v_pred", "ztsnr"), ema=True)
    return path


def test_a_checkpoint_as_json(file, capsys):
    assert main(["base", "inspect", str(file), "--json", "--hash"]) == 0
    report = json.loads(capsys.readouterr().out)
    digest = sha256_of_file(file)
    pipeline = tiny_pipeline("sdxl")
    assert report["family"] == "sdxl" and report["layout"] == "checkpoint"
    assert report["prediction"] == "v" and report["zero_terminal_snr"] is True
    assert report["prediction_declared_by"] == "its marker tensor v_pred"
    assert report["size_bytes"] == file.stat().st_size
    assert report["files"] == [{"name": "mix.safetensors", "sha256": digest, "autov2": digest[:10]}]
    count = sum(parameter.numel() for parameter in pipeline.unet.parameters())
    assert report["components"]["unet"] == {"parameters": count, "precision": "fp32"}
    assert set(report["components"]) == {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert any("averaged (EMA)" in sentence for sentence in report["odd"])


def test_a_folder_as_text(tiny_folder, capsys):
    assert main(["base", "inspect", str(tiny_folder("sd2"))]) == 0
    text = capsys.readouterr().out
    assert "Stable Diffusion 2.x (diffusers folder)" in text
    assert "predicts    v (says scheduler/scheduler_config.json)" in text
    assert "unet/diffusion_pytorch_model.safetensors: not hashed yet; --hash does" in text


def test_no_weight_is_read_unless_hashes_are_asked_for(tiny_folder, monkeypatch):
    from sdlora.families import inspect as module

    monkeypatch.setattr(module, "cached_sha256", lambda path: pytest.fail("hashed"))
    report = inspect_base(BaseSection(path=str(tiny_folder("sdxl"))))
    assert set(report.sha256.values()) == {""}
    assert report.to_json()["files"][0]["sha256"] is None


def test_it_needs_neither_torch_nor_the_model_libraries():
    code = (
        "import sys; from sdlora.cli.main import main; main(['base', 'inspect', 'tiny']); "
        "sys.exit(bool({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_what_is_no_base_is_one_line_and_status_one(tmp_path, capsys):
    (tmp_path / "a.ckpt").write_bytes(b"x")
    assert main(["base", "inspect", str(tmp_path / "a.ckpt")]) == 1
    error = capsys.readouterr().err
    assert "is a pickle checkpoint, which could run code when opened" in error
    assert error.count("\n") == 1
