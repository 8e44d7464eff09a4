#!/usr/bin/env bash
# Builds, tests, benchmarks and profiles fastmix on the NVIDIA GPU of this machine, in under ten minutes, without network.
#
#   benchmarks/gpu.sh [build] [test] [sanitize] [bench] [profile]      default: all
#
# Environment:
#   OUT               folder of the results (benchmarks/results): gpu-<name>.json, gpu-<name>.md, stages.tsv, logs/
#   TREE              where the package is built and run from (/tmp/fastmix-gpu), kept between calls
#   PYTHON            the interpreter that has torch (python3)
#   FASTMIX_GOLDEN    folder of golden files (tests/golden)
#   FASTMIX_COMMIT    what is being measured (asked of git when unset)
#   PARTS             parts of the benchmark (small monotonic recurrent step compile autotune), in this order
#   WORKERS           processes of the tests (6)
#
# Every stage has a time limit, a log and a status of its own: ok, failed, timeout, or absent where a tool is missing. One that
# fails takes nothing from the others. The exit status is 0 when all are ok or absent.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
PYTHON=${PYTHON:-python3}
TREE=${TREE:-/tmp/fastmix-gpu}
mkdir -p "${OUT:=benchmarks/results}"
OUT=$(cd "$OUT" && pwd)
LOGS=$OUT/logs
STAGES=$OUT/stages.tsv
PARTS=${PARTS:-small monotonic recurrent step compile autotune}
[[ -z ${FASTMIX_GOLDEN:-} ]] || FASTMIX_GOLDEN=$(cd "$FASTMIX_GOLDEN" && pwd)
export FASTMIX_GOLDEN FASTMIX_COMMIT=${FASTMIX_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
# What is compiled at run time stays outside the checkout, and is there again at the next call.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$TREE.cache/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$TREE.cache/inductor}
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_WAIT_POLICY=passive

main() {
    local stage
    for stage in "$@"; do
        case $stage in build | test | sanitize | bench | profile) ;; *)
            echo "a stage must be build, test, sanitize, bench or profile, got $stage" >&2
            exit 2
            ;;
        esac
    done
    [[ $# -gt 0 ]] || set -- build test sanitize bench profile
    mkdir -p "$LOGS"
    : >"$STAGES"
    [[ " $* " != *" build "* ]] || stage_build || true
    # What only has to be right, and what only has to be compiled, shares the device.
    [[ " $* " != *" test "* ]] || stage_test &
    [[ " $* " != *" sanitize "* ]] || stage_sanitize &
    [[ " $* " != *" bench "* ]] || stage_warm &
    wait
    [[ " $* " != *" bench "* ]] || stage_bench
    [[ " $* " != *" profile "* ]] || stage_profile
    summary
    ! cut -f 2 "$STAGES" | grep -q -v -x -e ok -e absent
}

# run NAME SECONDS COMMAND...: the command in TREE, its output in a log; a line on the terminal and one in stages.tsv.
run() {
    local name=$1 limit=$2 began=$SECONDS code=0 status=ok
    shift 2
    printf '== %s (at most %s s)\n' "$name" "$limit"
    (cd "$TREE" && exec timeout --kill-after=10 "$limit" "$@") >"$LOGS/$name.log" 2>&1 || code=$?
    case $code in
        0) ;;
        124 | 137) status=timeout ;;
        *) status=failed ;;
    esac
    record "$name" "$status" $((SECONDS - began))
    [[ $status == ok ]] || tail -n 15 "$LOGS/$name.log" | cut -c1-300
    return "$code"
}

record() {
    printf '%s\t%s\t%s\n' "$1" "$2" "$3" | tee -a "$STAGES"
}

# For the architecture of this card only. The tree holds what tests and benchmarks need beside the installed package, and
# no sources of it that could be imported in its place.
stage_build() {
    local capability
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader --id=0 | tr -d '. ')
    rm -rf "$TREE"
    mkdir -p "$TREE"
    cp -R benchmarks bindings csrc docs tests CMakeLists.txt Makefile README.md CHANGELOG.md conftest.py pyproject.toml "$TREE"
    SKBUILD_CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=$capability-real" \
        SKBUILD_BUILD_DIR="$TREE.cache/build" CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) FASTMIX_CUDA=ON \
        run build 180 "$PYTHON" -m pip install --no-build-isolation --no-deps --no-cache-dir --upgrade --target "$TREE" "$ROOT"
}

# Tests that fill the device's memory run alone.
stage_test() {
    local big=two_to_the_31 parallel=()
    ! "$PYTHON" -c 'import xdist' 2>/dev/null || parallel=(-n "${WORKERS:-6}" --dist worksteal)
    run test 240 "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider --durations=8 "${parallel[@]}" -k "not $big" tests ||
        true
    run test-large 60 "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider -k "$big" tests || true
}

# Every CUDA C++ kernel of ours, and no other, at odd small sizes.
stage_sanitize() {
    local tool filter
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not on the PATH: memory and races were not checked"
        record memcheck absent 0
        record racecheck absent 0
        return 0
    fi
    filter=$(kernel_filter)
    for tool in memcheck racecheck; do
        # shellcheck disable=SC2086  # the filter is two words
        run "$tool" 90 compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 1 $filter \
            "$PYTHON" -m benchmarks.sanitize || true
    done
}

# The option that restricts this release of compute-sanitizer to our kernels: it has changed its name.
kernel_filter() {
    local help option
    help=$(compute-sanitizer --help 2>&1 || true)
    for option in "--kernel-name kernel_substring=fastmix" "--kernel-regex kns=fastmix" "--filter kns=fastmix"; do
        if grep -q -e "${option%% *}\b" <<<"$help"; then
            echo "$option"
            return
        fi
    done
}

# The compiled contestants once, so that their kernels lie in the cache when they are timed.
stage_warm() {
    [[ " $PARTS " == *" compile "* ]] || return 0
    run warm 200 "$PYTHON" -m fastmix bench table --device cuda --part compile --rounds 1 --seconds 0 || true
}

# Each part in a process of its own: an error on the device ends its process. Compiling comes last and may be cut off.
stage_bench() {
    local part limit
    rm -f "$OUT"/bench-*.json "$OUT/ceilings.json"
    for part in $PARTS; do
        case $part in small) limit=50 ;; monotonic | recurrent) limit=75 ;; step) limit=60 ;; *) limit=90 ;; esac
        run "bench-$part" "$limit" "$PYTHON" -m fastmix bench table --device cuda --part "$part" --rounds 15 --seconds 1 \
            --ceilings "$OUT/ceilings.json" --json "$OUT/bench-$part.json" --threads "$(nproc)" || true
    done
}

stage_profile() {
    run profile 60 "$PYTHON" -m benchmarks.profile_gpu --out "$OUT" || true
}

# One report of all parts, the profile's tables in the logs; what reached its goal and what did not.
summary() {
    local reports=() part name
    for part in $PARTS; do
        [[ ! -s $OUT/bench-$part.json ]] || reports+=("$OUT/bench-$part.json")
    done
    if [[ ${#reports[@]} -gt 0 ]]; then
        name=$(nvidia-smi --query-gpu=name --format=csv,noheader --id=0 | tr '[:upper:] ' '[:lower:]-')
        name=gpu-${name#nvidia-}
        (cd "$TREE" && "$PYTHON" -m fastmix bench join "${reports[@]}" --json "$OUT/$name.json" --markdown "$OUT/$name.md" --brief) || true
    fi
    echo
    tail -q -n 1 "$LOGS"/test*.log 2>/dev/null || true
    column -t "$STAGES"
}

main "$@"
