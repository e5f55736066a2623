"""Offloading, channels last, the compiled UNet, and half precision with mixed adapters."""

import numpy as np
import pytest
import torch
from engine_help import ask, make, same, using
from every_family import one_family, two_families

from sdlora.adapters.write import write_adapter
from sdlora.config import BaseSection
from sdlora.errors import ConfigError
from sdlora.families.registry import load_base
from sdlora.generation import engine as engine_module
from sdlora.generation import memory
from sdlora.generation.engine import Engine


@pytest.fixture
def adapters(tiny_base, make_adapter, tmp_path) -> list[str]:
    paths = [str(tmp_path / f"{seed}.safetensors") for seed in range(2)]
    for seed, path in enumerate(paths):
        write_adapter(make_adapter(tiny_base(), seed=seed, alpha=4.0), path)
    return paths


class Moves:
    """Which part of a base is moved where; what works must be on the device, and nothing else may be."""

    def __init__(self, base, monkeypatch) -> None:
        self.log: list[tuple[str, str]] = []
        self.there = {name for name, _ in base.components()}
        elsewhere = object()  # without a GPU both places would be the CPU
        monkeypatch.setattr(memory, "_CPU", elsewhere)

        def to(name, place):
            self.log.append((name, "off" if place is elsewhere else "on"))
            (self.there.discard if place is elsewhere else self.there.add)(name)

        def watched(name, real):
            def run(*arguments, **named):
                texts = {name for name in self.there if name.startswith("text")}
                assert name in self.there and self.there == (texts if name.startswith("text") else {name})
                return real(*arguments, **named)

            return run

        for name, model in base.components():
            monkeypatch.setattr(model, "to", lambda place, name=name: to(name, place))
            method = "decode" if name == "vae" else "forward"
            monkeypatch.setattr(model, method, watched(name, getattr(model, method)))


@two_families
def test_with_offloading_each_part_is_on_the_device_only_while_it_works(tiny_base, monkeypatch):
    base = tiny_base()
    plain = make(Engine(tiny_base()), ask(count=2, steps=2))
    moves = Moves(base, monkeypatch)
    engine = Engine(base, offload="model")
    assert not moves.there  # at first nothing is
    moves.log.clear()
    assert same(plain, make(engine, ask(count=2, steps=2)))
    texts = list(base.text_encoders)
    one = [(name, "on") for name in texts] + [(name, "off") for name in texts]
    one += [(part, where) for part in ("unet", "vae") for where in ("on", "off")]
    assert moves.log == one * 2


@one_family
def test_a_base_that_is_offloaded_from_the_start_is_looked_at_on_the_device(tiny_base, monkeypatch):
    """The colours of previews are fitted to what its VAE makes."""
    base = tiny_base()
    moves = Moves(base, monkeypatch)
    encode = base.vae.encode
    monkeypatch.setattr(base.vae, "encode", lambda pixels: moves.there == {"vae"} and encode(pixels))
    monkeypatch.setattr(memory, "load_base", lambda *_, **__: base)
    Engine("tiny", offload="model")
    assert not moves.there


@one_family
def test_parts_are_off_again_after_an_error(tiny_base, monkeypatch):
    base = tiny_base()
    moves = Moves(base, monkeypatch)
    engine = Engine(base, offload="model")
    with torch.no_grad():
        base.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(Exception, match="the UNet gave NaN"):
        make(engine, ask())
    assert not moves.there


@one_family
def test_all_features_work_with_offloading(tiny_base, tmp_path):
    engine, plain = Engine(tiny_base(), offload="model"), Engine(tiny_base())
    request = ask(width=32, height=32, hires_scale=1.5, hires_upscaler="lanczos")
    assert same(make(engine, request), make(plain, request))
    ((picture, _),) = engine.generate(ask())
    picture.save(tmp_path / "a.png")
    start = ask(image=str(tmp_path / "a.png"), strength=0.5)
    assert same(make(engine, start), make(plain, start))


@two_families
def test_a_base_is_loaded_part_by_part(tiny_folder, shape, monkeypatch):
    order = []
    real_fetch, real_rest = memory.LoadedBase.fetch_unet, memory.Placement.rest
    monkeypatch.setattr(memory.LoadedBase, "fetch_unet", lambda base: order.append("fetch") or real_fetch(base))
    monkeypatch.setattr(memory.Placement, "rest", lambda place: order.append("rest") or real_rest(place))
    section = BaseSection(path=str(tiny_folder(shape)), precision="fp32")
    engine = Engine(section, device="cpu", offload="model")
    assert order == ["rest", "fetch", "rest"]
    assert same(make(engine, ask()), make(Engine(section, device="cpu"), ask()))


def test_offloading_a_quantised_base_is_refused():
    with pytest.raises(ConfigError, match="offload = model moves whole weights, which quantize = nf4"):
        Engine(BaseSection(path="tiny", quantize="nf4"), offload="model")


@one_family
def test_channels_last_changes_how_weights_lie_and_nothing_else(tiny_base):
    base = tiny_base()
    digest = base.weights_sha256()
    engine = Engine(base, channels_last=True)
    conv = base.unet.down_blocks[0].resnets[0].conv1.weight
    assert conv.is_contiguous(memory_format=torch.channels_last) and not conv.is_contiguous()
    assert engine.weights_sha256() == digest
    for one, other in zip(make(engine, ask(count=2)), make(Engine(tiny_base()), ask(count=2)), strict=True):
        assert np.abs(one - other).max() <= 1


@pytest.fixture
def compiling(monkeypatch):
    """Compiles without a compiler of the system: the graph is captured and run by torch."""
    graphs = []

    def backend(graph, inputs):
        def run(*arguments):
            graphs.append(1)
            return graph.forward(*arguments)

        return run

    real = memory.CompiledUnet
    monkeypatch.setattr(engine_module, "CompiledUnet", lambda base: real(base, backend))
    yield graphs
    torch._dynamo.reset()


@one_family  # capturing takes many seconds
def test_a_compiled_unet_gives_the_same_pictures(tiny_base, compiling, adapters):
    base = tiny_base()
    engine, plain = Engine(base, compile=True), Engine(tiny_base())
    digest, request = engine.weights_sha256(), ask(steps=1)
    (expected,) = make(plain, request)
    assert np.abs(make(engine, request, should_stop=lambda: False)[0] - expected).max() <= 1
    ran = len(compiling)
    assert ran > 0
    adapted = ask(steps=1, adapters=using((adapters[0], 1.0)))
    assert same(make(engine, adapted), make(plain, adapted))
    assert len(compiling) == ran  # adapters act, so it ran as it is
    assert np.abs(make(engine, request)[0] - expected).max() <= 1
    assert len(compiling) > ran
    assert "forward" not in vars(base.unet) and engine.weights_sha256() == digest


@pytest.mark.parametrize(("shape", "precision"), [("sd1", "bf16"), ("sd1", "fp16"), ("sd2", "bf16"), ("sdxl", "fp16")])
def test_half_precision_with_mixed_adapters_is_close_to_full(tiny_folder, tiny_base, adapters, shape, precision):
    base = load_base(BaseSection(path=str(tiny_folder(shape)), precision=precision), "cpu")
    digest = base.weights_sha256()
    mixes = [using((adapters[0], 1.0)), using((adapters[0], 0.5), (adapters[1], 0.5)), ()]
    requests = [ask(seed=seed, steps=2, guidance_scale=2, adapters=mix) for seed, mix in enumerate(mixes)]
    engine, exact = Engine(base), Engine(tiny_base())
    made = {
        number: np.asarray(picture).astype(int) for number, picture, _ in engine.generate_all(requests, batch_size=3)
    }
    for number, request in enumerate(requests):
        (expected,) = make(exact, request)
        assert np.abs(made[number] - expected).mean() < 4
    assert engine.weights_sha256() == digest
