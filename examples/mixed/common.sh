# What the scripts beside this file share; not to be run. They set: title, events (DYN_EVENT_PLANE), and frontend_flags.
set -eu -o pipefail

usage() {
	cat <<END
${0##*/} [--mock] [options] [-- worker flags]

$title
Starts a frontend with KV-aware routing and its workers, requests over tcp, and ends them on Ctrl-C.

  --mock                  the simulated engine instead of vLLM
  --model MODEL           directory or hub name (default: Qwen/Qwen3-0.6B; with --mock the tiny one in the package)
  --workers N             workers (default: 2)
  --http-port PORT        port of the frontend (default: DYN_HTTP_PORT, or 8000)

Everything after -- goes to the workers, for example -- --max-model-len 4096. PYTHON names the interpreter (default: python3).
END
	[[ $events == none ]] || echo "A NATS server is started when none answers at NATS_SERVER (default: nats://localhost:4222)."
}

mock='' model='' workers=2 port=${DYN_HTTP_PORT:-8000}
while (($#)); do
	case $1 in
	--mock) mock=1 ;;
	--model) model=${2:?--model needs a value} && shift ;;
	--workers) workers=${2:?--workers needs a value} && shift ;;
	--http-port) port=${2:?--http-port needs a value} && shift ;;
	-h | --help) usage && exit ;;
	--) shift && break ;;
	*) echo "unknown option $1" >&2 && usage >&2 && exit 2 ;;
	esac
	shift
done

python=${PYTHON:-python3}
export DYN_REQUEST_PLANE=tcp DYN_EVENT_PLANE=$events
pids=()

# in the order of starting, so that the frontend stops asking before the workers drain
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
if [[ $events != none ]]; then
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

"$python" -m dynwire.frontend --http-port "$port" --router-mode kv "${frontend_flags[@]}" &
pids+=($!)
for ((n = 0; n < workers; n++)); do
	if [[ -n $mock ]]; then
		# small blocks, so that the curl below fills some
		"$python" -m dynwire.mocker --block-size 8 ${model:+--model "$model"} "$@" &
	else
		"$python" -m dynwire.vllm --model "${model:-Qwen/Qwen3-0.6B}" "$@" &
	fi
	pids+=($!)
done
[[ -n $nats ]] && pids+=("$nats") # last: the others say good-bye over it

# until all workers are there; one that cannot start ends all of it
name=
until [[ -n $name ]]; do
	for pid in "${pids[@]}"; do
		kill -0 "$pid" 2>/dev/null || { wait "$pid" || exit $?; exit 1; }
	done
	sleep 0.2
	name=$("$python" - "$port" "$workers" <<'END'
import json, os, sys, urllib.error, urllib.request
port, workers = sys.argv[1:]
try:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/state.json", timeout=2) as reply:
        models = json.load(reply)["models"]
except (OSError, urllib.error.URLError):
    models = []
print(next((model["id"] for model in models if len(model["instances"]) >= int(workers)), ""))
END
	)
done

cat <<END

$name is served by $workers workers: requests over tcp, $title
Ask twice: the second time most of the prompt comes from the cache of the worker that has it.

curl -s localhost:$port/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{"model": "$name", "messages": [{"role": "user", "content": "Tell me of the island, its harbour, the lighthouse and the storm."}], "max_tokens": 32}'

What the router expected and found: curl -s localhost:$port/metrics | grep dynwire_router_ — or http://localhost:$port/ in a browser.
Ctrl-C ends the frontend and the workers.
END
wait -n "${pids[@]}"
