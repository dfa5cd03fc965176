"""vLLM as a worker: its AsyncLLM behind an endpoint, tokens in and tokens out, with its KV cache events for routers.

``python -m dynwire.vllm`` runs it. vLLM itself is imported by that command only, never by importing this package.
"""
