#!/bin/sh
# The operating system's packages and the service account. Debian 12 and Ubuntu 24.04.
set -eu
variant=$1
packages="ca-certificates curl git less libgomp1 libnss-extrausers nano openssh-server procps python3 python3-venv sudo tini"
if [ "$variant" != cpu ]; then
	packages="$packages gcc libc6-dev python3-dev" # Triton compiles its launchers with them at run time
fi
export DEBIAN_FRONTEND=noninteractive
rm -f /etc/apt/apt.conf.d/docker-clean
apt-get update -qq
# shellcheck disable=SC2086  # a list of words
apt-get install -y -qq --no-install-recommends $packages
rm -rf /etc/ssh/ssh_host_* # every data root gets its own

userdel -r ubuntu 2>/dev/null || true # Ubuntu's image has an account with uid 1000
groupadd --gid 1000 dropforge
useradd --uid 1000 --gid 1000 --no-create-home --home-dir /workspace/work/home --shell /bin/bash dropforge
usermod -p '*' dropforge
# The name dropforge follows the uid the container really runs as: the entrypoint writes it to /run/dropforge/users, which
# is asked first. That name service refuses ids below 500, and passwords come from /etc/shadow alone.
sed -i -E 's/^(passwd|group):.*/\1: extrausers files/; s/^(shadow|gshadow):.*/\1: files/' /etc/nsswitch.conf
rm -rf /var/lib/extrausers
ln -s /run/dropforge/users /var/lib/extrausers
# sudo, which has no rule before USER_PASSWORD asks for one, is the only program that may become another user.
find / -xdev -type f -perm /6000 ! -path /usr/bin/sudo -exec chmod ug-s {} +

install -d -m 1777 /run/dropforge
install -d -m 0755 /workspace /etc/dropforge/before-start.d /etc/dropforge/after-start.d
install -d -o 1000 -g 1000 /workspace/work
ln -s work/notebooks /workspace/notebooks
rm -rf /var/log/*.log /var/log/apt /var/cache/ldconfig/aux-cache /var/cache/debconf/*-old
