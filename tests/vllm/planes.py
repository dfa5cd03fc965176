"""One vLLM engine behind the worker's handler on every plane, and behind a handler that calls vLLM directly.

``python tests/vllm/planes.py MODEL PLANE …``; endpoints ``test.PLANE.generate``, ``test.direct.generate`` and
``test.direct.requests`` (how many vLLM has, and how many were aborted).
"""

from __future__ import annotations

import sys
from typing import Any

from dynwire import AsyncNetworkManager
from dynwire.config import load_config
from dynwire.vllm.__main__ import parser
from dynwire.vllm.engine import engine_config, require_vllm, start_engine, stop_engine
from dynwire.vllm.guard import Guard
from dynwire.vllm.worker import VllmWorker
from dynwire.workers.process import Signals, run_process
from dynwire.workers.protocol import EngineRequest


async def main(arguments: Any, planes: list[str]) -> bool:
    from vllm import SamplingParams, TokensPrompt

    signals, guard = Signals(), Guard()
    args, config = engine_config(arguments, None)
    llm = await start_engine(args, config, signals.first, guard)
    worker = VllmWorker(llm)
    managers = [AsyncNetworkManager(config=load_config({"request_plane": plane})) for plane in planes]

    async def direct(request: dict[str, Any]) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=request["max_tokens"], ignore_eos=True)
        tokens: list[int] = []
        async for output in llm.generate(TokensPrompt(prompt_token_ids=request["token_ids"]), params, request["id"]):
            tokens = list(output.outputs[0].token_ids)  # all so far: vLLM's default
        return tokens

    aborted: list[str] = []
    abort = llm.abort

    async def counted(request_id: str, internal: bool = False) -> None:
        aborted.append(request_id)
        await abort(request_id, internal)

    llm.abort = counted  # vLLM's own way to it as well, when a generator of its outputs is left

    async def requests(request: None) -> tuple[int, int]:
        return llm.get_num_unfinished_requests(), len(aborted)

    try:
        for plane, manager in zip(planes, managers, strict=True):
            await manager.endpoint(f"test.{plane}.generate").serve(worker.generate, request_type=EngineRequest)
        await managers[0].endpoint("test.direct.generate").serve(direct)
        await managers[0].endpoint("test.direct.requests").serve(requests)
        print(f"serving {', '.join(planes)}", flush=True)
        await signals.first.wait()
    finally:
        for manager in managers:
            await manager.close()
        await stop_engine(llm)
        guard.close()
    return False


if __name__ == "__main__":
    require_vllm()
    _model, *_planes = sys.argv[1:]
    flags = ["--model", _model, "--enforce-eager", "--dtype", "float32", "--block-size", "32", "--disable-log-stats"]
    _arguments = parser().parse_args(flags)
    sys.exit(run_process("planes", lambda: main(_arguments, _planes)))
