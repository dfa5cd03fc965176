#!/usr/bin/env bash
# One frontend and one worker on the request plane of your choice. See --help.
# shellcheck source=../../../launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../../launch.sh"

usage() {
	cat <<'END'
agg_request_planes.sh --tcp | --http | --nats [--mock] [options] [-- worker flags]

Starts a frontend and a vLLM worker that talk over the chosen request plane, and ends both on Ctrl-C.

  --tcp, --http, --nats   request plane; --nats starts a server of its own when none answers at NATS_SERVER
  --mock                  the simulated engine instead of vLLM
  --model MODEL           directory or hub name (default: Qwen/Qwen3-0.6B; with --mock the tiny one in the package)
  --http-port PORT        port of the frontend (default: DYN_HTTP_PORT, or 8000)

Everything after -- goes to the worker, for example -- --max-model-len 4096. PYTHON names the interpreter (default: python3).
END
}

plane= mock= model= port=${DYN_HTTP_PORT:-8000}
while (($#)); do
	case $1 in
	--tcp | --http | --nats) plane=${1#--} ;;
	--mock) mock=1 ;;
	--model) model=${2:?--model needs a value} && shift ;;
	--http-port) port=${2:?--http-port needs a value} && shift ;;
	-h | --help) usage && exit ;;
	--) shift && break ;;
	*) echo "unknown option $1" >&2 && usage >&2 && exit 2 ;;
	esac
	shift
done
if [[ -z $plane ]]; then
	echo "choose a request plane: --tcp, --http or --nats" >&2
	exit 2
fi

export DYN_REQUEST_PLANE=$plane
[[ $plane == nats ]] && need_nats

start dynwire.frontend --http-port "$port"
if [[ -n $mock ]]; then
	start dynwire.mocker ${model:+--model "$model"} "$@"
else
	start dynwire.vllm --model "${model:-Qwen/Qwen3-0.6B}" "$@"
fi
await_model "$port" 1

cat <<END

$name is served over $plane. Try it:

curl localhost:$port/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{"model": "$name", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64}'

Ctrl-C ends the frontend and the worker.
END
wait -n "${pids[@]}"
