"""`accelerate launch train/train_lora.py --config FILE.toml --section.field value`: `sdlora train` under a launcher."""

import sys

from sdlora.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("train", sys.argv[1:]))
