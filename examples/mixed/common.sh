# What the scripts beside this file share; not to be run. They set: title, events (DYN_EVENT_PLANE), and frontend_flags.
# shellcheck source=../launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

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

export DYN_REQUEST_PLANE=tcp DYN_EVENT_PLANE=$events
[[ $events == none ]] || need_nats

start dynwire.frontend --http-port "$port" --router-mode kv "${frontend_flags[@]}"
for ((n = 0; n < workers; n++)); do
	if [[ -n $mock ]]; then
		# small blocks, so that the curl below fills some
		start dynwire.mocker --block-size 8 ${model:+--model "$model"} "$@"
	else
		start dynwire.vllm --model "${model:-Qwen/Qwen3-0.6B}" "$@"
	fi
done
await_model "$port" "$workers"

cat <<END

$name is served by $workers workers: requests over tcp, $title
Ask twice: the second time most of the prompt comes from the cache of the worker that has it.

curl -s localhost:$port/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{"model": "$name", "messages": [{"role": "user", "content": "Tell me of the island, its harbour, the lighthouse and the storm."}], "max_tokens": 32}'

What the router expected and found: curl -s localhost:$port/metrics | grep dynwire_router_ — or http://localhost:$port/ in a browser.
Ctrl-C ends the frontend and the workers.
END
wait -n "${pids[@]}"
