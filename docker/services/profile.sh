# shellcheck shell=sh source=/dev/null
# Login shells (SSH, Jupyter's terminal, dropforge-shell): /etc/profile has just set a PATH of its own.
if [ -r /run/dropforge/env.sh ]; then
	. /run/dropforge/env.sh
fi
