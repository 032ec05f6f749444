#!/bin/bash
# As the user the services run as, with their environment: a login shell, or the command given.
set -euo pipefail
(($#)) || set -- /bin/bash -l
# shellcheck disable=SC2016  # for the inner shell
with_environment=(/bin/bash -c '[[ ! -r /run/dropforge/env.sh ]] || . /run/dropforge/env.sh; exec "$@"' dropforge-shell "$@")
if [[ $(id -u) == 0 && $(stat -c %u /proc/1) != 0 ]]; then
	unset JUPYTER_PASSWORD USER_PASSWORD HF_TOKEN WANDB_API_KEY # `docker exec` hands on every variable of the container
	exec setpriv --reuid "$(stat -c %u /proc/1)" --regid "$(stat -c %g /proc/1)" --clear-groups "${with_environment[@]}"
fi
# Inside a session the environment is there already, perhaps changed on purpose; `docker exec --user` comes without it.
[[ -z ${DROPFORGE_CACHE:-} ]] || exec "$@"
exec "${with_environment[@]}"
