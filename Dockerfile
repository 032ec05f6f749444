# Dropforge for x86-64. The whole build: docs/reference/container.md. Needs BuildKit (DOCKER_BUILDKIT=1 on old engines).
#
#   docker build -t dropforge .                                          NVIDIA GPUs, x86-64
#   docker build -t dropforge --build-arg VARIANT=cpu .                  no GPU; torch: docker/local/wheels or TORCH_PIP_ARGS
#   ... --secret id=ca,src=/etc/ssl/certs/ca-certificates.crt            behind a proxy with certificates of its own
#   ... --secret id=pip,src=pip.conf                                     from a package index of your own
ARG VARIANT=cuda
# Compute capabilities llama.cpp is compiled for. No PTX for later ones: torch has none, and llama.cpp makes 120a of 120.
ARG CUDA_ARCHITECTURES=75-real;80-real;86-real;89-real;90-real;100-real;103-real;120-real
# Any Debian 12 or Ubuntu 24.04 image, best with its digest: NAME@sha256:...
ARG BASE=base-${VARIANT}
ARG LLAMA_BASE=llama-base-${VARIANT}

# CUDA 13.0, its compiler too, comes from the lock, with hashes; a base needs none.
FROM ubuntu:24.04 AS base-cuda
FROM nvcr.io/nvidia/pytorch:25.11-py3 AS base-dgx
FROM nvcr.io/nvidia/pytorch:25.11-py3 AS llama-base-dgx
FROM debian:bookworm-slim AS base-cpu
FROM debian:bookworm-slim AS llama-base-cpu

# --- the operating system ------------------------------------------------------------------------------------------------
FROM ${BASE} AS system
ARG VARIANT
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,target=/var/lib/apt,sharing=locked \
    --mount=type=bind,source=docker/system-packages.sh,target=/tmp/system-packages.sh \
    sh /tmp/system-packages.sh "${VARIANT}"
RUN --mount=type=bind,source=docker/local/certs,target=/local/certs \
    find /local/certs -name '*.crt' -exec cp {} /usr/local/share/ca-certificates/ \; && update-ca-certificates

# --- Python and the locked packages --------------------------------------------------------------------------------------
FROM system AS python
ARG VARIANT
ARG TORCH_CPU=torch==2.13.0
ARG TORCH_PIP_ARGS=
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=ca --mount=type=secret,id=pip \
    --mount=type=bind,source=docker/local/wheels,target=/local/wheels \
    --mount=type=bind,source=docker/install-torch.sh,target=/tmp/install-torch.sh \
    --mount=type=bind,source=docker/pip.sh,target=/tmp/pip.sh \
    python3 -m venv /opt/venv && sh /tmp/install-torch.sh "${VARIANT}" "${TORCH_CPU}" "${TORCH_PIP_ARGS}"
COPY docker/image-${VARIANT}.lock /opt/dropforge/image.lock
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=ca --mount=type=secret,id=pip \
    --mount=type=bind,source=docker/local/wheels,target=/local/wheels \
    --mount=type=bind,source=docker/pip.sh,target=/tmp/pip.sh \
    sh /tmp/pip.sh install --quiet --require-hashes --no-deps -r /opt/dropforge/image.lock

# --- llama.cpp -----------------------------------------------------------------------------------------------------------
FROM python AS llama-base-cuda
FROM ${LLAMA_BASE} AS llama
ARG VARIANT
ARG CUDA_ARCHITECTURES
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN --mount=type=cache,id=llama-apt-cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,id=llama-apt-lists,target=/var/lib/apt,sharing=locked \
    --mount=type=cache,id=llama-build,target=/build,sharing=locked \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=ca --mount=type=secret,id=pip \
    --mount=type=bind,source=docker,target=/src/docker \
    --mount=type=bind,source=appliance/dropforge/llama_cpp,target=/src/appliance/dropforge/llama_cpp \
    --mount=type=bind,source=appliance/dropforge/__init__.py,target=/src/appliance/dropforge/__init__.py \
    --mount=type=bind,source=appliance/dropforge/errors.py,target=/src/appliance/dropforge/errors.py \
    --mount=type=bind,source=appliance/dropforge/files.py,target=/src/appliance/dropforge/files.py \
    --mount=type=bind,source=appliance/dropforge/settings.py,target=/src/appliance/dropforge/settings.py \
    sh /src/docker/build-llama.sh "${VARIANT}" "${CUDA_ARCHITECTURES}"

# --- this project's wheel ------------------------------------------------------------------------------------------------
FROM python AS wheel
COPY pyproject.toml README.md LICENSE /src/
COPY appliance /src/appliance
COPY kernels /src/kernels
RUN /opt/venv/bin/python -m pip wheel --quiet --no-deps --no-index --no-build-isolation --wheel-dir /wheel /src

# --- the image -----------------------------------------------------------------------------------------------------------
FROM python AS image
ARG VARIANT
COPY --from=llama /opt/llama.cpp /opt/llama.cpp
COPY docker/supervisord.conf docker/sshd_config docker/jupyter_server_config.py docker/services /opt/dropforge/
COPY examples /opt/dropforge/examples
COPY notebooks /opt/dropforge/notebooks
COPY entrypoint.sh /opt/dropforge/
ARG REVISION=unknown
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    --mount=type=bind,source=docker/manifest.py,target=/tmp/manifest.py \
    /opt/venv/bin/python -m pip install --quiet --root-user-action=ignore --no-deps --no-index /wheel/*.whl \
    && ln -s /opt/dropforge/shell.sh /usr/local/bin/dropforge-shell \
    && ln -s /opt/dropforge/dropforge.sh /usr/local/bin/dropforge \
    && ln -s /opt/dropforge/profile.sh /etc/profile.d/dropforge.sh \
    && /opt/venv/bin/python -m compileall -q /opt/dropforge \
    && /opt/venv/bin/python /tmp/manifest.py image --variant "${VARIANT}" --revision "${REVISION}" --into /opt/dropforge

ENV PATH=/usr/local/bin:/opt/venv/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin \
    LANG=C.UTF-8 \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64 \
    DROPFORGE_VARIANT=${VARIANT} \
    DROPFORGE_LLAMA_CPP=/opt/llama.cpp \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    REQUESTS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
LABEL org.opencontainers.image.title="dropforge" \
      org.opencontainers.image.description="Drop a job in a folder, get a trained model out" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      dropforge.variant="${VARIANT}"
WORKDIR /workspace
EXPOSE 8888 22
# A job needs time to save its checkpoint: docker stop -t 150, docker run --stop-timeout 150, stop_grace_period: 150s.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=20s --start-period=90s --retries=2 \
    CMD ["/opt/venv/bin/python", "/opt/dropforge/healthcheck.py"]
ENTRYPOINT ["/opt/dropforge/entrypoint.sh"]
