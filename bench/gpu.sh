#!/usr/bin/env bash
# Everything that wants an NVIDIA GPU, in one command and under ten minutes, most valuable first:
#
#   bench/gpu.sh [--out FOLDER] [--python PYTHON] [--minutes N] [--dry-run] [STEP ...]
#
# Steps, in this order: build, tests, sanitizer, search, race, compiled, ncu. Each has a share of the
# time; one that fails or runs out of it leaves what it has, and the next one starts. FOLDER (out/gpu)
# then holds a log for each step, summary.txt, results.json and report.html of the race, those of
# the race against torch.compile and FlexAttention in compiled/, searched.py with rows for
# kernels/<family>/configs.py, and ncu.md. Needs torch 2.11 or later with CUDA, Triton, pytest, ninja;
# downloads nothing. --dry-run prints the commands.
set -uo pipefail
here=$PWD  # what a relative path is relative to
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=out/gpu python=python3 minutes=10 dry_run=0
steps=()
while [ $# -gt 0 ]; do
  case "$1" in
    --out)
      : "${2:?--out: a folder}"
      case "$2" in /*) out=$2 ;; *) out=$here/$2 ;; esac
      shift ;;
    --python)
      : "${2:?--python: an interpreter}"
      case "$2" in /*) python=$2 ;; */*) python=$here/$2 ;; *) python=$2 ;; esac
      shift ;;
    --minutes) minutes=${2:?--minutes: a number}; shift ;;
    --dry-run) dry_run=1 ;;
    build | tests | sanitizer | search | race | compiled | ncu) steps+=("$1") ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; echo "unknown: $1" >&2; exit 2 ;;
  esac
  shift
done
[ ${#steps[@]} -gt 0 ] || steps=(build tests sanitizer search race compiled ncu)
case "$minutes" in '' | 0* | *[!0-9]*) echo "--minutes: expected a whole number above 0, got '$minutes'" >&2; exit 2 ;; esac

# Shares of the time, in percent.
declare -A share=([build]=12 [tests]=26 [sanitizer]=8 [search]=18 [race]=20 [compiled]=8 [ncu]=8)
# Nine tenths of a step's, in minutes.
minutes_of() { printf '%d.%03d' $((minutes * ${share[$1]} * 9 / 1000)) $((minutes * ${share[$1]} * 9 % 1000)); }
case "$out$python" in *[[:space:]]*) echo "--out, --python: no spaces, please" >&2; exit 2 ;; esac
declare -A command
command[build]="$python setup.py build_ext --inplace"
command[tests]="$python -m pytest -q tests/test_kernels_*_cuda.py"
command[sanitizer]="compute-sanitizer --error-exitcode 9 $python -m pytest -q tests/test_kernels_*_cuda.py -k every"
command[search]="env VLMFAST_AUTOTUNE=1 $python -m bench.search $out/searched.py"
# A race ends by itself before its time does, and then writes its report.
bench="$python -m bench --device cuda --dtype bfloat16 --mode both --selection --seconds 1 --ceiling-size 8192"
command[race]="$bench --sweeps --memory --minutes $(minutes_of race) --out $out"
command[compiled]="$bench --compile --minutes $(minutes_of compiled) --out $out/compiled flash_attention cross_attention"
command[ncu]="$python -m bench.ncu $out"

status=0
mkdir -p "$out"
: >"$out/summary.txt"
for step in "${steps[@]}"; do
  seconds=$((minutes * 60 * ${share[$step]} / 100))
  if [ "$dry_run" = 1 ]; then
    echo "$step: timeout $seconds ${command[$step]}" | tee -a "$out/summary.txt"
    continue
  fi
  start=$SECONDS
  # shellcheck disable=SC2086  # a command is split into its words
  PYTHONUNBUFFERED=1 timeout "$seconds" ${command[$step]} >"$out/$step.log" 2>&1
  code=$?
  [ $code -eq 0 ] || status=1
  case "$step" in  # a race that was stopped has its results, but no report
    race) [ $code -eq 0 ] || $python -m bench report "$out/results.json" >>"$out/$step.log" 2>&1 ;;
    compiled) [ $code -eq 0 ] || $python -m bench report "$out/compiled/results.json" >>"$out/$step.log" 2>&1 ;;
  esac
  echo "$step: exit $code after $((SECONDS - start)) s; $out/$step.log" | tee -a "$out/summary.txt"
done
exit $status
