#!/bin/sh
# pip inside the image build: trusts the CA bundle given as secret `ca`, reads the pip.conf given as secret `pip`, and looks
# into docker/local/wheels first. None of them is left in a layer.
set -eu
if [ -s /run/secrets/ca ]; then
	export PIP_CERT=/run/secrets/ca SSL_CERT_FILE=/run/secrets/ca REQUESTS_CA_BUNDLE=/run/secrets/ca
fi
if [ -s /run/secrets/pip ]; then
	export PIP_CONFIG_FILE=/run/secrets/pip
fi
unset PIP_CONSTRAINT # NVIDIA's PyTorch images set one; the locks are exact anyway
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off
if [ -d /local/wheels ]; then
	export PIP_FIND_LINKS=/local/wheels
fi
exec "${PYTHON:-/opt/venv/bin/python}" -m pip "$@"
