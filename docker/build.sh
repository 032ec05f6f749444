#!/bin/bash
# Build the image: what `make image` runs. Everything it does is a plain `docker build`; see docs/reference/container.md.
#
#   docker/build.sh [TAG] [further arguments for docker build]
#
# VARIANT   cpu, cuda or dgx; default: cuda (on arm64: dgx) on a machine with an NVIDIA driver, else cpu
# BASE      image to build on; default: the Dockerfile's, or a Debian 12 made with debootstrap where no registry answers
# CUDA_ARCHITECTURES  what llama.cpp is compiled for; default: this machine's GPUs, else and with `all` the Dockerfile's list
# CA        bundle that pip trusts during the build; default: this machine's
# TORCH     torch of the CPU variant; TORCH_PIP_ARGS: arguments for pip to find its CPU build
set -euo pipefail
cd "$(dirname "$0")/.."
tag=${1:-dropforge}
shift || true
if [[ -z ${VARIANT:-} ]]; then
	VARIANT=cpu
	if command -v nvidia-smi >/dev/null; then
		[[ $(uname -m) == aarch64 ]] && VARIANT=dgx || VARIANT=cuda
	fi
fi
variant=$VARIANT
docker=$(docker/engine.sh client)
python=${PYTHON:-python3}
arguments=(--build-arg "VARIANT=$variant" --build-arg "REVISION=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)")

ca=${CA:-/etc/ssl/certs/ca-certificates.crt}
[[ ! -s $ca ]] || arguments+=(--secret "id=ca,src=$ca")
[[ -z ${PIP_CONF:-} ]] || arguments+=(--secret "id=pip,src=$PIP_CONF")

base=${BASE:-}
if [[ -z $base && $variant == cpu ]]; then
	base=debian:bookworm-slim
	if ! "$docker" image inspect "$base" >/dev/null 2>&1 && ! timeout 60 "$docker" pull -q "$base" 2>/dev/null; then
		echo "image: no registry answers; building on a Debian 12 made with debootstrap"
		base=$(docker/base.sh)
	fi
fi
if [[ $variant != cpu ]]; then
	# One kind of GPU costs about 75 minutes of one core, the Dockerfile's list up to eight times that.
	architectures=${CUDA_ARCHITECTURES:-$(docker/architectures.sh)}
	[[ -z $architectures || $architectures == all ]] || arguments+=(--build-arg "CUDA_ARCHITECTURES=$architectures")
fi
[[ $variant != dgx ]] || arguments+=(--file Dockerfile.dgx)
[[ -z $base ]] || arguments+=(--build-arg "BASE=$base")
[[ -z $base || $variant != cpu ]] || arguments+=(--build-arg "LLAMA_BASE=$base")

if [[ $variant == cpu ]]; then
	torch=${TORCH:-torch==2.13.0}
	arguments+=(--build-arg "TORCH_CPU=$torch" --build-arg "TORCH_PIP_ARGS=${TORCH_PIP_ARGS:-}")
	if [[ -z ${TORCH_PIP_ARGS:-} ]] && ! compgen -G 'docker/local/wheels/torch-*+cpu-cp311-*' >/dev/null; then
		# pip as configured here may know a place with the CPU build (find-links); one without +cpu is CUDA, and no use.
		"$python" -m pip download -qq --no-deps --only-binary :all: --python-version 3.11 -d docker/local/wheels \
			"$torch+cpu" || echo "image: pip here finds no CPU build of $torch; set TORCH_PIP_ARGS (see the Makefile)" >&2
	fi
	built=$(PYTHONPATH=appliance "$python" -c 'from dropforge.llama_cpp.release import cache_folder
from dropforge.settings import settings
print(cache_folder(settings().cache))')
	if [[ -x $built/bin/llama-server ]]; then
		rm -rf docker/local/llama.cpp
		cp -r "$built" docker/local/llama.cpp
	fi
fi
DOCKER_BUILDKIT=1 "$docker" build "${arguments[@]}" -t "$tag" "$@" .
mkdir -p dist
"$python" docker/manifest.py layers "$tag" --docker "$docker" >"dist/manifest-$variant.json"
echo "image: $tag, $("$docker" image inspect -f '{{.Size}}' "$tag") bytes; versions and layers: dist/manifest-$variant.json"
