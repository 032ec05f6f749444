#!/bin/bash
# The container of `make up`, `make down`, `make shell`: docker/compose.example.yaml for people without compose.
# IMAGE, WORK (folder), PORT, SSH_HOST_PORT choose others.
set -euo pipefail
cd "$(dirname "$0")/.."
docker=$(docker/engine.sh client)
image=${IMAGE:-dropforge}

up() {
	arguments=(--name dropforge --detach --restart unless-stopped --stop-timeout 150 --shm-size 1g
		--publish "127.0.0.1:${PORT:-8888}:8888" --publish "127.0.0.1:${SSH_HOST_PORT:-2222}:22" --volume "${WORK:-$PWD/work}:/workspace/work")
	if [[ ${DROPFORGE_DEVICE:-} != cpu ]] && command -v nvidia-smi >/dev/null; then
		arguments+=(--gpus all)
	fi
	for name in JUPYTER_PASSWORD SSH_KEY PUBLIC_KEY USER_PASSWORD HF_TOKEN WANDB_API_KEY DROPFORGE_DEVICE DROPFORGE_ALLOW_REMOTE_CODE; do
		[[ -z ${!name:-} ]] || arguments+=(--env "$name") # by name: values stay out of the process list
	done
	"$docker" run "${arguments[@]}" "$image" >/dev/null || not_started
	for _ in {1..120}; do
		log=$("$docker" logs dropforge 2>&1)
		if [[ $log == *"=== Dropforge "* && $log == *$'\n'==========* ]]; then
			sed -n '/^=== Dropforge /,/^=\{60,\}$/p' <<<"$log"
			return
		fi
		if [[ $("$docker" inspect -f '{{.State.Status}}{{.RestartCount}}' dropforge) != running0 ]]; then
			"$docker" rm --force dropforge >/dev/null
			printf '%s\n' "$log" >&2
			return 1
		fi
		sleep 0.5
	done
	printf '%s\n' "$log" >&2
	return 1
}

not_started() { # the engine has said why; a container that it could not start is left behind under this name
	if [[ $("$docker" inspect -f '{{.State.Status}}' dropforge 2>/dev/null) == created ]]; then
		"$docker" rm dropforge >/dev/null
	fi
	if [[ ${arguments[*]} == *"--gpus all"* ]]; then
		echo "fix: look the message up in docs/reference/container.md (Troubleshooting); DROPFORGE_DEVICE=cpu make up does without the GPU" >&2
	fi
	exit 1
}

down() {
	"$docker" stop --time 150 dropforge >/dev/null && "$docker" rm dropforge >/dev/null
}

shell() {
	terminal=$([[ ! -t 0 ]] || echo --tty)
	"$docker" exec --interactive ${terminal:+"$terminal"} dropforge dropforge-shell
}

"$1"
