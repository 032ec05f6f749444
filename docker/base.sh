#!/bin/bash
# A Debian 12 base image without a registry: debootstrap + docker import, about half a minute. Prints the image's name.
set -euo pipefail
name=dropforge-base:bookworm
docker=$("$(dirname "$0")/engine.sh" client)
if ! "$docker" image inspect "$name" >/dev/null 2>&1; then
	folder=$(mktemp -d)
	trap 'rm -rf "$folder"' EXIT
	command -v debootstrap >/dev/null || {
		echo "debootstrap is missing (Debian, Ubuntu: apt-get install debootstrap)" >&2
		exit 1
	}
	debootstrap --variant=minbase bookworm "$folder/root" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >"$folder/log" 2>&1 || {
		tail -n 20 "$folder/log" >&2
		exit 1
	}
	echo "deb http://deb.debian.org/debian-security bookworm-security main" >>"$folder/root/etc/apt/sources.list"
	rm -rf "$folder"/root/var/cache/apt/archives/*.deb "$folder"/root/var/lib/apt/lists/*
	tar -C "$folder/root" -c . | "$docker" import - "$name" >/dev/null
fi
echo "$name"
