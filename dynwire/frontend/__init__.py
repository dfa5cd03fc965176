"""OpenAI-compatible frontend: HTTP in, requests to the workers of the model out. ``python -m dynwire.frontend``."""
