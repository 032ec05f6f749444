#!/bin/sh
# llama.cpp into /opt/llama.cpp: copied from docker/local/llama.cpp (CPU only), else compiled in the cache mount /build.
# A build that was interrupted goes on there, at the file it had reached.
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
compiler=
set --
if [ "$variant" != cpu ]; then
	if ! command -v nvcc >/dev/null; then
		sh /src/docker/cuda-toolkit.sh
		export PATH="/usr/local/cuda/bin:$PATH" CUDA_PATH=/usr/local/cuda
	fi
	compiler=$(nvcc --version)
	# CUDA in a library of its own that the tools load when it can be: one copy instead of one in every tool, and they
	# run on the CPU where there is no GPU, driver or cuBLAS. Without the virtual-memory pool it does not link the driver.
	# As the install path, because CMake ends a build path with a colon, which the loader takes for the current folder.
	# shellcheck disable=SC2016  # $ORIGIN is for the loader
	set -- --cmake-flag=-DBUILD_SHARED_LIBS=ON --cmake-flag=-DGGML_BACKEND_DL=ON --cmake-flag=-DGGML_CUDA=ON \
		--cmake-flag=-DGGML_CUDA_NO_VMM=ON --cmake-flag=-DGGML_CUDA_NCCL=OFF \
		"--cmake-flag=-DCMAKE_CUDA_ARCHITECTURES=$architectures" --cmake-flag=-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON \
		'--cmake-flag=-DCMAKE_INSTALL_RPATH=$ORIGIN;/opt/venv/lib/python3.12/site-packages/nvidia/cu13/lib' # the lock's cuBLAS
fi
# The cache mount serves every release, variant and base: the folder is named after all that decides what is built.
# shellcheck source=/dev/null
system=$(. /etc/os-release && echo "$ID $VERSION_ID")
built=/build/$(echo "$system $* $compiler" | cat /src/appliance/dropforge/llama_cpp/release.py - | sha256sum | cut -c1-12)
if [ -s /run/secrets/ca ]; then
	export PIP_CERT=/run/secrets/ca
fi
if [ -s /run/secrets/pip ]; then
	export PIP_CONFIG_FILE=/run/secrets/pip
fi
PYTHONPATH=/src/appliance PYTHONDONTWRITEBYTECODE=1 python3 -m dropforge.llama_cpp.build --into "$built" "$@"
if [ "$variant" != cpu ] && [ ! -e "$built/bin/libggml-cuda.so" ]; then
	echo "llama.cpp: the build in $built has no CUDA library" >&2
	exit 1
fi
cp -r "$built" /opt/llama.cpp
