#!/usr/bin/env bash
# Everything that only a GPU can prove, in one call and without a network: build, tests, compute-sanitizer,
# the layers against cuDNN and the other rivals, the networks' training steps, a report.
#
#   OUT=results benches/gpu.sh                 all parts that the time allows; call it again for the rest, which
#                                              leaves out what has passed
#   OUT=results benches/gpu.sh tests layers    these parts only
#   OUT=results benches/gpu.sh --dry-run       on the CPU with tiny layers: shows that it works, times nothing
#
#   OUT       where results go: state.jsonl, gpu.json, gpu.csv, gpu.html, pictures, log.txt  (build/gpu)
#   RESUME    a folder with the state.jsonl of an earlier call, where OUT starts out empty
#   PYTHON    the interpreter, with torch and Triton                                          (python3)
#   BUDGET    seconds that the whole call may take; a part begins only if its share is left   (570)
#   PACK      if set, all but the page, gpu.json, the state and the log goes into one archive at the end, for
#             machines that give only a few files back
#   FILTER    only layers whose name holds this
#   EXTRA     for the layers: --tuned (measure the launches of the Triton kernels), --compiled (torch.compile); slow
#
# The device's clocks and settings are read and never changed. The exit status is 0 if nothing failed; parts
# that ran out of time are "unfinished" in the table and no failure.
set -uo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-build/gpu}
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-570}
PARTS="build tests sanitizer limits layers networks"

dry_run=""
asked=""
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=--dry-run ;;
    build | tests | sanitizer | limits | layers | networks) asked="$asked $argument" ;;
    *)
      echo "$0: unknown argument $argument; expected --dry-run or some of: $PARTS" >&2
      exit 2
      ;;
  esac
done
resumes=""
[ -n "$asked" ] || resumes=1
asked=${asked:-$PARTS}

mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
if [ -n "${RESUME:-}" ] && [ ! -e "$OUT/state.jsonl" ] && [ -e "$RESUME/state.jsonl" ]; then
  cp "$RESUME/state.jsonl" "$OUT/state.jsonl"
fi
log="$OUT/log.txt"
started=$SECONDS
failed=0

# The package as `make VENV=none` installs it; a dry run takes the one that PYTHON has.
if [ -z "$dry_run" ]; then
  export PYTHONPATH="$PWD/build/site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 TRITON_DEFAULT_FP_FUSION=1

left() { echo $((BUDGET - (SECONDS - started))); }
gpu() { "$PYTHON" -m groupconv_ext.bench.gpu "$@" --out "$OUT" $dry_run; }

# note PART STATUS SECONDS DETAIL: for the table and the page, at once, since the next part may be killed. A dry
# run keeps its notes for the end. Before the build there is nothing to note it with.
notes=()
note() {
  notes+=(--note "$1" "$2" "$3" "$4")
  [ -n "$dry_run" ] || write_notes
}
write_notes() {
  [ ${#notes[@]} -eq 0 ] || gpu parts "${notes[@]}" || echo "${notes[@]}"
  notes=()
}

# Whether a call for all parts finds that an earlier one has passed this one.
has_passed() {
  [ -n "$resumes" ] && grep -qs "\"name\": \"$1\", \"status\": \"passed\"" "$OUT/state.jsonl"
}

# run PART LEAST COMMAND...: in what is left of the time, if that is at least LEAST seconds.
run() {
  local part=$1 least=$2
  shift 2
  if [ "$part" != build ] && has_passed "$part"; then
    echo "== $part has passed" | tee -a "$log"
    return
  fi
  echo "== $part: $*" | tee -a "$log"
  if [ -n "$dry_run" ]; then
    note "$part" "left out" 0 "dry run: $*"
    return
  fi
  if [ "$(left)" -lt "$least" ]; then
    note "$part" unfinished 0 "needs $least s, $(left) s were left"
    return
  fi
  local begun=$SECONDS status
  timeout --kill-after=5 "$(left)" "$@" >>"$log" 2>&1
  status=$?
  local took=$((SECONDS - begun))
  case $status in
    0) note "$part" passed "$took" "" ;;
    124 | 137)
      note "$part" unfinished "$took" "ran out of time; the log ends with: $(tail -n 1 "$log" | cut -c1-80)"
      ;;
    *)
      failed=1
      tail -n 25 "$log"
      note "$part" failed "$took" "exit status $status, see log.txt"
      ;;
  esac
}

# Whether PYTHON has all of some modules; says which one is missing.
has() { "$PYTHON" -c 'import importlib.util, sys
missing = [m for m in sys.argv[1:] if importlib.util.find_spec(m) is None]
print(*missing)
sys.exit(bool(missing))' "$@"; }

for part in $asked; do
  case $part in
    build)
      run build 60 make build/installed PYTHON="$PYTHON" VENV=none
      ;;
    tests)
      if ! missing=$(has pytest hypothesis); then
        note tests "left out" 0 "$PYTHON has no $missing"
        continue
      fi
      # What a GPU decides: the CUDA and Triton kernels on it, the choice. Then everything.
      # Compiling kernels takes most of the time, so several processes share it where pytest-xdist is there.
      workers=""
      has xdist >/dev/null && workers="-n 8"
      run tests 60 "$PYTHON" -m pytest -q -p no:cacheprovider $workers python_tests/test_on_gpu.py \
        python_tests/test_cuda.py python_tests/test_choice.py
      run all-tests 240 "$PYTHON" -m pytest -q -p no:cacheprovider $workers python_tests
      ;;
    sanitizer)
      if ! command -v compute-sanitizer >/dev/null; then
        note sanitizer "left out" 0 "compute-sanitizer is not on the PATH"
        continue
      fi
      if ! missing=$(has pytest hypothesis); then
        note sanitizer "left out" 0 "$PYTHON has no $missing"
        continue
      fi
      try="import torch; torch.ones(1).cuda()"
      if [ -z "$dry_run" ] && ! compute-sanitizer --error-exitcode 1 "$PYTHON" -c "$try" >>"$log" 2>&1; then
        note sanitizer "left out" 0 "compute-sanitizer does not work here, see log.txt"
        continue
      fi
      # Both sets of kernels, both layouts, small tiles and larger; the largest under memcheck alone, since
      # racecheck takes too long for them. PyTorch's caching allocator would hide a read beyond a tensor's end
      # inside of its blocks.
      chosen="test_the_same_bits_again or (test_larger_layers and bfloat16 and native)"
      largest="test_groups_of_many_channels and order and nhwc and bfloat16"
      for tool in memcheck racecheck; do
        [ "$tool" = memcheck ] && selected="$chosen or ($largest)" || selected=$chosen
        run "$tool" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
          --error-exitcode 1 "$PYTHON" -m pytest -q -p no:cacheprovider python_tests/test_on_gpu.py \
          python_tests/test_cuda.py -k "$selected"
      done
      ;;
    limits)
      has_passed limits || gpu limits || failed=1
      ;;
    layers)
      seconds=$(($(left) - 60))
      if [ -z "$dry_run" ] && [ "$seconds" -lt 30 ]; then
        note layers unfinished 0 "needs 90 s, $(left) s were left"
        continue
      fi
      gpu layers --seconds "$seconds" ${FILTER:+--filter "$FILTER"} ${EXTRA:-} 2>&1 | tee -a "$log"
      case ${PIPESTATUS[0]} in
        0 | 3) ;; # 3: more layers are left for another call
        *) failed=1 ;;
      esac
      ;;
    networks)
      if [ ! -e benches/networks.py ]; then
        note networks "left out" 0 "this checkout has no benches/networks.py"
        continue
      fi
      # Only what an earlier call has not measured; benches/ is where its other half lies.
      run networks 120 env PYTHONPATH="$PWD/benches:${PYTHONPATH:-}" "$PYTHON" benches/networks.py \
        --device cuda --train --batch 64 --seconds 5 --resume --out "$OUT/networks"
      ;;
  esac
done

echo
gpu report ${notes[@]+"${notes[@]}"} || failed=1
if [ -n "${PACK:-}" ]; then
  (cd "$OUT" && find . -maxdepth 1 -type f \( -name '*.png' -o -name '*.csv' -o -name 'networks.*' \) -printf '%P\n' |
    tar -czf rest.tar.gz --remove-files -T -)
fi
exit "$failed"
