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
built=/build/$(echo "$architectures" | cat /src/appliance/dropforge/llama_cpp/release.py - | sha256sum | cut -c1-12)
set -- --into "$built" --jobs "$(nproc)"
if [ "$variant" != cpu ]; then
	# Without the virtual-memory pool the tools do not link the driver, so they also run where there is none (on the CPU).
	set -- "$@" --cmake-flag=-DGGML_CUDA=ON --cmake-flag=-DGGML_CUDA_NO_VMM=ON \
		"--cmake-flag=-DCMAKE_CUDA_ARCHITECTURES=$architectures" \
		--cmake-flag=-DCMAKE_BUILD_RPATH=/opt/venv/lib/python3.12/site-packages/nvidia/cu13/lib # cuBLAS: the lock's
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
