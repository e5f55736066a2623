"""Noise as CUDA devices draw it, against published test vectors and numbers that devices have printed."""

import threading

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from sdlora.generation.denoising.noise import cuda_randn, drawing_noise, noise_generators, philox


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_is_that_of_its_authors_test_vectors(counter, key, words):
    made = philox(tuple(np.array([word], dtype=np.uint64) for word in counter), key)
    assert tuple(int(word[0]) for word in made) == words


@pytest.mark.parametrize(
    ("seed", "drawn", "first", "numbers"),
    [
        # torch.manual_seed(42); torch.randn(..., device="cuda"), as printed in public notes and bug reports
        (42, 0, 0, [0.1940, 2.1614, -0.1721, 0.8491, -1.9244, 0.6530, -0.6494, -0.8175, 0.5280, -1.2753, -1.6621]),
        (42, 0, 2048, [-0.4574, 0.8063, 0.1580]),
        (42, 1, 0, [0.1391, -0.1082, -0.7174, 0.7566]),
        (42, 2, 0, [-0.5187, 1.2268, 0.6255, -0.9117]),
        (42, 3, 0, [-0.6974, -1.8688, -0.8832, -1.6627]),
        (10, 0, 0, [-0.1029, 1.6810, -0.2708]),
    ],
)
def test_the_numbers_are_those_that_devices_print(seed, drawn, first, numbers):
    found = cuda_randn(seed, drawn, first + len(numbers))[first:]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, numbers, atol=5.1e-5)


def test_numbers_are_normal_and_go_on_from_tensor_to_tensor():
    first, second = cuda_randn(2**32 - 1, 0, 65536), cuda_randn(2**32 - 1, 1, 65536)
    for numbers in (first, second):
        assert numbers.mean() == pytest.approx(0, abs=0.02)
        assert numbers.std() == pytest.approx(1, abs=0.02)
        assert np.isfinite(numbers).all()
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    assert np.array_equal(first[:100], cuda_randn(2**32 - 1, 0, 100))


def test_the_librarys_samplers_draw_from_the_generators_they_are_given():
    one, other = noise_generators("cuda", [42, 10])
    with drawing_noise():
        drawn = torch.randn((1, 4, 2, 2), generator=one, device=one.device, dtype=torch.float16)
        both = randn_tensor((2, 1, 1, 3), generator=[one, other], device=torch.device("cpu"))
        plain = torch.randn((2,), generator=torch.Generator().manual_seed(3))
        spread = torch.randn(2, 3, generator=other)
    np.testing.assert_array_equal(drawn.flatten().numpy(), cuda_randn(42, 0, 16).astype(np.float16))
    np.testing.assert_array_equal(both[0].flatten().numpy(), cuda_randn(42, 1, 3))
    np.testing.assert_array_equal(both[1].flatten().numpy(), cuda_randn(10, 0, 3))
    np.testing.assert_array_equal(spread.flatten().numpy(), cuda_randn(10, 1, 6))
    assert torch.equal(plain, torch.randn((2,), generator=torch.Generator().manual_seed(3)))


def test_other_threads_are_not_touched():
    (generator,) = noise_generators("cuda", [42])
    found = []
    with drawing_noise():
        thread = threading.Thread(target=lambda: found.append(torch.randn((1,), generator=generator)))
        thread.start()
        thread.join()
    assert found[0].item() != pytest.approx(0.1940, abs=1e-3)


def test_noise_of_the_cpu_is_torchs_own():
    (generator,) = noise_generators("cpu", [5])
    with drawing_noise():
        drawn = torch.randn((1, 4, 8, 8), generator=generator)
    assert torch.equal(drawn, torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5)))
