#!/bin/bash
# As the user the services run as, with their environment: a login shell, or the command given.
set -euo pipefail
(($#)) || set -- /bin/bash -l
# shellcheck disable=SC2016  # for the inner shell
as_service=(/bin/bash -c '[[ ! -r /run/dropforge/env.sh ]] || . /run/dropforge/env.sh; exec "$@"' dropforge-shell "$@")
if [[ $(id -u) == 0 && $(stat -c %u /proc/1) != 0 ]]; then
	exec setpriv --reuid "$(stat -c %u /proc/1)" --regid "$(stat -c %g /proc/1)" --clear-groups "${as_service[@]}"
fi
exec "${as_service[@]}"
