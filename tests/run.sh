#!/usr/bin/env bash
# Runs all tests, with MPICH and with Open MPI:
#
#   bash tests/run.sh [--all] [--mpi mpich|openmpi] [--ranks "1 2"] [arguments for pytest ...]
#
# The tests that want ranks run on 3 with MPICH, or on 2 if a third rank changes nothing. On 1 and 4
# ranks, and with Open MPI on 3, run those that such a number or another MPI may change, too.
# tests/support/parts.py lists them. --ranks runs all of them on each of its numbers, and --all on 1
# to 4, with both, in all their combinations.
#
#   bash tests/run.sh --clients [--ranks "2"] [arguments for pytest ...]
#
# runs other people's trainers instead (tests/clients), with MPICH on 2 ranks. They get an
# environment of their own, .test-env/clients, with the releases of tests/clients/requirements.txt.
#
# All that must be there is Python 3.11 or newer with venv. The first run makes an environment for
# each MPI under .test-env; all are made anew when the dependencies in pyproject.toml change. The
# tests of the kernel for GPUs, which need no GPU, find NVIDIA's compiler in .test-env/cuda, and use
# g++ where it is.
#
# PYTHON  the interpreter, python3 unless set
# TORCH   the PyTorch that results are compared with, as pip takes it; empty for none. Where pip
#         finds no CPU build by itself, PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL can point to one:
#         the usual build brings several gigabytes of CUDA.
# LUCID   the lucid that results are compared with; empty for none. Where it cannot be installed its
#         tests are skipped, and the summary says so.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
torch=${TORCH-torch==2.13.0}
lucid=${LUCID-lucid-dl==2.9.0}
mpis=(mpich openmpi)
ranks=(default) # of each MPI; see numbers_of
everything=false
clients=false
limit_s=1800 # for one run of pytest; each ends hung tests itself, long before

while (($#)); do
    case $1 in
        --all) everything=true && shift ;;
        --clients) clients=true mpis=(clients) ranks=(2) && shift ;;
        --mpi) mpis=("$2") && shift 2 ;;
        --ranks) read -ra ranks <<<"$2" && shift 2 ;;
        -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit ;;
        *) break ;;
    esac
done
if "$clients" && (($# == 0)); then set -- tests/clients; fi

# set_up NAME: make .test-env/NAME, unless it is there and as pyproject.toml wants it.
set_up() {
    local env=.test-env/$1 extras=$1,test,lint,plot,jax list='' stamp
    if [[ $1 == clients ]]; then
        extras=mpich,test list=tests/clients/requirements.txt
    fi
    stamp=$(stamp_of ${list:+"$list"})
    if is_made "$env" "$stamp"; then return; fi
    echo "making $env (some minutes)"
    rm -rf "$env"
    start_from_another "$1" || "$python" -m venv "$env"
    # Of what is installed little is imported, so it is compiled when it is.
    if ! "$env/bin/python" -m pip install --no-compile -e ".[$extras]" ${torch:+"$torch"} \
        ${list:+-r "$list"} >"$env/pip.log" 2>&1 </dev/null; then
        tail -n 30 "$env/pip.log"
        return 1
    fi
    if [[ $lucid && $1 != clients ]]; then add_lucid "$env"; fi
    echo "$stamp" >"$env/stamp"
}

# stamp_of FILE...: print what an environment depends on, with files that list more of it.
stamp_of() {
    local wanted
    wanted=$({ sed '/^\[tool\./,$d' pyproject.toml && cat /dev/null "$@"; } | cksum)
    echo "$PWD $("$python" --version) $torch $lucid $wanted"
}

# is_made ENV STAMP: whether an environment is there, and not out of date.
is_made() { [[ -f $1/stamp && $(<"$1/stamp") == "$2" ]]; }

# start_from_another NAME: copy the environment of another MPI without its MPI, if there is one. Files
# are shared, so this takes seconds, and pip then finds nearly all that is needed.
start_from_another() {
    local env=.test-env/$1 other stamp
    stamp=$(stamp_of)
    for other in mpich openmpi; do
        if [[ $other == "$1" ]] || ! is_made ".test-env/$other" "$stamp"; then continue; fi
        cp -al ".test-env/$other" "$env" && rm -f "$env"/{stamp,missing,pip.log} &&
            grep -rlI "$PWD/.test-env/$other" "$env/bin" | xargs -d '\n' \
                sed -i "s|$PWD/.test-env/$other|$PWD/$env|g" &&
            "$env/bin/python" -m pip uninstall --quiet --yes "$other" && return
        rm -rf "$env"
    done
    return 1
}

# add_lucid ENV: it asks for Python 3.12 but runs on 3.11 with what tests/test_lucid.py lends it, and
# for hundreds of megabytes that only its data sets need.
add_lucid() {
    if ! {
        "$1/bin/python" -m pip install --no-compile 'mlx[cpu]' &&
            "$1/bin/python" -m pip install --no-compile --no-deps --ignore-requires-python "$lucid"
    } >>"$1/pip.log" 2>&1 </dev/null; then
        echo "$1 has no lucid, so its tests are skipped; $1/pip.log says why" >"$1/missing"
    fi
}

# compile NAME: compile the modules and kernels that most tests need, before runs that begin together
# each do so. A copy of the environment has the compiled modules, too.
compile() {
    local bin=.test-env/$1/bin
    {
        # A lone process of Open MPI leaves nothing in /dev/shm if it talks to itself only.
        OMPI_MCA_btl=self "$bin/python" -m pytest --collect-only -p no:cacheprovider --with-mpi
        "$bin/python" - <<'END'
from shardopt.backends.cpu.kernel import CpuKernel

for dtype in "float32", "bfloat16":
    CpuKernel().prepare(dtype)
END
    } >/dev/null 2>&1 || true # the tests will tell
}

# set_up_cuda: make .test-env/cuda, unless it is there and as tests/support/cuda wants it.
set_up_cuda() {
    local env=.test-env/cuda list=tests/support/cuda/requirements.txt stamp
    stamp="$PWD $("$python" --version) $(cksum <"$list")"
    if [[ -f $env/stamp && $(<"$env/stamp") == "$stamp" ]]; then return; fi
    rm -rf "$env"
    "$python" -m venv "$env"
    if ! "$env/bin/python" -m pip install --no-deps --no-compile -r "$list" \
        >"$env/pip.log" 2>&1 </dev/null; then
        echo "$env has no compiler for GPUs, so the kernel's tests that need it are skipped;" \
            "$env/pip.log says why" >"$env/missing"
    fi
    echo "$stamp" >"$env/stamp"
}

# count WORD...: the number before one of the words in pytest's last line, or 0.
count() {
    local IFS='|'
    { grep -oE "[0-9]+ ($*)\b" <<<"$last_line" || echo 0; } | cut -d' ' -f1
}

logs=.test-env/logs
places=4 # for what runs side by side on two cores, as jobs and ranks often wait
declare -A places_of=()
begun=()
row='%-22s %7s %7s %8s %8s  %s\n'
summary=()
notes=()
failures=()
total_passed=0
total_failed=0
total_skipped=0

# begin PLACES TITLE COMMAND...: start one pytest beside others, once so many of the places are free.
# Its output is shown once a run has ended.
begin() {
    local wanted=$1
    shift
    while (($(taken) + wanted > places)); do
        wait -n || true
        show_ended
    done
    rm -f "$logs/$1.end"
    record "$@" >/dev/null &
    places_of[$!]=$wanted
    begun+=("$1")
}

# taken: print how many places those take that run.
taken() {
    local pid sum=0
    for pid in $(jobs -rp); do ((sum += ${places_of[$pid]-0})) || true; done
    echo "$sum"
}

# show_ended: print what has been begun and has ended, and add it to the summary.
show_ended() {
    local title left=()
    for title in ${begun[@]+"${begun[@]}"}; do
        if [[ ! -f $logs/$title.end ]]; then
            left+=("$title")
            continue
        fi
        printf '\n==== %s ====\n' "$title"
        cat "$logs/$title"
        sum_up "$title"
    done
    begun=(${left[@]+"${left[@]}"})
}

# record TITLE COMMAND...: run one pytest; keep what it prints, its exit code and its seconds.
record() {
    local log=$logs/$1 status=0 start_s=$SECONDS
    shift
    # Open MPI ends its version, which pytest-mpi prints, with a zero byte: no text for grep.
    timeout --foreground -k 10 "$limit_s" "$@" </dev/null 2>&1 | sed -u 's/\x00//g' |
        timeout --foreground "$((limit_s + 30))" tee "$log" || status=$?
    echo "$status $((SECONDS - start_s))" >"$log.end"
}

# sum_up TITLE: add a line to the summary, and the tests that failed to those it ends with.
sum_up() {
    local title=$1 log=$logs/$1 status seconds note='' last_line passed failed skipped line
    read -r status seconds <"$log.end"
    last_line=$(grep -E '^=+ .* in [0-9.]+s.* =+' "$log" | tail -n 1 || true)
    passed=$(count passed)
    failed=$(($(count failed) + $(count error errors)))
    skipped=$(count skipped)
    while read -r line; do failures+=("$title: $line"); done < <(
        sed -nE '/^=+ short test summary info =+$/,$s/^(FAILED|ERROR) //p' "$log"
    )
    if ((status == 5 && selected)); then
        note='nothing selected'
    elif [[ $status != 0 || -z $last_line ]]; then
        if ((failed == 0)); then # the run itself
            failed=1 note="exit code $status"
            failures+=("$title: $note, see $log")
        fi
    fi
    total_passed=$((total_passed + passed))
    total_failed=$((total_failed + failed))
    total_skipped=$((total_skipped + skipped))
    # shellcheck disable=SC2059  # the format of every line
    summary+=("$(printf "$row" "$title" "$passed" "$failed" "$skipped" "$seconds" "$note")")
}

trap 'trap "" TERM; kill 0; exit 130' INT # what was begun, too
rm -rf "$logs"
mkdir -p "$logs"
set -a
source tests/mpi.env
set +a
unset PYTHONDONTWRITEBYTECODE # many a container sets it; every rank would compile every test anew
if ! "$clients"; then set_up_cuda & fi
set_up "${mpis[0]}"
if (($# == 0)); then compile "${mpis[0]}"; fi
for mpi in "${mpis[@]:1}"; do set_up "$mpi"; done
wait

selected=$#
pytest=(-m pytest --color=no -p no:cacheprovider -rfEs --durations 8 "$@")
if "$everything"; then pytest+=(--thorough); fi

# numbers_of MPI: print the numbers of ranks to run with it.
numbers_of() {
    if [[ ${ranks[*]-} != default ]]; then
        echo "${ranks[@]-}"
    elif "$everything" || [[ $1 == "${mpis[0]}" ]]; then
        echo 1 2 3 4
    else
        echo 3
    fi
}

# on_ranks MPI N: begin the tests that want ranks; on several ranks they take two places.
on_ranks() {
    local bin=$PWD/.test-env/$1/bin part='' names=(none one two three four)
    if ! "$everything" && [[ ${ranks[*]-} == default ]]; then
        part=mpi
        if [[ $1 == "${mpis[0]}" ]]; then part=${names[$2]}; fi
    fi
    begin "$(($2 > 1 ? 2 : 1))" "$1, mpirun -n $2" "$bin/mpirun" -n "$2" \
        "$bin/python" "${pytest[@]}" --with-mpi ${part:+--part "$part"}
}

# without_ranks MPI PART: begin a part of the other tests.
without_ranks() {
    begin 1 "$1, $2" "$PWD/.test-env/$1/bin/python" "${pytest[@]}" --part "$2"
}

# The jobs take longest, so they go first; beside them what takes one core, and then the ranks.
if ! "$clients"; then
    part=jobs
    for mpi in "${mpis[@]}"; do
        without_ranks "$mpi" "$part"
        if [[ $mpi == "${mpis[0]}" ]]; then without_ranks "$mpi" plain; fi
        if ! "$everything"; then part=mpi-jobs; fi # with the next MPI, those that it may change
    done
fi
for mpi in "${mpis[@]}"; do
    if [[ -f .test-env/$mpi/missing ]]; then notes+=("$(<".test-env/$mpi/missing")"); fi
    for n in $(numbers_of "$mpi"); do on_ranks "$mpi" "$n"; done
done
wait
show_ended
if ((${#begun[@]})); then echo "these runs have not finished: ${begun[*]}" && exit 1; fi

if [[ -f .test-env/cuda/missing ]]; then notes+=("$(<.test-env/cuda/missing)"); fi
printf '\n==== summary ====\n'
# shellcheck disable=SC2059
printf "$row" '' passed failed skipped seconds ''
printf '%s\n' "${summary[@]}"
# shellcheck disable=SC2059
printf "$row" all "$total_passed" "$total_failed" "$total_skipped" "$SECONDS" ''
if ((${#notes[@]})); then printf '\n%s\n' "${notes[@]}"; fi
if ((${#failures[@]})); then
    printf '\nfailed (what they printed is in %s):\n' "$logs"
    printf '  %s\n' "${failures[@]}"
fi
((total_failed == 0 && total_passed > 0))
