#!/usr/bin/env bash
# Train on all GPUs of this machine, or of several, and go on after failures until the run has finished.
#
#   bash launch/local_8gpu.sh [FLAG ...]            flags of bin/train.py, every one of them
#   REHEARSE=8 bash launch/local_8gpu.sh [FLAG ...] the same program in eight processes on the CPU, with tiny towers
#
# Works from any directory; runs/ and logs/ are made where you stand. Before anything starts it checks driver, CUDA,
# settings, data, disk and memory. A failed attempt is started again with --resume auto. Exit code: see
# launch/attempts.py (0 finished, 75 stopped with a checkpoint, 2 wrong settings or data, 1 failed).
#
#   GPUS            how many GPUs (GPUS=4), or which (GPUS=0,2,5). Default: all that CUDA_VISIBLE_DEVICES or nvidia-smi show
#   RETRIES         attempts after the first one (default 3)
#   LOG_DIR         where train_YYYYMMDD_HHMMSS.log goes (default: logs)
#   MIN_FREE_GIB    free memory that each GPU must have (default 6; the published towers alone take 15)
#   DOCTOR          off: do not look the machine over with bin/doctor.py first
#   EARMARK_RANKS_PER_GPU  processes that share each GPU (default 1): a rehearsal of eight ranks and NCCL where there are
#                   fewer GPUs. They take turns and talk through sockets, so that it is slow; memory is shared too
#   REHEARSE        processes of a rehearsal on the CPU: quickstart's towers and sample, 20 steps unless flags say otherwise
#   NNODES          machines (default 1). Then the runs folder must be on a disk that all of them share, and each needs
#     NODE_RANK       its number, from 0
#     MASTER_ADDR     the address of machine 0, and MASTER_PORT (default 29500)
#     RDZV_ID         a word that is the same on all, and other than that of other jobs (default: the run's name)
#     --run_name      among the flags, the same on all
#   EARMARK_VENV    the Python environment, see launch/setup.sh

set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

say() { printf 'launch: %s\n' "$*" >&2; }
die() {
    printf '\nlaunch: %s\n' "$1" >&2
    shift
    if (($#)); then printf '        %s\n' "$@" >&2; fi
    exit 2
}
is_count() { [[ "$1" =~ ^[1-9][0-9]*$ ]]; }

nnodes="${NNODES:-1}"
retries="${RETRIES:-3}"
is_count "$nnodes" || die "NNODES=$nnodes; allowed: a whole number above 0"
[[ "$retries" =~ ^[0-9]+$ ]] || die "RETRIES=$retries; allowed: a whole number, 0 for a single attempt"
for name in "$@"; do
    case "$name" in
        -h | --help | --dry_run | --dry-run)
            # Nothing to launch: help needs one process, and a dry run writes nothing to go on from.
            exec "$(bash "$root/launch/setup.sh")" "$root/bin/train.py" "$@"
            ;;
    esac
done

# ------------------------------------------------------------------------------------------------------------- devices
find_gpus() {
    if ! command -v nvidia-smi >/dev/null; then
        die "no GPU: nvidia-smi is not on PATH, so there is no NVIDIA driver here." \
            "With a GPU in the machine: install its driver, or start the container with --gpus all." \
            "Without one, rehearse the eight-process run on the CPU:   REHEARSE=8 bash $0" \
            "or train the small towers of the sample:                  bash $root/launch/quickstart.sh"
    fi
    local listed
    if ! listed="$(nvidia-smi --query-gpu=index,driver_version,memory.total,memory.free --format=csv,noheader,nounits 2>&1)"; then
        die "nvidia-smi fails: $(head -n 1 <<<"$listed")" \
            "Driver and kernel module may differ after an update (restart the machine), or the GPU has dropped off the bus." \
            "Without a GPU:   REHEARSE=8 bash $0"
    fi
    [[ -n "$listed" ]] || die "nvidia-smi lists no GPU." "Without a GPU:   REHEARSE=8 bash $0"

    if [[ "${GPUS:-}" == *,* ]]; then
        export CUDA_VISIBLE_DEVICES="${GPUS//[[:space:]]/}"
    fi
    local visible="${CUDA_VISIBLE_DEVICES-all}"
    if [[ "$visible" == all ]]; then
        processes="$(wc -l <<<"$listed")"
    else
        [[ -n "$visible" ]] || die "CUDA_VISIBLE_DEVICES is empty, which hides every GPU." "unset it, or name GPUs: GPUS=0,1"
        processes="$(tr ',' '\n' <<<"$visible" | grep -c .)"
    fi
    if [[ -n "${GPUS:-}" && "$GPUS" != *,* ]]; then
        is_count "$GPUS" || die "GPUS=$GPUS; allowed: how many (GPUS=4) or which (GPUS=0,2,5)"
        ((GPUS <= processes)) || die "GPUS=$GPUS, but only $processes are to be seen here."
        processes="$GPUS"
    fi
    say "$processes GPU(s), driver $(head -n 1 <<<"$listed" | cut -d, -f2 | xargs)"

    local index driver total free min_mib=$((${MIN_FREE_GIB:-6} * 1024)) position=0
    while IFS=', ' read -r index driver total free; do
        if [[ "$visible" == all ]]; then
            ((position < processes)) || break
        else
            # Names like GPU-1234 cannot be compared with an index; torch checks those.
            [[ ",$(cut -d, -f"1-$processes" <<<"$visible")," == *",$index,"* ]] || continue
        fi
        position=$((position + 1))
        [[ "$free" =~ ^[0-9]+$ && "$total" =~ ^[0-9]+$ ]] || continue # some systems do not tell: [N/A]
        if ((free < min_mib)); then
            die "GPU $index has $free of $total MiB free; at least $min_mib are needed (MIN_FREE_GIB)." \
                "Another program holds the rest: nvidia-smi names it. Or choose other GPUs with GPUS=."
        elif ((free * 10 < total * 9)); then
            say "warning: GPU $index has only $free of $total MiB free: another program is using it"
        fi
    done <<<"$listed"
}

first=()
if [[ -n "${REHEARSE:-}" ]]; then
    is_count "$REHEARSE" || die "REHEARSE=$REHEARSE; allowed: the number of processes, as in REHEARSE=8"
    processes="$REHEARSE"
    # Flags of the user come later and win.
    first=(--preset quickstart --data_root "$root" --max_steps 20 --run_name "rehearsal_$(date +%Y%m%d_%H%M%S)")
    say "rehearsal: $processes processes on the CPU, tiny towers; figures say nothing about a GPU"
    [[ -z "${EARMARK_RANKS_PER_GPU:-}" ]] || say "warning: EARMARK_RANKS_PER_GPU means nothing on the CPU"
else
    find_gpus
    ranks_per_gpu="${EARMARK_RANKS_PER_GPU:-1}"
    is_count "$ranks_per_gpu" || die "EARMARK_RANKS_PER_GPU=$ranks_per_gpu; allowed: a whole number above 0"
    if ((ranks_per_gpu > 1)); then
        processes=$((processes * ranks_per_gpu))
        say "$processes processes, $ranks_per_gpu a GPU by turns: a rehearsal, slow by its nature"
    fi
fi

# ---------------------------------------------------------------------------------------------- settings, data, memory
if ((nnodes > 1)); then
    for name in NODE_RANK MASTER_ADDR; do
        [[ -n "${!name:-}" ]] || die "NNODES=$nnodes, but $name is not set." "Each machine needs NODE_RANK and MASTER_ADDR."
    done
    ((NODE_RANK < nnodes)) || die "NODE_RANK=$NODE_RANK; allowed: 0 to $((nnodes - 1))"
    [[ " $* " =~ \ --run[_-]name[=\ ] ]] || die "NNODES=$nnodes needs --run_name, the same on all machines."
    # Machines notice a failure at different times, so that an attempt may be one's first and another's second.
    first+=(--resume auto)
fi

python="$(bash "$root/launch/setup.sh")"
if [[ -f "$root/bin/doctor.py" && -z "${REHEARSE:-}" && "${DOCTOR:-on}" != off ]]; then
    if ! "$python" "$root/bin/doctor.py" ${first[@]+"${first[@]}"} "$@" >&2; then
        die "the findings marked above would stop the run; nothing was started." "DOCTOR=off starts all the same."
    fi
fi
plan="$("$python" "$root/bin/preflight.py" --processes "$processes" -- ${first[@]+"${first[@]}"} "$@")" || exit 2
of_plan() { "$python" -c 'import json, sys; print(json.loads(sys.argv[1]).get(sys.argv[2]))' "$plan" "$1"; }
run_dir="$(of_plan run_dir)"
if [[ -z "${REHEARSE:-}" && "$(of_plan device)" == cpu ]]; then
    say "warning: the settings say --device cpu (the quickstart preset does), so that no GPU is used; --device cuda takes them"
fi

# -------------------------------------------------------------------------------------------------------------- launch
if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
    cores="$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)"
    export OMP_NUM_THREADS=$((cores / processes > 0 ? cores / processes : 1))
fi
# Between SIGTERM and SIGKILL: a checkpoint of the last step must fit in.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}"

if ((nnodes > 1)); then
    is_host=$((NODE_RANK == 0))
    rendezvous=(--nnodes="$nnodes" --node_rank="$NODE_RANK" --rdzv_backend=c10d
        --rdzv_endpoint="$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv_id="${RDZV_ID:-$(basename "$run_dir")}"
        --rdzv_conf="is_host=$is_host")
else
    rendezvous=(--standalone) # a free port of its own, so that two jobs on a machine do not meet
fi
log="${LOG_DIR:-logs}/train_$(date +%Y%m%d_%H%M%S).log"
((nnodes == 1)) || log="${log%.log}_node$NODE_RANK.log"
say "run $run_dir, log $log"
# The run's name is settled here, so that every attempt means the same run.
exec "$python" "$root/launch/attempts.py" --run_dir "$run_dir" --retries "$retries" --wait_s "${RETRY_WAIT_S:-5}" \
    --log "$log" -- "$python" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node="$processes" \
    "$root/bin/train.py" ${first[@]+"${first[@]}"} "$@" --run_name "$(basename "$run_dir")"
