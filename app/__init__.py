"""The web page. It drives models through sdlora's public names and imports no torch itself."""

import os

# Read by gradio when it is imported: with analytics on it contacts two hosts at every start.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
