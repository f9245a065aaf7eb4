#!/usr/bin/env bash
# Everything about shardopt that needs a GPU, in one command of under 10 minutes:
#
#   bash benchmarks/gpu/run.sh [--out FOLDER] [--only "PART ..."] [--dry-run] [--quick]
#
# It takes one NVIDIA GPU with 24 GB that nothing else uses, and a Python with CuPy 14, PyTorch for
# CUDA, mpi4py, Numba, ml_dtypes, xxhash, psutil, hypothesis, pytest 9 and pytest-mpi. It downloads
# nothing, changes no setting of the GPU, and leaves nothing behind but results, and Python's caches.
#
# What must be right comes first, what must be fast after it. Each part has a time limit, and the
# next one runs whatever became of it. The last line says whether all went well, as the exit code
# does. Results are in FOLDER (runs/gpu_DATE):
#
#   parts.jsonl    each part: ok, failed, timeout, skipped or not run, and its seconds
#   facts.jsonl    the machine: driver, CuPy, compiler, pinned memory ...
#   gpu_*.jsonl    measurements with their samples and targets, as in benchmarks/results
#   log.txt        all that the parts have printed
#
#   --only     the parts to run, for example --only "facts ranks2"
#   --dry-run  rehearse it without a GPU: the CPU, and interpreted PTX, stand in for it. This is what
#              happens where CuPy finds none.
#   --quick    of each part of a dry run only a little
#
# PYTHON  the interpreter (python3)
# WHEELS  a folder with wheels of what is missing, such as mpich and pytest_mpi: they are unpacked
#         for this run only
# COMMIT  the commit, where this is no checkout of git
set -uo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-python3}
out=runs/gpu_$(date +%Y-%m-%d_%H-%M-%S)
only=''
is_dry=false
is_quick=false
limit_s=570 # for everything

while (($#)); do
    case $1 in
        --out) out=$2 && shift 2 ;;
        --only) only=$2 && shift 2 ;;
        --dry-run) is_dry=true && shift ;;
        --quick) is_quick=true && shift ;;
        -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit ;;
        *) echo "there is no option $1; see --help" >&2 && exit 2 ;;
    esac
done

work=$(mktemp -d)
child=''
trap 'trap "" EXIT; [[ $child ]] && kill "$child" 2>/dev/null && wait "$child"; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
mkdir -p "$out"
out=$(cd "$out" && pwd)

# use_wheels FOLDER: unpack wheels and, of an MPI, the programs and libraries.
use_wheels() {
    local wheel data
    for wheel in "$1"/*.whl; do "$python" -m zipfile -e "$wheel" "$work/site" || exit 2; done
    PYTHONPATH=$work/site:$PYTHONPATH
    for data in "$work"/site/*.data/data; do
        if [[ ! -x $data/bin ]]; then continue; fi
        chmod -R +x "$data/bin"
        PATH=$data/bin:$PATH LD_LIBRARY_PATH=$data/lib:${LD_LIBRARY_PATH:-}
        export LD_LIBRARY_PATH
    done
}

set -a # for all that is started
source tests/mpi.env
unset PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS OPENBLAS_NUM_THREADS MKL_NUM_THREADS NUMBA_NUM_THREADS NPROC
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
CUPY_CACHE_DIR=$work/cupy
TMPDIR=$work
if [[ ${WHEELS:-} ]]; then use_wheels "$WHEELS"; fi
set +a
beside=$(dirname "$("$python" -c 'import sys; print(sys.executable)')")
PATH=$beside:$PATH
hash -r

sees_gpu='import cupy, sys; sys.exit(not cupy.cuda.runtime.getDeviceCount())'
if ! "$is_dry" && ! "$python" -c "$sees_gpu" 2>"$work/why"; then
    echo "CuPy finds no GPU ($(tail -n 1 "$work/why")): this is a dry run."
    is_dry=true
fi
device=cuda gpu=real sanitizer=(compute-sanitizer --target-processes all --error-exitcode 7)
checked='(test_an_update and 2-2) or (test_a_reduction and float32-3)' # by compute-sanitizer
few_bits=() few_ranks=() steps=60 width=256 small=() rounds=()
if "$is_dry"; then
    device=stand-in gpu=stand-in sanitizer=(env) checked='test_an_update and bfloat16-2-2'
    steps=8 width=32 small=(--numel 40960 --tensors 3) rounds=(--rounds 2)
fi
tests=(tests/*/test_gpu.py)
if "$is_dry" && "$is_quick"; then
    few_bits=(-k 'test_an_update and float32-2-2') few_ranks=(-k test_inf)
    tests=(tests/devices/test_gpu.py)
fi

failed=()
status=0

# part NAME SECONDS COMMAND...: run a part for so many seconds at most; sets status.
part() {
    local name=$1 limit=$2 begin=$SECONDS state=ok note=''
    shift 2
    status=0
    if [[ $only && " $only " != *" $name "* ]]; then return; fi
    if ((limit > limit_s - SECONDS)); then limit=$((limit_s - SECONDS)); fi
    if ((limit < 5)); then
        record "$name" 'not run' 0 'no time is left'
        failed+=("$name")
        return
    fi
    timeout -k 5 "$limit" "$@" >"$work/part.log" 2>&1 </dev/null &
    child=$!
    wait "$child" || status=$?
    child=''
    { echo "==== $name: $*" && cat "$work/part.log"; } >>"$out/log.txt"
    if ((status == 124 || status == 137)); then state=timeout; elif ((status)); then state=failed; fi
    note=$(grep -aoE '^=* ?([0-9]+ [a-z]+,? )+in [0-9.]+s' "$work/part.log" | tail -n 1 | tr -d =)
    record "$name" "$state" $((SECONDS - begin)) "$note"
    if ((status)); then
        failed+=("$name")
        tail -n 15 "$work/part.log" | sed 's/^/    /'
    fi
}

# record NAME STATE SECONDS NOTE: print what became of a part, and write it down.
record() {
    printf '%-8s %-14s %4d s  %s\n' "$2" "$1" "$3" "$4"
    printf '{"part": "%s", "state": "%s", "seconds": %d}\n' "$1" "$2" "$3" >>"$out/parts.jsonl"
}

# Warnings of other libraries, of which a new machine may have any, end no test.
pytest=(-m pytest -q -rs --color=no -p no:cacheprovider --basetemp "$work/pytest" -m gpu --gpu "$gpu"
    --thorough -W default::UserWarning -W default::DeprecationWarning -W default::FutureWarning)
kernel=tests/backends/cuda/test_on_gpu.py
ranks=("${pytest[@]}" --with-mpi ${few_ranks[@]+"${few_ranks[@]}"} "${tests[@]}")

if "$is_dry"; then echo 'A dry run: it shows whether this script works, and nothing about GPUs.'; fi

# -- what must be right ----------------------------------------------------------------------------

if ! "$is_dry"; then
    part facts 45 "$python" -m benchmarks.gpu.facts
    if [[ -f $work/part.log ]]; then grep -a '^{' "$work/part.log" >"$out/facts.jsonl"; fi
fi
part doctor 60 mpiexec -n 2 "$python" -m shardopt doctor --quick
part bits 150 "$python" "${pytest[@]}" ${few_bits[@]+"${few_bits[@]}"} "$kernel"
part ranks2 120 mpiexec -n 2 "$python" "${ranks[@]}"
part ranks4 120 mpiexec -n 4 "$python" "${ranks[@]}"
part suite 90 mpiexec -n 1 "$python" "${ranks[@]}"
tools='memcheck racecheck'
if ! "$is_dry" && ! timeout 30 "${sanitizer[@]}" "$python" -c 'import cupy; cupy.arange(3).sum()' \
    >>"$out/log.txt" 2>&1; then
    for tool in $tools; do record "$tool" skipped 0 'there is no compute-sanitizer that works'; done
    tools=''
fi
for tool in $tools; do
    "$is_dry" || sanitizer+=(--tool "$tool") # the last one counts
    part "$tool" 75 "${sanitizer[@]}" "$python" "${pytest[@]}" -k "$checked" "$kernel"
done
train=(launch/train_lm.py --framework torch --device "${device/stand-in/cpu}" --text shardopt)
train+=(--steps "$steps" --layers 2 --width "$width" --context 64 --out "$work/run")
part training 90 mpiexec -n 2 "$python" "${train[@]}"
part losses 20 "$python" -m benchmarks.gpu.losses "$work/run"

# -- what must be fast -----------------------------------------------------------------------------

for case in gpu_kernel gpu_overhead gpu_memory gpu_offload; do
    words=(--device "$device" --out "$out" ${small[@]+"${small[@]}"})
    if [[ $case != gpu_memory ]]; then words+=(${rounds[@]+"${rounds[@]}"}); fi # it has none
    part "$case" 90 "$python" -m benchmarks "$case" "${words[@]}"
done

if ! "$is_dry"; then "$python" -m benchmarks summary --results "$out"; fi
echo
if ((${#failed[@]})); then
    echo "${#failed[@]} parts failed: ${failed[*]}. $out/log.txt has what they printed."
    exit 1
fi
echo "All went well. Results are in $out."
