#!/bin/bash
# Run the executable files of a folder in order of name. A failing one stops the start, unless HOOK_ERRORS=go.
set -euo pipefail
for hook in "$1"/*; do
	[[ -f $hook && -x $hook ]] || continue
	echo "dropforge: running $hook"
	"$hook" && continue
	status=$?
	echo "dropforge: $hook ended with status $status" >&2
	[[ ${HOOK_ERRORS:-stop} == go ]] || exit 65
done
