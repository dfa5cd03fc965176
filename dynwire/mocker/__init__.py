"""Simulated engine: a worker that schedules, caches and answers like an inference engine, without a model.

``python -m dynwire.mocker`` runs it. What decides is sans-IO and knows no clock: `blocks` (the paged cache), `scheduler`
(continuous batching), `timing` (how long a step takes), `text` (which tokens come). `engine` moves it along in real time.
"""

from pathlib import Path

TINY_MODEL = Path(__file__).parent / "model"
"""A model directory without weights that ships in the package: tokenizer of 1,024 tokens, chat template, configuration."""
