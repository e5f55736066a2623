"""`sdlora upscale PICTURE ... --model FILE`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sdlora.data.headers import MAX_PIXELS, read_header
from sdlora.errors import ConfigError, OutputError
from sdlora.storage import atomic_path, check_writable, user_path


def run(arguments: list[str]) -> int:
    """Make the pictures larger that the command line names; returns the exit status."""
    options = _parser().parse_args(arguments)
    from sdlora.generation.upscaling.files import check_upscaler

    model, folder = user_path(options.model), user_path(options.out)
    scale = check_upscaler(model).scale
    targets = {user_path(name): folder / f"{Path(name).stem}-x{scale}.png" for name in options.pictures}
    _refuse(targets, scale)
    check_writable(folder)
    _upscale(targets, model, options.device)
    return 0


def _refuse(targets: dict[Path, Path], scale: int) -> None:
    """Raise for what cannot be done, before anything is."""
    for picture, target in targets.items():
        header = read_header(picture)
        if header.width * header.height * scale**2 > MAX_PIXELS:
            raise ConfigError(
                f"{picture}: {header.width}x{header.height} pixels would be {scale} times as wide and high, more than "
                f"{MAX_PIXELS // 10**6} megapixels; make it smaller first"
            )
        if target.exists():
            raise OutputError(f"{target}: is there already; remove it or choose another --out")
    if len(set(targets.values())) < len(targets):
        raise ConfigError("two of the pictures would be written under one name; upscale them into different folders")


def _upscale(targets: dict[Path, Path], model: Path, device: str | None) -> None:
    from sdlora.data.pictures import read_picture
    from sdlora.families.registry import find_device
    from sdlora.generation.upscaling.files import read_upscaler
    from sdlora.generation.upscaling.upscaler import upscale

    place, network = find_device(device), read_upscaler(model)
    for number, (picture, target) in enumerate(targets.items(), start=1):
        larger = upscale(network, read_picture(picture), place)
        with atomic_path(target) as temporary:
            larger.save(temporary, format="PNG")
        print(f"{target}  ({number} of {len(targets)}, {larger.width}x{larger.height})", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdlora upscale",
        description="Make pictures larger by a network of ESRGAN's kind, from a file that you have.",
    )
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="picture files")
    parser.add_argument("--model", required=True, metavar="FILE", help="ESRGAN or Real-ESRGAN, .safetensors or .pth")
    parser.add_argument("--out", default="outputs", help="folder for the PNG files NAME-x4.png (default: outputs)")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, mps; default: the GPU where there is one")
    return parser
