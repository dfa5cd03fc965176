#!/usr/bin/env bash
# One frontend and one worker on the request plane of your choice. See --help.
set -eu -o pipefail

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

python=${PYTHON:-python3}
export DYN_REQUEST_PLANE=$plane
pids=()

# in the order of starting, so that the frontend stops asking before the worker drains
stop() {
	trap - EXIT INT TERM
	for pid in "${pids[@]}"; do
		kill "$pid" 2>/dev/null || true
		wait "$pid" 2>/dev/null || true
	done
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# whether something listens at HOST PORT
listens() { (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; }

nats=
if [[ $plane == nats ]]; then
	address=${NATS_SERVER:-nats://localhost:4222}
	address=${address%%,*} address=${address#*://} address=${address##*@} address=${address%%/*}
	host=${address%:*} nats_port=${address##*:}
	[[ $nats_port == "$address" ]] && nats_port=4222
	if ! listens "$host" "$nats_port"; then
		echo "no NATS server answers at $host:$nats_port; starting one"
		"$python" -m dynwire nats up --host 127.0.0.1 --port "$nats_port" &
		nats=$!
		for ((n = 0; n < 300; n++)); do
			listens "$host" "$nats_port" && break
			kill -0 "$nats" 2>/dev/null || exit 1
			sleep 0.1
		done
	fi
fi

"$python" -m dynwire.frontend --http-port "$port" &
pids+=($!)
if [[ -n $mock ]]; then
	"$python" -m dynwire.mocker ${model:+--model "$model"} "$@" &
else
	"$python" -m dynwire.vllm --model "${model:-Qwen/Qwen3-0.6B}" "$@" &
fi
pids+=($!)
[[ -n $nats ]] && pids+=("$nats") # last: the others say good-bye over it

# until the model is there; a worker that cannot start ends all of it
name=
until [[ -n $name ]]; do
	for pid in "${pids[@]}"; do
		kill -0 "$pid" 2>/dev/null || { wait "$pid" || exit $?; exit 1; }
	done
	sleep 0.2
	name=$("$python" - "$port" <<'END'
import json, sys, urllib.error, urllib.request
try:
    with urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/v1/models", timeout=2) as reply:
        models = json.load(reply)["data"]
except (OSError, urllib.error.URLError):
    models = []
print(models[0]["id"] if models else "")
END
	)
done

cat <<END

$name is served over $plane. Try it:

curl localhost:$port/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{"model": "$name", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64}'

Ctrl-C ends the frontend and the worker.
END
wait -n "${pids[@]}"
