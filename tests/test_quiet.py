import os
import subprocess
import sys

SCRIPT = """
import logging, os, warnings
from sdlora.quiet import quiet_libraries
quiet_libraries()
logging.getLogger("diffusers").warning("a warning of diffusers")
logging.getLogger("transformers.modeling").error("an error of transformers")
logging.getLogger("sdlora").warning("a warning of ours")
warnings.warn_explicit("from torch", UserWarning, "x.py", 1, module="torch.nn.functional")
warnings.warn_explicit("from user code", UserWarning, "y.py", 1, module="torchlight")
print(os.environ.get("GRADIO_ANALYTICS_ENABLED"), os.environ.get("TOKENIZERS_PARALLELISM"))
"""


# What quiet_libraries sets, and may have set already in the process of the tests.
OWN = {
    "SDLORA_DEBUG",
    "TOKENIZERS_PARALLELISM",
    "GRADIO_ANALYTICS_ENABLED",
    "TRANSFORMERS_VERBOSITY",
    "DIFFUSERS_VERBOSITY",
}


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key not in OWN}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env={**kept, **environment}
    )


def test_only_the_libraries_warnings_are_silenced():
    result = run()
    assert result.stdout == "False false\n"
    assert "a warning of diffusers" not in result.stderr
    assert "from torch" not in result.stderr
    for kept in ("an error of transformers", "a warning of ours", "from user code"):
        assert kept in result.stderr


def test_the_users_own_setting_stays():
    assert run(TOKENIZERS_PARALLELISM="true").stdout == "False true\n"


def test_debug_shows_everything():
    result = run(SDLORA_DEBUG="1")
    assert result.stdout == "None None\n"
    for shown in ("a warning of diffusers", "from torch", "an error of transformers", "a warning of ours"):
        assert shown in result.stderr
