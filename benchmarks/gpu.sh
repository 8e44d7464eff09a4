#!/usr/bin/env bash
# Builds, tests, benchmarks and profiles fastmix on the NVIDIA GPU of this machine, in under ten minutes, without network.
#
#   benchmarks/gpu.sh [build] [test] [sanitize] [bench] [profile]      default: all
#
# Environment:
#   OUT               folder of the results (benchmarks/results): gpu-<name>.json and .md, gpu-<name>-profile.json and .txt,
#                     stages.tsv, logs.tar.gz
#   LIMIT             seconds for everything (585); what no time is left for is skipped
#   PARTS             parts of the benchmark, in this order (monotonic recurrent step small compile autotune); there is
#                     also "whole", which takes minutes
#   SHAPES            of the cases of the benchmark and the profile (all)
#   QUICK             1: only cases that have a goal, in precision "high", in fewer rounds; one learner step is profiled
#   TREE              where the package is built and run from (/tmp/fastmix-gpu), kept between calls
#   PYTHON            the interpreter that has torch (python3)
#   WORKERS           processes of the tests, and of compiling what is timed (8)
#   FASTMIX_GOLDEN    folder of golden files (tests/golden)
#   FASTMIX_COMMIT    what is being measured (asked of git when unset)
#
# Every stage has a time limit, a log and a status of its own: ok, failed, timeout, skipped, or absent where a tool is
# missing. One that fails takes nothing from the others. The exit status is 0 when all are ok or absent.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
PYTHON=${PYTHON:-python3}
TREE=${TREE:-/tmp/fastmix-gpu}
LOGS=$TREE.logs
mkdir -p "${OUT:=benchmarks/results}"
OUT=$(cd "$OUT" && pwd)
STAGES=$OUT/stages.tsv
LIMIT=${LIMIT:-585}
PARTS=${PARTS:-monotonic recurrent step small compile autotune}
SHAPES=${SHAPES:-}
WORKERS=${WORKERS:-8}
[[ -z ${FASTMIX_GOLDEN:-} ]] || FASTMIX_GOLDEN=$(cd "$FASTMIX_GOLDEN" && pwd)
export FASTMIX_GOLDEN FASTMIX_COMMIT=${FASTMIX_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
# What is compiled at run time stays outside the checkout, and is there again at the next call.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$TREE.cache/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$TREE.cache/inductor}
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_WAIT_POLICY=passive COLUMNS=200

# Seconds: expected, and at most. The last part of the benchmark may take what is left.
declare -A EXPECTED=(
    [build]=50 [test]=70 [memcheck]=25 [racecheck]=25 [warm]=60 [monotonic]=50 [recurrent]=40 [step]=35 [small]=15
    [compile]=35 [profile-5m_vs_6m]=25 [profile-MMM2]=20 [profile-kernels]=30 [test-large]=10 [autotune]=80 [whole]=400
)
declare -A MOST=(
    [build]=120 [test]=100 [memcheck]=60 [racecheck]=60 [warm]=100 [monotonic]=70 [recurrent]=55 [step]=45 [small]=20
    [compile]=50 [profile-5m_vs_6m]=35 [profile-MMM2]=25 [profile-kernels]=40 [test-large]=15
    [autotune]=$LIMIT [whole]=$LIMIT
)
RESERVED=12 # to report what there is

SELECTED=()
for shape in $SHAPES; do
    SELECTED+=(--shape "$shape")
done
EFFORT=(--rounds 15 --seconds 1)
if [[ ${QUICK:-} == 1 ]]; then
    SELECTED+=(--goals --precision high)
    EFFORT=(--rounds 9 --seconds 0.5)
    EXPECTED+=([warm]=35 [monotonic]=20 [recurrent]=25 [step]=20 [small]=10)
fi

main() {
    local stage order=() long=()
    for stage in "$@"; do
        case $stage in build | test | sanitize | bench | profile) ;; *)
            echo "a stage must be build, test, sanitize, bench or profile, got $stage" >&2
            exit 2
            ;;
        esac
    done
    for stage in $PARTS; do
        case $stage in
            monotonic | recurrent | step | small | compile) order+=("$stage") ;;
            autotune | whole) long+=("$stage") ;;
            *)
                echo "PARTS must name monotonic, recurrent, step, small, compile, autotune or whole, got $stage" >&2
                exit 2
                ;;
        esac
    done
    [[ $# -gt 0 ]] || set -- build test sanitize bench profile
    WANTED=" $* "
    rm -rf "$LOGS"
    mkdir -p "$LOGS" "$TREE"
    : >"$STAGES"
    NAME=$(nvidia-smi --query-gpu=name --format=csv,noheader --id=0 | tr '[:upper:] ' '[:lower:]-')
    NAME=gpu-${NAME#nvidia-}
    announce "${order[@]}" "${long[@]}"

    ! wanted build || stage_build
    # What only has to be right, and what only has to be compiled, shares the device.
    ! wanted test || stage_test &
    ! wanted sanitize || stage_sanitize &
    ! wanted bench || stage_warm &
    wait
    pack
    ! wanted bench || stage_bench "${order[@]}"
    ! wanted profile || stage_profile
    ! wanted test || stage_test_large
    ! wanted bench || stage_bench "${long[@]}"
    summary
    ! cut -f 2 "$STAGES" | grep -q -v -x -e ok -e absent
}

wanted() {
    [[ $WANTED == *" $1 "* ]]
}

# The stages of this call, what they are expected to take, and the sum, in which those that run together count once.
announce() {
    local before=() together=() after=() name expected=0 most=0 longest=0 limit=0
    ! wanted build || before+=(build)
    ! wanted test || together+=(test)
    ! wanted sanitize || together+=(memcheck racecheck)
    ! wanted bench || { together+=(warm) && after+=("$@"); }
    ! wanted profile || after+=($(profiled) profile-kernels)
    ! wanted test || after+=(test-large)
    printf '%-18s %8s %8s\n' stage expected 'at most'
    for name in "${before[@]}" "${together[@]}" "${after[@]}"; do
        limit=${MOST[$name]}
        printf '%-18s %8s %8s\n' "$name" "${EXPECTED[$name]}" "$([[ $limit == "$LIMIT" ]] && echo rest || echo "$limit")"
    done
    limit=0
    for name in "${together[@]}"; do
        longest=$((longest < EXPECTED[$name] ? EXPECTED[$name] : longest))
        limit=$((limit < MOST[$name] ? MOST[$name] : limit))
    done
    for name in "${before[@]}" "${after[@]}"; do
        expected=$((expected + EXPECTED[$name])) most=$((most + MOST[$name]))
    done
    expected=$((expected + longest)) most=$((most + limit < LIMIT ? most + limit : LIMIT))
    printf '%-18s %8s %8s\n\n' 'in all' "$expected" "$most"
}

# Seconds that a stage may take: its own limit, or what is left of the time for everything.
seconds_for() {
    local left=$((LIMIT - RESERVED - SECONDS))
    echo $((MOST[$1] < left ? MOST[$1] : left))
}

# run NAME COMMAND...: the command in TREE, its output in a log; a line on the terminal and one in stages.tsv.
run() {
    local name=$1 limit began=$SECONDS code=0 status=ok
    shift
    limit=$(seconds_for "${name#bench-}")
    if ((limit < 10)); then
        record "$name" skipped 0
        return 1
    fi
    (cd "$TREE" && exec timeout --kill-after=5 "$limit" "$@") >"$LOGS/$name.log" 2>&1 || code=$?
    if [[ $code == 124 || $code == 137 ]] || { [[ $code != 0 ]] && grep -q 'session-timeout: ' "$LOGS/$name.log"; }; then
        status=timeout
    elif [[ $code != 0 ]]; then
        status=failed
        # What a sanitizer says where the machine does not let it.
        ! grep -q 'Device not supported' "$LOGS/$name.log" || status=absent
    fi
    record "$name" "$status" $((SECONDS - began))
    [[ $status == ok ]] || tail -n 15 "$LOGS/$name.log" | cut -c1-200
    return "$code"
}

record() {
    printf '%s\t%s\t%s\n' "$1" "$2" "$3" | tee -a "$STAGES"
}

# For the architecture of this card only. The tree holds what tests and benchmarks need beside the installed package, and
# no sources of it that could be imported in its place. Where the kernels cannot be compiled the rest is still of use.
stage_build() {
    rm -rf "$TREE"
    mkdir -p "$TREE"
    cp -R benchmarks bindings csrc docs tests CMakeLists.txt Makefile README.md CHANGELOG.md conftest.py pyproject.toml "$TREE"
    build build ON && return
    grep -E -m 12 '(error|fatal)\b' "$LOGS/build.log" | cut -c1-200 || true
    MOST[build-without-cuda]=${MOST[build]}
    build build-without-cuda OFF || true
}

build() {
    local capability
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader --id=0 | tr -d '. ')
    SKBUILD_CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=$capability-real" \
        SKBUILD_BUILD_DIR="$TREE.cache/$1" CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) FASTMIX_CUDA=$2 \
        run "$1" "$PYTHON" -m pip install --no-build-isolation --no-deps --no-cache-dir --upgrade --target "$TREE" "$ROOT"
}

# Tests that fill the device's memory run alone, later. A plugin for benchmarks would warn that it does nothing in several
# processes, and warnings are errors. pytest itself ends in time, for then it tells what failed so far.
BIG=two_to_the_31
stage_test() {
    local parallel=() limit
    limit=$(seconds_for test)
    ! "$PYTHON" -c 'import xdist' 2>/dev/null || parallel=(-n "$WORKERS" --dist worksteal)
    run test "$PYTHON" -m pytest -m gpu -v --tb=short -p no:cacheprovider --benchmark-disable --durations=8 \
        --timeout=90 --session-timeout=$((limit > 40 ? limit - 20 : 20)) "${parallel[@]}" -k "not $BIG" tests || true
}

stage_test_large() {
    run test-large "$PYTHON" -m pytest -m gpu -v --tb=short -p no:cacheprovider -k "$BIG" tests || true
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
        run "$tool" compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 1 $filter \
            "$PYTHON" -m benchmarks.sanitize &
    done
    wait
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

# What is compiled at run time, so that it lies in its cache when it is timed. Autotuning is not: it measures.
stage_warm() {
    local part parts=() i
    for part in monotonic compile; do
        [[ " $PARTS " != *" $part "* ]] || parts+=(--part "$part")
    done
    [[ ${#parts[@]} -gt 0 ]] || return 0
    export TORCHINDUCTOR_COMPILE_THREADS=2
    run warm bash -c 'for ((i = 1; i <= '"$WORKERS"'; i++)); do "$@" --share "$i/'"$WORKERS"'" & done; wait' warm \
        "$PYTHON" -m fastmix bench warm "${parts[@]}" "${SELECTED[@]}" || true
}

# Each part in a process of its own: an error on the device ends its process.
stage_bench() {
    local part
    for part in "$@"; do
        rm -f "$LOGS/bench-$part.json"
        run "bench-$part" "$PYTHON" -m fastmix bench table --device cuda --part "$part" "${SELECTED[@]}" "${EFFORT[@]}" \
            --ceilings "$LOGS/ceilings.json" --json "$LOGS/bench-$part.json" --threads "$(nproc)" || true
        pack
    done
}

# Learner steps by part, in precision "high" as the goals have it, then the kernels of everything. The public way is
# there once, since it is the same at every size.
stage_profile() {
    local name against reports=()
    for name in $(profiled); do
        against=()
        [[ $name != profile-5m_vs_6m ]] || against=(--against public)
        TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 run "$name" "$PYTHON" -m fastmix profile --algo qmix --shape "${name#profile-}" \
            --device cuda --graphs "${against[@]}" --rounds 5 --json "$LOGS/$name.json" || true
        [[ ! -s $LOGS/$name.json ]] || reports+=("$LOGS/$name.json")
    done
    run profile-kernels "$PYTHON" -m benchmarks.profile_gpu "${reports[@]}" --json "$OUT/$NAME-profile.json" || true
    for name in $(profiled) profile-kernels; do
        [[ ! -e $LOGS/$name.log ]] || cat "$LOGS/$name.log" <(echo)
    done >"$OUT/$NAME-profile.txt"
    pack
}

profiled() {
    local shape
    for shape in 5m_vs_6m MMM2; do
        if [[ -z $SHAPES || " $SHAPES " == *" $shape "* ]]; then
            echo "profile-$shape"
            [[ ${QUICK:-} != 1 ]] || break
        fi
    done
}

# Logs, and the reports of the parts, as one file.
pack() {
    tar -C "$LOGS" -czf "$OUT/logs.tar.gz.part" . || true
    mv "$OUT/logs.tar.gz.part" "$OUT/logs.tar.gz"
}

# One report of all parts; what failed, what reached its goal and what did not.
summary() {
    local reports=() part
    for part in $PARTS; do
        [[ ! -s $LOGS/bench-$part.json ]] || reports+=("$LOGS/bench-$part.json")
    done
    echo
    column -t "$STAGES" 2>/dev/null || cat "$STAGES"
    failures
    ! wanted bench || [[ ${#reports[@]} -eq 0 ]] || (cd "$TREE" && "$PYTHON" -m fastmix bench join "${reports[@]}" \
        --json "$OUT/$NAME.json" --markdown "$OUT/$NAME.md" --brief) || true
    pack
}

# Failed tests, one line each; of a run that was cut off what its progress told.
failures() {
    local log found
    wanted test || return 0
    for log in "$LOGS/test.log" "$LOGS/test-large.log"; do
        [[ -s $log ]] || continue
        tail -n 1 "$log"
        found=$(grep -E '^(FAILED|ERROR) ' "$log" || grep -oE '(FAILED|ERROR) tests/.*' "$log" | sort -u || true)
        [[ -z $found ]] || printf '%s\n' "$found" | cut -c1-180 | head -n 25
    done
}

main "$@"
