"""A base of true size, SD 1.5 with random weights: what is the same as in a tiny one, and what only size shows."""

import gc
import shutil
from pathlib import Path

import ldm_layout
import pytest
import torch
from families_help import load
from PIL import ImageChops

from sdlora.assets import TINY_SD
from sdlora.families.detect import detect_base
from sdlora.families.tiny import random_base
from sdlora.generation.engine import Engine
from sdlora.generation.request import make_request

pytestmark = pytest.mark.slow

PARAMETERS = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
REQUEST = make_request(prompt="a red ball", negative_prompt="blue", seed=5, steps=2, width=64, height=64)


@pytest.fixture
def folder_and_file(tmp_path):
    """The same random weights in fp16, as a diffusers folder and as one file in the original layout: 2 GB each."""
    folder, file = tmp_path / "folder", tmp_path / "base.safetensors"
    try:
        _write(folder, file)
        gc.collect()
        yield folder, file
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        file.unlink(missing_ok=True)


def _write(folder: Path, file: Path) -> None:
    base = random_base("sd1", torch.float16, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for _, model in base.components():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases are all alike otherwise, and could be exchanged unseen
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    pipeline = base.family.make_pipeline(base)
    pipeline.save_pretrained(folder)
    ldm_layout.write_checkpoint(pipeline, file, metadata={"modelspec.prediction_type": "epsilon"})


def what_it_is_and_makes(path, **section):
    """Load a base; return its facts, the hash of its weights, and a picture. Nothing of it stays in memory."""
    base = load(path, **section)
    ((picture, recipe),) = Engine(base).generate(REQUEST)
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in base.components()}
    facts = (base.family.name, base.prediction, base.resolution, recipe.scheduler, counts)
    weights = base.weights_sha256()
    del base
    gc.collect()
    return facts, weights, picture


def test_a_single_file_of_true_size_has_the_folders_weights_and_pictures(folder_and_file):
    folder, file = folder_and_file
    assert detect_base(file).components == {name: (count, "fp16") for name, count in PARAMETERS.items()}
    # Without base.config the file is described by what the package bundles.
    facts, weights, picture = what_it_is_and_makes(file, tokenizer=str(TINY_SD / "tokenizer"))
    assert facts == ("sd1", "epsilon", 512, "PNDMScheduler", PARAMETERS)
    darkest, brightest = picture.convert("L").getextrema()
    assert brightest - darkest > 20
    of_folder, weights_of_folder, picture_of_folder = what_it_is_and_makes(folder)
    assert of_folder == facts
    assert weights_of_folder == weights
    assert ImageChops.difference(picture_of_folder, picture).getbbox() is None
