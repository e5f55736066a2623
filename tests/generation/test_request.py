import pytest

from sdlora.errors import ConfigError
from sdlora.generation.request import SEED_LIMIT, make_request


def test_defaults():
    request = make_request(prompt="x")
    assert (request.seed, request.count, request.steps, request.guidance_scale) == (0, 1, 25, 7.5)
    assert (request.width, request.height, request.adapters) == (0, 0, ())


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "prompt is not given"),
        ({"prompt": "x", "steps": 0}, "steps is 0; input should be greater than 0"),
        ({"prompt": "x", "steps": 1001}, "steps is 1001"),
        ({"prompt": "x", "count": 0}, "count is 0"),
        ({"prompt": "x", "seed": -1}, "seed is -1"),
        ({"prompt": "x", "seed": SEED_LIMIT}, f"seed is {SEED_LIMIT}"),
        ({"prompt": "x", "seed": SEED_LIMIT - 1, "count": 2}, "seed + count must not exceed 4294967296"),
        ({"prompt": "x", "width": 100}, "width is 100; input should be a multiple of 8"),
        ({"prompt": "x", "height": 5000}, "height is 5000"),
        ({"prompt": "x", "guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"prompt": "x", "guidance_scale": -1}, "guidance_scale is -1"),
        ({"prompt": 5}, "prompt is 5; input should be a valid string"),
        ({"prompt": "x", "sampler": "Eulr"}, "sampler is 'Eulr'; there is no sampler 'Eulr'; did you mean Euler?"),
        ({"prompt": "x", "sampler": 5}, "sampler is 5; input should be a valid string"),
        ({"prompt": "x", "sampler": "Euler", "schedule": "Karas"}, "did you mean Karras?"),
        ({"prompt": "x", "sampler": "DPM++ 2M Karras", "schedule": "Beta"}, "contradict each other"),
        ({"prompt": "x", "schedule": "Karras"}, "needs a sampler; name one, such as DPM++ 2M"),
        ({"prompt": "x", "sampler": "LCM", "steps": 51}, "the sampler LCM takes at most 50"),
        ({"prompt": "x", "guidance_rescale": 1.5}, "guidance_rescale is 1.5"),
        ({"prompt": "x", "noise": "gpu"}, "noise is 'gpu'; input should be 'cpu' or 'cuda'"),
        ({"prompt": "x", "zero_snr": "yes"}, "zero_snr is 'yes'"),
        ({"prompt": "x", "stps": 5}, "unknown key stps; did you mean steps?"),
        ({"prompt": "x", "adapters": [{"path": "a", "weight": 11}]}, "adapters.0.weight is 11"),
        ({"prompt": "x", "adapters": [{"path": "a", "weight": float("inf")}]}, "adapters.0.weight is inf"),
        ({"prompt": "x", "adapters": [{"path": "a"}, {"path": "a"}]}, "the same adapter is named twice"),
        ({"prompt": "x", "strength": 0.5}, "strength does nothing without image; give that too, or leave it out"),
        ({"prompt": "x", "hires_steps": 5, "hires_strength": 0.5}, "hires_steps and hires_strength do nothing without"),
        ({"prompt": "x", "image": "a.png", "mask_blur": 2}, "mask_blur does nothing without mask"),
        (
            {"prompt": "x", "image": "a.png", "mask": "b.png", "masked_padding": 8},
            "masked_padding does nothing without inpaint_area 'only masked'; give that too, or leave it out",
        ),
        (
            {"prompt": "x", "image": "a.png", "masked_padding": 8},
            "request: masked_padding does nothing without mask; give",
        ),
        (
            {"prompt": "x", "strength": 0.5, "hires_steps": 5},
            "without image, hires_steps does nothing without hires_scale",
        ),
        (
            {"prompt": "x", "zero_snr": "on", "sampler": "Heun"},
            "the sampler Heun cannot begin at pure noise, use Euler",
        ),
    ],
)
def test_a_wrong_request_is_refused_in_one_sentence(values, sentence):
    with pytest.raises(ConfigError) as caught:
        make_request(**values)
    message = str(caught.value)
    assert message.startswith("request: ")
    assert sentence in message
    assert "\n" not in message
    assert len(message) < 300


def test_names_of_samplers_are_put_as_they_are_written_here():
    request = make_request(prompt="x", sampler="dpm++ 2m karras")
    assert (request.sampler, request.schedule) == ("DPM++ 2M", "Karras")
    assert make_request(prompt="x", sampler="euler A", schedule="automatic").schedule == ""


def test_all_problems_come_at_once():
    with pytest.raises(ConfigError, match=r"guidance_rescale is 2.*; sampler is 'foo'.*; steps is 0|steps is 0.*'foo'"):
        make_request(prompt="x", guidance_rescale=2, sampler="foo", steps=0)
    with pytest.raises(ConfigError, match=r"seed is -1.*; steps is 0"):
        make_request(prompt="x", seed=-1, steps=0)
