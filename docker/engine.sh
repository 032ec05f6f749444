#!/bin/bash
# The Docker engine for builds and tests.
#   engine.sh client    path of a docker client that builds with BuildKit (Debian's own before others on PATH)
#   engine.sh start     start an engine unless one answers; prints what it did
#   engine.sh stop      stop the engine that `start` started, and no other
set -euo pipefail
state=${XDG_CACHE_HOME:-$HOME/.cache}/dropforge/engine

client() {
	for candidate in /usr/bin/docker "$(command -v docker || true)"; do
		[[ ! -x $candidate ]] || { echo "$candidate" && return; }
	done
	echo "there is no docker client (Debian: apt-get install docker.io; others: https://docs.docker.com/engine/install)" >&2
	return 1
}

start() {
	docker=$(client)
	if timeout 20 "$docker" version >/dev/null 2>&1; then
		echo "engine: one is running"
		return
	fi
	mkdir -p "$state"
	setsid dockerd >"$state/log" 2>&1 </dev/null &
	echo $! >"$state/pid"
	for _ in {1..60}; do
		if timeout 5 "$docker" version >/dev/null 2>&1; then
			echo "engine: started, process $(<"$state/pid"), log $state/log"
			return
		fi
		sleep 0.5
	done
	tail -n 20 "$state/log" >&2
	echo "engine: dockerd did not come up" >&2
	return 1
}

stop() {
	[[ -f $state/pid ]] || return 0
	pid=$(<"$state/pid")
	if [[ $(ps -o comm= -p "$pid" 2>/dev/null) == dockerd ]]; then
		kill "$pid"
		for _ in {1..60}; do
			kill -0 "$pid" 2>/dev/null || break
			sleep 0.5
		done
	fi
	rm -f "$state/pid"
}

"$1"
