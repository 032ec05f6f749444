#!/bin/bash
# Map the user, check the folder, give up every privilege, then init -> supervisord; or one command, when one is given.
# What each variable means: docs/reference/container.md.
set -euo pipefail
data=${DROPFORGE_DATA:-/workspace/work} run=/run/dropforge
# The first process of a container ignores signals it has no handler for, and a stop may come while all this still starts.
trap 'exit 0' TERM INT

fail() {
	printf 'dropforge: %s\n' "$@" >&2
	exit 64
}

# Secrets may come as files, and those may be readable for root alone.
for name in JUPYTER_PASSWORD USER_PASSWORD HF_TOKEN WANDB_API_KEY SSH_KEY PUBLIC_KEY; do
	file=${name}_FILE
	[[ -n ${!file:-} ]] || continue
	[[ -r ${!file} && -f ${!file} ]] || fail "$file: ${!file} is not a file that uid $(id -u) can read"
	value=$(<"${!file}")
	export "$name=$value"
	unset "$file"
done
if ! { mkdir -p "$run" && : >"$run/.write-test"; } 2>/dev/null; then
	fail "$run cannot be written" "fix: with --read-only, give --tmpfs $run --tmpfs /tmp"
fi
[[ $data == /* && -d $data ]] || fail "DROPFORGE_DATA: the folder $data does not exist in the container"

name_user() { # the name dropforge means uid $1 from here on; this name service refuses ids below 500
	rm -rf "$run/users"
	mkdir -m 755 "$run/users"
	echo "dropforge:x:$1:$(($2 < 500 ? 100 : $2)):Dropforge:$data/home:/bin/bash" >"$run/users/passwd"
	echo "dropforge:x:$2:" >"$run/users/group"
}

if [[ $(id -u) == 0 ]]; then
	owner=$(stat -c %u "$data")
	uid=${PUID:-${NB_UID:-$((owner == 0 ? 1000 : owner))}}
	gid=${PGID:-${NB_GID:-$([[ $uid == "$owner" ]] && stat -c %g "$data" || echo "$uid")}}
	[[ $uid =~ ^[1-9][0-9]{0,8}$ && $gid =~ ^[0-9]{1,9}$ ]] ||
		fail "PUID=$uid PGID=$gid: both must be numbers, and PUID not 0: services never run as root"
	if ! setpriv --reuid "$uid" --regid "$gid" --clear-groups true 2>/dev/null; then
		fail "started as root, but without the right to become uid $uid (capabilities SETUID, SETGID)" \
			"fix: docker run --user $uid:$gid ..."
	fi
	find "$run" -mindepth 1 -delete
	chown "$uid:$gid" "$run" && chmod 755 "$run"
	name_user "$uid" "$gid"
	# Docker creates a missing mount folder as root; what root owns at the top of the data root becomes the service's.
	find "$data" -maxdepth 2 -xdev -uid 0 -type d -exec chown "$uid:$gid" {} + 2>/dev/null || true
	rm -f /etc/sudoers.d/dropforge 2>/dev/null || true
	if [[ -n ${USER_PASSWORD:-} ]]; then
		{ chpasswd <<<"dropforge:$USER_PASSWORD" && echo 'dropforge ALL=(ALL:ALL) ALL' >/etc/sudoers.d/dropforge; } ||
			fail "USER_PASSWORD: sudo could not be set up (is the root file system read-only?)"
	fi
	/opt/dropforge/hooks.sh /etc/dropforge/before-start.d
	chown "$uid" /proc/$$/fd/1 /proc/$$/fd/2 || true # so that services can open their log by name
	exec setpriv --reuid "$uid" --regid "$gid" --clear-groups env DROPFORGE_STARTED_BY=root "$0" "$@"
fi

if [[ ${DROPFORGE_STARTED_BY:-} != root ]]; then
	find "$run" -mindepth 1 -delete
	name_user "$(id -u)" "$(id -g)"
	[[ -z ${USER_PASSWORD:-} ]] || fail "USER_PASSWORD: sudo needs a container started as root" "fix: no --user"
	/opt/dropforge/hooks.sh /etc/dropforge/before-start.d
fi
if ! (: >"$data/.write-test" && rm "$data/.write-test") 2>/dev/null; then
	fail "$data cannot be written by uid $(id -u), gid $(id -g); it belongs to $(stat -c '%u:%g, mode %a' "$data")" \
		"fix: docker run -e PUID=$(stat -c %u "$data") -e PGID=$(stat -c %g "$data") ..., or chown the folder on the host"
fi
export USER=dropforge LOGNAME=dropforge HOME=$data/home DROPFORGE_DATA=$data DROPFORGE_CACHE=$data/cache/dropforge
export HF_HOME=${HF_HOME:-$data/cache/huggingface} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$data/cache/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$data/cache/inductor} JUPYTER_RUNTIME_DIR=$run/jupyter
[[ $DROPFORGE_VARIANT != cpu ]] || export DROPFORGE_DEVICE=${DROPFORGE_DEVICE:-cpu}
[[ -z ${HF_TOKEN:-} ]] || export HF_TOKEN_PATH=$run/secrets/HF_TOKEN
mkdir -p "$HOME"
(($# == 0)) || exec tini -s -- "$@"
/opt/venv/bin/python /opt/dropforge/prepare.py &
wait $! # unlike a program in the foreground, it lets the trap interrupt
unset JUPYTER_PASSWORD USER_PASSWORD HF_TOKEN WANDB_API_KEY SSH_KEY PUBLIC_KEY DROPFORGE_STARTED_BY
exec tini -s -- /opt/venv/bin/python /opt/dropforge/supervise.py
