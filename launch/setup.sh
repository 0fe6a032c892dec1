#!/usr/bin/env bash
# Make the Python environment that Earmark runs in, or reuse the one that is there.
#
#   bash launch/setup.sh [EXTRA ...]      extras of pyproject.toml: test, flash, modal
#
# Prints the path of the environment's python on standard output, everything else on standard error. A second call with
# nothing changed takes well under a second. Earmark itself is never installed: its packages have short names (data,
# model, ...) that belong to this checkout alone, and its programs find them by themselves.
#
#   PYTHON                 interpreter to make the environment with (default: the first of python3, python3.12,
#                          python3.11, python3.13 that is Python 3.11 to 3.13)
#   EARMARK_VENV           where the environment lies (default: .venv in the checkout). "none": use the python that is
#                          active now (PYTHON, else python, else python3), keep its torch, and add only what is missing:
#                          where nothing is, neither pip nor a network is needed. "as-is": add nothing, name what is missing
#   EARMARK_TORCH_INDEX    package index to take torch from, for example https://download.pytorch.org/whl/cpu : without
#                          a GPU that is a 0.2 GB download, while the default index has several GB of CUDA for Linux

set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="${EARMARK_VENV:-$root/.venv}"
if [[ "$venv" != none && "$venv" != as-is && "$venv" != /* ]]; then venv="$PWD/$venv"; fi # callers may change directory
constraints="$root/launch/constraints.txt"
needed_mb=3000 # the CPU environment takes 1.6 GB, and pip unpacks beside it

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
    printf '\nsetup: %s\n' "$1" >&2
    shift
    printf '       %s\n' "$@" >&2
    exit 1
}

# A name on PATH is not enough: version managers put stand-ins there that fail when run.
is_supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        is_supported "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.11 to 3.13 that runs." \
            "It says: $("$PYTHON" --version 2>&1 | head -n 1)" "Set PYTHON to another one, or unset it."
        echo "$PYTHON"
        return
    fi
    for candidate in "$@"; do
        if is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "Earmark needs Python 3.11, 3.12 or 3.13, and found none (tried: $*)." \
        "Here, python3 is: $(python3 --version 2>&1 | head -n 1)" \
        "Install one (Debian, Ubuntu: apt-get install python3 python3-venv), or set PYTHON=/path/to/python3.12."
}

make_venv() {
    local base free_mb
    base="$(find_python python3 python3.12 python3.11 python3.13)"
    mkdir -p "$(dirname "$venv")"
    free_mb="$(df -Pm "$(dirname "$venv")" | awk 'NR == 2 { print $4 }')"
    if ((free_mb < needed_mb)); then
        die "$(dirname "$venv") has $free_mb MB free; the environment needs about $needed_mb MB." \
            "Free some space, or set EARMARK_VENV to a folder on another disk."
    fi
    say "making $venv with $("$base" --version 2>&1)"
    if ! "$base" -m venv "$venv" >&2; then
        rm -rf "$venv" # half an environment would look like a whole one to the next call
        die "$base could not make a virtual environment." \
            "Debian, Ubuntu: apt-get install python3-venv (or python3.12-venv, as its version is)." \
            "Or make one in another way, and pass EARMARK_VENV=/path/to/it."
    fi
}

# Requirements of pyproject.toml and of the extras named, one a line.
requirements() {
    "$python" - "$root/pyproject.toml" "$@" <<'PY'
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
for name in sys.argv[2:]:
    if name not in extras:
        sys.exit(f"setup: extra {name!r} is not in pyproject.toml; allowed: {', '.join(sorted(extras))}")
print(*project["dependencies"], *(line for name in sys.argv[2:] for line in extras[name]), sep="\n")
PY
}

installed_torch() { "$python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true; }

pip_install() {
    local quiet=(-q)
    if [[ -t 2 ]]; then quiet=(); fi
    "$python" -m pip install --disable-pip-version-check ${quiet[@]+"${quiet[@]}"} "$@" >&2 && return
    die "pip could not install the packages (its message is above)." \
        "Free space: $(df -Pm "$("$python" -c 'import sys; print(sys.prefix)')" | awk 'NR == 2 { print $4 }') MB." \
        "No network or a mirror: configure pip's index-url. torch from elsewhere: set EARMARK_TORCH_INDEX." \
        "Then run the same command again: it goes on from here."
}

# Those of the requirements on standard input that the environment does not meet.
unmet() {
    "$python" -c '
import importlib.metadata, sys
try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
for line in filter(None, map(str.strip, sys.stdin)):
    wanted = Requirement(line)
    try:
        found = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None or not wanted.specifier.contains(found, prereleases=True):
        print(line)
'
}

if [[ "$venv" == none || "$venv" == as-is ]]; then
    # The user's own environment: no constraints file, and the torch that is there stays.
    python="$(find_python python python3)"
    python="$("$python" -c 'import sys; print(sys.executable)')"
    torch="$(installed_torch)"
    missing="$(requirements "$@" | unmet)"
    if [[ -z "$missing" ]]; then
        say "using $python with its torch $torch; nothing is missing"
    elif [[ "$venv" == as-is ]]; then
        say "using $python as it is; not as asked for: $(xargs <<<"$missing")"
    elif [[ -n "$torch" ]]; then
        say "using $python with its torch $torch"
        pip_install -c <(printf 'torch==%s\n' "$torch") -r <(printf '%s\n' "$missing")
    else
        say "using $python, which has no torch yet"
        pip_install -c "$constraints" -r <(printf '%s\n' "$missing")
    fi
    echo "$python"
    exit 0
fi

python="$venv/bin/python"
if [[ ! -e "$venv" ]]; then
    make_venv
fi
stamp="$venv/earmark-installed"
state="$(cat "$root/pyproject.toml" "$constraints" | cksum) ${EARMARK_TORCH_INDEX:-}"

# The stamp's first line is what the environment was made from; its second names the extras in it.
have_extras=" "
if [[ -f "$stamp" && "$(head -n 1 "$stamp")" == "$state" ]]; then
    have_extras=" $(tail -n 1 "$stamp") "
    up_to_date=1
    for extra in "$@"; do
        if [[ "$have_extras" != *" $extra "* ]]; then up_to_date=0; fi
    done
    if ((up_to_date)) && is_supported "$python"; then
        echo "$python"
        exit 0
    fi
fi

if ! is_supported "$python" || ! "$python" -m pip --version >/dev/null 2>&1; then
    die "$venv is there, but not as an environment of Python 3.11 to 3.13 with pip." \
        "Remove it (rm -r '$venv') and run this again, or set EARMARK_VENV to another folder."
fi

wanted="$(requirements "$@")"
say "installing into $venv (a few minutes the first time)"
if [[ -n "${EARMARK_TORCH_INDEX:-}" ]]; then
    pip_install --index-url "$EARMARK_TORCH_INDEX" "$(grep '^torch==' "$constraints")"
fi
pip_install -c "$constraints" -r <(printf '%s\n' "$wanted")
"$python" -c 'import torch' || die "torch was installed but cannot be imported (its message is above)." \
    "Remove the environment (rm -r '$venv') and run this again; EARMARK_TORCH_INDEX chooses another build."

extras="$(printf '%s\n' $have_extras "$@" | sort -u | xargs)"
printf '%s\n%s\n' "$state" "$extras" >"$stamp.new"
mv "$stamp.new" "$stamp"
say "ready: $("$python" --version 2>&1), torch $(installed_torch)${extras:+, with $extras}"
echo "$python"
