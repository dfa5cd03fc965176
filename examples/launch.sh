# What the scripts below this folder share; to be sourced by them, not to be run. PYTHON names the interpreter.
set -eu -o pipefail

python=${PYTHON:-python3}
pids=()
nats=

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

# a NATS server, started here when none answers at NATS_SERVER
need_nats() {
	local address=${NATS_SERVER:-nats://localhost:4222} host nats_port n
	address=${address%%,*} address=${address#*://} address=${address##*@} address=${address%%/*}
	host=${address%:*} nats_port=${address##*:}
	[[ $nats_port == "$address" ]] && nats_port=4222
	listens "$host" "$nats_port" && return
	echo "no NATS server answers at $host:$nats_port; starting one"
	"$python" -m dynwire nats up --host 127.0.0.1 --port "$nats_port" &
	nats=$!
	for ((n = 0; n < 300; n++)); do
		listens "$host" "$nats_port" && break
		kill -0 "$nats" 2>/dev/null || exit 1
		sleep 0.1
	done
}

# a module with its flags, in the background
start() {
	"$python" -m "$@" &
	pids+=($!)
}

# until the frontend at PORT has a model with WORKERS workers, whose name is then in $name; one that cannot start ends all of it
await_model() {
	[[ -n $nats ]] && pids+=("$nats") # last: the others say good-bye over it
	name=
	until [[ -n $name ]]; do
		for pid in "${pids[@]}"; do
			kill -0 "$pid" 2>/dev/null || { wait "$pid" || exit $?; exit 1; }
		done
		sleep 0.2
		name=$("$python" - "$@" <<'END'
import json, sys, urllib.error, urllib.request
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
}
