"""Load on OpenAI-compatible servers: what ``dynwire load`` does, for use from programs as well.

`http` is the client, `prompts` makes what is sent, `run` sends it, `report` says what came of it. Needs `httptools`.
"""
