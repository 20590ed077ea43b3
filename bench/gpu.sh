#!/usr/bin/env bash
# Everything that wants an NVIDIA GPU, in one command and eight minutes, most valuable first:
#
#   bench/gpu.sh [--out FOLDER] [--python PYTHON] [--minutes N] [--dry-run] [STEP ...]
#
# What the steps are, and what they leave in FOLDER and FOLDER.tar.gz: bench/gpu.sh --help.
set -euo pipefail
here=$PWD  # what a relative path is relative to
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=python3
arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --out=* | --python=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --out)
      : "${2:?--out: a folder}"
      case "$2" in /*) arguments+=(--out "$2") ;; *) arguments+=(--out "$here/$2") ;; esac
      shift 2 ;;
    --python)
      : "${2:?--python: an interpreter}"
      case "$2" in */*) python=$(realpath -s "$here/$2") ;; *) python=$2 ;; esac
      case "$2" in /*) python=$2 ;; esac
      shift 2 ;;
    *) arguments+=("$1"); shift ;;
  esac
done
exec "$python" -m bench.gpu --python "$python" ${arguments[@]+"${arguments[@]}"}
