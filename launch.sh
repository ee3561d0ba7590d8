#!/usr/bin/env bash
# DaramGPT from a bare python3 to a distilled, evaluated, exported student. Run again, it goes on where it stopped.
#
#   bash launch.sh [RECIPE=quickstart] [--corpus DIR] [--ds-config FILE] [--hours H] [--run DIR] [--set key=value ...]
#                  [--after-save CMD] [--num-gpus N] [--hostfile FILE [--node-rank N] [--master-addr A] [--master-port P]]
#                  [--allow-changes] [--wheels DIR] [--dry-run]
#   bash launch.sh [--wheels DIR] test [PYTEST ARGUMENTS ...]
#
#   RECIPE            quickstart (makes its own corpus and teacher), daramgpt (the full run), or a .toml file
#   --corpus DIR      folder that holds the downloaded corpora
#   --ds-config FILE  a name in ds_configs/ or a file of your own
#   --hours H         hours this session may take, counted from the end of the installation
#   --run DIR         run directory (default: runs/<recipe>)
#   --after-save CMD  run CMD with the path of each new checkpoint behind it; persistence.directory and persistence.hub
#                     of the recipe keep copies elsewhere, from which a session on an empty machine goes on
#   --set key=value   override a key of the recipe; may be repeated
#   --allow-changes   go on with another loss, optimizer or schedule than the run was begun with
#   --num-gpus N      GPUs to train on (default: all)
#   --hostfile FILE   machines to train on, as DeepSpeed's launcher reads them; pdsh and ssh start their ranks
#   --node-rank N     without pdsh and ssh, one command a machine: its line in the hostfile, from 0. 0 does everything,
#                     the others only train, once 0 has made the plan; all share one run directory
#   --master-addr A, --master-port P   of machine 0, for the others (default: its name in the hostfile, 29500)
#   --wheels DIR      install from the wheels in DIR, without a package index
#   --dry-run         print what would be installed and run, and why; create nothing
#   test              install, then run the test suite
#
# Exit codes: 0 done, or stopped with everything saved; 2 you can mend it, the line says how; 1 a bug of ours.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/.venv
fail() { echo "launch.sh: $1" >&2; exit 2; }

# --- The command line. Paths stay as they were given: they are relative to the folder you are in. ---

recipe='' extra='' dry_run='' wheels=''
common=() ranks=() session=() overrides=() changes=() node_rank=0
while (($#)); do
    option=$1; shift
    if [[ $option == --*=* ]]; then set -- "${option#*=}" "$@"; option=${option%%=*}; fi
    case $option in
    --corpus | --ds-config | --hours | --run | --set | --wheels | --num-gpus | --hostfile | --node-rank | --master-addr | \
        --master-port | --after-save)
        (($#)) && [[ $1 && $1 != --* ]] || fail "$option needs a value; see bash launch.sh --help"
        case $option in
        --wheels) [[ -d $1 ]] || fail "--wheels $1: no such folder; name one that holds wheels"; wheels=$(cd "$1" && pwd) ;;
        --hours | --master-addr | --master-port | --after-save) session+=("$option" "$1") ;;
        --node-rank) session+=("$option" "$1") node_rank=$1 ;;
        --num-gpus | --hostfile) ranks+=("$option" "$1") ;;
        --set) common+=("$option" "$1") overrides+=("$1") ;;
        --ds-config) common+=("$option" "$1") overrides+=("engine.ds_config=$1") ;;
        *) common+=("$option" "$1") ;;
        esac
        shift ;;
    --dry-run) dry_run=1 ;;
    --allow-changes) changes=(--allow-changes) ;;
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    -*) fail "unknown option $option; see bash launch.sh --help" ;;
    test) [[ -z $recipe ]] || fail "two recipes, $recipe and test; give one"; extra=dev; break ;;
    *) [[ -z $recipe ]] || fail "two recipes, $recipe and $option; give one"; recipe=$option ;;
    esac
done
recipe=${recipe:-quickstart}
steps=(doctor prepare plan train evaluate export report)
processes=(-n auto --maxprocesses 4) # of the test suite: half of what a test does is to import libraries
if [[ $node_rank != 0 ]]; then steps=(train); fi # the other machines join the ranks of the first one
choose_options() { # of a step
    options=("${common[@]}")
    if [[ $1 == plan || $1 == train ]]; then options+=("${ranks[@]}"); fi
    if [[ $1 == train ]]; then options+=("${session[@]}"); fi
    if [[ $1 == doctor || $1 == prepare || $1 == plan || $1 == train ]]; then options+=("${changes[@]}"); fi
}

# --- The environment: .venv beside this script, made once. ---

# What it depends on, in one line; written down when an installation is complete, so an interrupted one is redone.
bootstrap() { PYTHONPATH=$here "$1" -P -B -m daramgpt.bootstrap "${@:2}"; }
complete() { [[ -f $1 && $(bootstrap "$venv/bin/python" key 2>/dev/null) == "$(<"$1")" ]]; }
installed=$venv/installed${extra:+-$extra}
# Installing takes minutes. How many packages there are, pip knows when it has asked for all of them.
pip_action() {
    local line name
    line=$(grep -aE '^ *(Collecting|Downloading|Installing collected packages) ?' "$venv/install.log" | tail -n 1) || true
    if [[ $line == Installing* ]]; then
        line=${line//[^,]/}
        echo "$(find "$venv"/lib/python3*/site-packages -maxdepth 1 -name '*.dist-info' | wc -l) of $((${#line} + 1)) in place"
    elif read -r _ name _ <<<"$line" && [[ $name ]]; then
        name=${name##*/} name=${name%%-[0-9]*}
        echo "fetching ${name%%[<>=!~;([]*}"
    fi
}
say_pip_actions() { # once a second on a terminal, twice a minute in a log, until it is killed or the script is gone
    local every=30 form='  %-30s %5d s  %s\n'
    if [[ -t 1 ]]; then every=1 form='\r\e[K  %-30s %5d s  %.38s'; fi
    local next=$every
    while sleep 1 &>/dev/null && kill -0 $$ 2>/dev/null; do
        ((SECONDS >= next)) || continue
        next=$((SECONDS + every))
        printf "$form" packages "$SECONDS" "$(pip_action)"
    done
}

if [[ -z $dry_run ]] && command -v flock >/dev/null; then # two launches must not install into one environment
    exec 9<"${BASH_SOURCE[0]}"
    flock --nonblock 9 || { echo "Waiting for another launch.sh that is installing."; flock 9; }
fi

if [[ -n $dry_run ]] || ! complete "$installed"; then
    python=''
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
    done
    [[ -n $python ]] || fail "python3 is missing or older than 3.11; install Python 3.11 or newer"
    python_version=$("$python" -c 'import platform; print(platform.python_version())')

    # The machine's own torch is used, never replaced, where it has kernels for the machine's device.
    read -r device torch_pin _ < <(bootstrap "$python" key)
    if machine_torch=$(bootstrap "$python" machine-torch); then
        torch=${machine_torch%% *} make=("$python" -m venv --clear --system-site-packages)
        why="the machine's own, which has kernels for its ${device/cuda/gpu}"
    else
        torch=$torch_pin make=("$python" -m venv --clear)
        why="pinned; of the machine's own: $machine_torch"
    fi
    # Some systems ship Python without ensurepip; there, pip installs from outside.
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        pip=("$venv/bin/python" -m pip)
    else
        pip=("$python" -m pip --python "$venv/bin/python") make+=(--without-pip)
        "$python" -m pip --version &>/dev/null || fail "$python has no pip; install it (Debian, Ubuntu: apt install python3-pip)"
    fi
    make+=("$venv")
    install=("${pip[@]}" install --no-input --constraint "$venv/torch.txt" --editable "${here}[report${extra:+,$extra}]")
    if [[ -n $wheels ]]; then install+=(--no-index --find-links "$wheels"); fi
fi

if [[ -n $dry_run ]]; then
    description=$(bootstrap "$python" describe "$recipe" "${overrides[@]/#/--set=}") || exit 2
    echo "Dry run: nothing is created."
    echo "$description"
    echo "  python       $python_version"
    echo "  torch        $torch: $why"
    echo "Would install, unless it is there already:"
    printf '  %s\n' "$(printf '%q ' "${make[@]}")" "$(printf '%q ' "${install[@]}")"
    echo "Would run:"
    if [[ -n $extra ]]; then echo "  python -m pytest ${processes[*]} $(((!$#)) || printf '%q ' "$@")"; exit 0; fi
    for command in "${steps[@]}"; do
        choose_options "$command"
        echo "  python -m daramgpt $(printf '%q ' "$command" "$recipe" "${options[@]}")"
    done
    exit 0
fi

if [[ -n ${python:-} ]]; then
    echo "Set-up: python $python_version"
    echo "  torch $torch: $why"
    if ! complete "$venv/installed"; then
        SECONDS=0
        fault=$("${make[@]}" 2>&1) ||
            fail "cannot create $venv ($(tail -n 1 <<<"$fault")); mend that and run the same command again"
        # Where python3 is itself a virtual environment, its packages are not the system's: name their folder.
        if [[ ${make[*]} == *--system-site-packages* ]] &&
            ! "$venv/bin/python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))'; then
            echo "${machine_torch#* }" >"$(echo "$venv"/lib/python3*/site-packages)/machine-torch.pth"
        fi
        echo "torch==$torch" >"$venv/torch.txt"
        printf '  %-30s %5d s\n' "environment .venv" "$SECONDS"
    fi
    SECONDS=0
    rm -f "$venv"/installed*
    : >"$venv/install.log"
    say_pip_actions 9<&- & # without the lock
    speaker=$! code=0
    "${install[@]}" &>"$venv/install.log" || code=$?
    kill "$speaker" 2>/dev/null || true
    wait "$speaker" 2>/dev/null || true
    if [[ -t 1 ]]; then printf '\r\e[K'; fi
    if ((code)); then
        { grep -iE 'error|no space' "$venv/install.log" || cat "$venv/install.log"; } | tail -n 8 >&2
        fail "the installation failed: see above, or all of $venv/install.log; mend that and run the same command again"
    fi
    key=$(bootstrap "$venv/bin/python" key)
    for stamp in "$venv/installed" "$installed"; do echo "$key" >"$stamp"; done
    printf '  %-30s %5d s\n' "packages${extra:+ with $extra}" "$SECONDS"
fi
exec 9<&-

# --- Settings of the run. ---

read -r device _ <"$installed"
export TOKENIZERS_PARALLELISM=true HF_HUB_DISABLE_TELEMETRY=1
if [[ $device == cpu ]]; then
    export DS_ACCELERATOR=cpu
fi

if [[ -n $extra ]]; then
    cd "$here" && exec "$venv/bin/python" -m pytest "${processes[@]}" "$@"
fi

if [[ $device == cpu ]]; then
    # Large temporaries are reused instead of returned to the system: their page faults cost more than the arithmetic.
    # Older C libraries ignore a threshold above 32 MiB, so mapping is switched off as well.
    # Not for the tests: a process that runs hundreds of them would keep the largest of all their blocks.
    export MALLOC_MMAP_THRESHOLD_=34359738368 MALLOC_TRIM_THRESHOLD_=34359738368 MALLOC_MMAP_MAX_=0
fi

# --- The run. ---

# Commands run in the background because bash answers a signal only between foreground commands. A background command
# ignores Ctrl-C, so SIGTERM carries both signals to it: it saves, and stops by itself.
child='' signals=0 interrupted=''
kill_tree() {
    local pid
    for pid in $(cat /proc/"$1"/task/*/children 2>/dev/null); do kill_tree "$pid"; done
    kill -KILL "$1" 2>/dev/null || true
}
on_signal() {
    interrupted=1 signals=$((signals + 1))
    if [[ -z $child ]]; then exit 0; fi
    if [[ $1 == INT ]] && ((signals > 1)); then kill_tree "$child"; exit 130; fi
    echo "launch.sh: stopping; Ctrl-C once more stops at once" >&2
    kill -TERM "$child" 2>/dev/null || true
}
trap 'on_signal INT' INT
trap 'on_signal TERM' TERM

daramgpt() {
    local code=0 status
    "$venv/bin/python" -P -m daramgpt "$@" &
    child=$!
    while true; do
        interrupted='' status=0
        wait "$child" || status=$?
        # 127: it was gone already; -1, as bash says then: it went while a signal was being answered, or right after.
        ((status == 127 || (signals && (status == -1 || status == 255)))) || code=$status
        if [[ -z $interrupted ]] || ((status <= 128)); then break; fi # else the signal ended the wait, not the command
    done
    child=''
    return "$code"
}

DARAMGPT_SESSION_START=$(date +%s) SECONDS=0 # --hours counts from here
export DARAMGPT_SESSION_START

code=0
daramgpt status "$recipe" "${common[@]}" "${changes[@]}" --quiet || code=$?
if ((code != 3)); then exit "$code"; fi # 0: all is done, and it said so; 3: there is work left

number=0
for command in "${steps[@]}"; do
    # Before the seconds in which Python imports its libraries without a word.
    echo "-- $((++number)) of ${#steps[@]}: $command"
    choose_options "$command"
    code=0
    daramgpt "$command" "$recipe" "${options[@]}" || code=$?
    # 143: ended by our SIGTERM itself; what a command has done so far is kept, and the next run goes on from it.
    if ((signals && (code == 0 || code == 143))); then
        echo "launch.sh: stopped; the same command goes on from here" >&2
        exit 0
    fi
    if ((code)); then exit "$code"; fi
done
printf 'launch.sh: %d min %d s after the set-up\n' "$((SECONDS / 60))" "$((SECONDS % 60))"
