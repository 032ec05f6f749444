#!/bin/sh
# CUDA's compiler at /usr/local/cuda, put together from the locked packages in /opt/venv, where the base image has none.
# They bring all of it but the names that compilers look for.
set -eu
packages=$(echo /opt/venv/lib/python3.*/site-packages/nvidia/cu13)
if [ ! -x "$packages/bin/nvcc" ]; then
	echo "there is no nvcc: choose a LLAMA_BASE that has one, or LLAMA_BASE=python for the one in the lock" >&2
	exit 1
fi
mkdir -p /usr/local/cuda
cp -rs "$packages/." /usr/local/cuda # folders of its own, files as links: nvcc looks beside itself and one folder up
ln -sfn lib /usr/local/cuda/lib64
for library in /usr/local/cuda/lib/*.so.*; do
	ln -sf "$library" "${library%.so.*}.so" # libcublas.so.13 -> libcublas.so
done
