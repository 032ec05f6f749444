#!/bin/sh
# llama.cpp into /opt/llama.cpp: copied from docker/local/llama.cpp (CPU only), else compiled in the cache mount /build.
set -eu
variant=$1 architectures=$2
ready=/src/docker/local/llama.cpp
if [ "$variant" = cpu ] && [ -x "$ready/bin/llama-server" ]; then
	echo "llama.cpp: taking the build in docker/local/llama.cpp"
	cp -r "$ready" /opt/llama.cpp
	exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends build-essential ca-certificates python3 python3-pip
if [ "$variant" != cpu ] && ! command -v nvcc >/dev/null; then
	sh /src/docker/cuda-toolkit.sh
	export PATH="/usr/local/cuda/bin:$PATH" CUDA_PATH=/usr/local/cuda
fi
# Named after what decides the build, because the cache mount outlives releases.
built=/build/$(echo "$architectures" | cat /src/appliance/dropforge/llama_cpp/release.py "$0" - | sha256sum | cut -c1-12)
set -- --into "$built" --jobs "$(nproc)"
if [ "$variant" != cpu ]; then
	# CUDA in a library of its own that the tools load when it can be: one copy instead of one in every tool, and they
	# run on the CPU where there is no GPU, driver or cuBLAS. Without the virtual-memory pool it does not link the driver.
	# shellcheck disable=SC2016  # $ORIGIN is for the loader
	set -- "$@" --cmake-flag=-DBUILD_SHARED_LIBS=ON --cmake-flag=-DGGML_BACKEND_DL=ON --cmake-flag=-DGGML_CUDA=ON \
		--cmake-flag=-DGGML_CUDA_NO_VMM=ON --cmake-flag=-DGGML_CUDA_NCCL=OFF \
		"--cmake-flag=-DCMAKE_CUDA_ARCHITECTURES=$architectures" --cmake-flag=-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON \
		'--cmake-flag=-DCMAKE_BUILD_RPATH=$ORIGIN;/opt/venv/lib/python3.12/site-packages/nvidia/cu13/lib' # the lock's cuBLAS
fi
if [ -s /run/secrets/ca ]; then
	export PIP_CERT=/run/secrets/ca
fi
if [ -s /run/secrets/pip ]; then
	export PIP_CONFIG_FILE=/run/secrets/pip
fi
PYTHONPATH=/src/appliance PYTHONDONTWRITEBYTECODE=1 python3 -m dropforge.llama_cpp.build "$@"
cp -r "$built" /opt/llama.cpp
if [ "$variant" != cpu ]; then
	echo "$architectures" >/opt/llama.cpp/CUDA_ARCHITECTURES
fi
