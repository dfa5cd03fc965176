#!/bin/sh
# Makes an environment with Dynamo's frontend and simulated engine, what benchmarks/serving.py compares with (400 MB, half a minute).
#
#   benchmarks/peers/dynamo_stack.sh DIRECTORY [PYTHON]
#
# ai-dynamo is installed without what it asks for, which is mostly for its GPU engines; what frontend and mocker import is named here.
set -eu
directory=$1
python=${2:-python3}
export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
[ -x "$directory/bin/python" ] || "$python" -m venv "$directory"
"$directory/bin/python" -m pip install --quiet ai-dynamo-runtime==1.6.1 uvloop tokenizers aiohttp msgspec pyzmq prometheus-client
"$directory/bin/python" -m pip install --quiet --no-deps ai-dynamo==1.6.1
