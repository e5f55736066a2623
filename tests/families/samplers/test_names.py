"""The names of samplers and schedules, as people write them."""

import re

import pytest

from sdlora.families.samplers.names import _NEAREST, AUTOMATIC, SAMPLERS, SCHEDULES, sampler_and_schedule


@pytest.mark.parametrize(
    ("sampler", "schedule", "found"),
    [
        ("", "", ("", "")),
        ("", "automatic", ("", "")),
        ("Euler a", "", ("Euler a", "")),
        ("euler A", "Automatic", ("Euler a", "")),
        ("DPM++ 2M Karras", "", ("DPM++ 2M", "Karras")),
        ("dpm++ 2m karras", "automatic", ("DPM++ 2M", "Karras")),
        ("DPM++ 2M Karras", "karras", ("DPM++ 2M", "Karras")),
        ("DPM++ 2M SDE Heun Exponential", "", ("DPM++ 2M SDE Heun", "Exponential")),
        ("DPM2 a Karras", "", ("DPM2 a", "Karras")),
        ("DPM++ 2M", "sgm_uniform", ("DPM++ 2M", "SGM Uniform")),
        ("euler_ancestral", "ddim_uniform", ("Euler a", "DDIM")),
        ("dpmpp_2m_sde", "normal", ("DPM++ 2M SDE", "Normal")),
        ("DDIM", "trailing", ("DDIM", "Trailing")),
        ("DPM++ 2S a Karras", "", ("DPM++ 2S a", "Karras")),
        ("dpmpp_2s_ancestral", "", ("DPM++ 2S a", "")),
        ("restart", "", ("Restart", "")),
        ("DPM fast", "Automatic", ("DPM fast", "")),
        ("dpm_adaptive", "", ("DPM adaptive", "")),
        ("LCM", "Automatic", ("LCM", "")),
    ],
)
def test_what_people_write_is_understood(sampler, schedule, found):
    assert sampler_and_schedule(sampler, schedule) == found


@pytest.mark.parametrize("name", SAMPLERS)
def test_names_stay_as_they_are(name):
    for schedule in ("", *SAMPLERS[name].schedules):
        assert sampler_and_schedule(name, schedule) == (name, schedule)


@pytest.mark.parametrize(
    ("sampler", "schedule", "sentence"),
    [
        ("Eulr", "", "there is no sampler 'Eulr'; did you mean Euler?"),
        ("zzz", "", "there is no sampler 'zzz'; known are DPM++ 2M, "),
        ("Euler", "Karas", "there is no schedule 'Karas'; did you mean Karras?"),
        ("DEIS", "", "the sampler DEIS is not offered; the nearest is DPM++ 2M"),
        ("tcd", "", "the sampler TCD is not offered; the nearest is LCM"),
        ("DPM fast Karras", "", "sampler 'DPM fast' cannot take the schedule 'Karras'; it has one of its own; leave"),
        ("DPM adaptive", "Uniform", "sampler 'DPM adaptive' cannot take the schedule 'Uniform'; it has one of its own"),
        ("Restart", "Exponential", "sampler 'Restart' cannot take the schedule 'Exponential'; it takes Karras"),
        ("DDIM", "Karras", "sampler 'DDIM' cannot take the schedule 'Karras'; it takes DDIM and Trailing"),
        ("LCM", "Karras", "it has one of its own"),
        ("DPM++ 2M Karras", "Beta", "'DPM++ 2M Karras' and schedule 'Beta' contradict each other"),
        ("", "Karras", "the schedule 'Karras' needs a sampler"),
    ],
)
def test_what_there_is_not_is_refused_with_the_nearest(sampler, schedule, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        sampler_and_schedule(sampler, schedule)


def test_what_is_said_of_names_is_of_names_that_there_are():
    assert set(_NEAREST.values()) <= set(SAMPLERS)
    assert not set(_NEAREST) & set(SAMPLERS)
    for traits in SAMPLERS.values():
        assert set(traits.schedules) <= set(SCHEDULES) - {AUTOMATIC}
        assert traits.automatic in (traits.schedules or (AUTOMATIC,))
