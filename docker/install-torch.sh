#!/bin/sh
# torch before the lock, because the CPU build comes from wherever pip finds one and has another hash there.
# With CUDA it is in the lock like everything else.
set -eu
variant=$1 torch=$2 arguments=$3
[ "$variant" = cpu ] || exit 0
if [ -z "$arguments" ] && ! ls /local/wheels/torch-*+cpu-*.whl >/dev/null 2>&1; then
	echo "the CPU variant needs the CPU build of $torch: put its wheel into docker/local/wheels/, or pass" >&2
	echo "--build-arg TORCH_PIP_ARGS='--index-url ADDRESS-OF-THE-CPU-BUILDS' (plain pip would fetch CUDA with it)" >&2
	exit 1
fi
# --no-deps: its own needs are in the lock.
# shellcheck disable=SC2086  # a list of words
sh /tmp/pip.sh install --quiet --no-deps $arguments "$torch"
site=$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
if find "$site/torch/lib" -name 'libtorch_cuda*' | grep -q .; then
	echo "this is a CUDA build of torch; the CPU variant wants a +cpu wheel" >&2
	exit 1
fi
