#!/bin/sh
# Checks what `make` needs from the machine. Prints the Python to make the virtual environment with, or says
# what is missing and exits with 1. Uses nothing but the shell's own commands, so that it cannot itself be
# stopped by something that is missing. PYTHON=... names the interpreter to take.

python_major=3 python_minor=10
rust_major=1 rust_minor=88

problems=0
problem() {
    printf 'polyprag needs %s\n' "$1" >&2
    problems=1
}

# at_least VERSION MAJOR MINOR: whether a version such as 1.95.0-nightly is new enough.
at_least() {
    major=${1%%.*}
    rest=${1#*.}
    minor=${rest%%[!0-9]*}
    case ${major:-x}${minor:-x} in *[!0-9]*) return 1 ;; esac
    [ "$major" -gt "$2" ] || { [ "$major" -eq "$2" ] && [ "$minor" -ge "$3" ]; }
}

# Python: the newest that is known to work first, then whatever is called python3.
# A name that is found may still not run: version managers leave a shim for each Python they know.
python='' found='' unfit=''
for name in ${PYTHON:-python3.13 python3.12 python3.11 python3.10 python3 python}; do
    path=$(command -v "$name") || continue
    version=$("$path" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue
    if ! at_least "$version" $python_major $python_minor; then
        found=${found:-"$version ($path)"}
    elif ! "$path" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        unfit=${unfit:-"$version ($path)"}
    else
        python=$path
        break
    fi
done
wanted="Python $python_major.$python_minor or newer"
if [ -n "$python" ]; then
    :
elif [ -n "$unfit" ]; then
    problem "a Python that can make virtual environments, and $unfit lacks the modules venv or ensurepip: install them (Debian, Ubuntu: apt install python3-venv), or name another Python (make PYTHON=/path/to/python3)."
elif [ -n "$found" ]; then
    problem "$wanted, and found only $found: install a newer one (https://www.python.org/downloads), or name one that is not on the PATH (make PYTHON=/path/to/python3)."
elif [ -n "$PYTHON" ]; then
    problem "$wanted, and PYTHON=$PYTHON does not run: name another, or leave PYTHON out."
else
    problem "$wanted, and found none: install it (https://www.python.org/downloads), or name one that is not on the PATH (make PYTHON=/path/to/python3)."
fi

# Rust: both commands, because a distribution may carry one without the other, or two of different age.
wanted="Rust $rust_major.$rust_minor or newer"
for name in rustc cargo; do
    if ! command -v "$name" >/dev/null; then
        problem "$wanted, and found no $name: install Rust from https://rustup.rs, and open a new shell so that it is on the PATH."
        break
    fi
    if ! answer=$("$name" --version 2>&1); then
        problem "$wanted, and $name is there but does not run: choose a toolchain (rustup default stable), or install Rust from https://rustup.rs."
        break
    fi
    version=${answer#"$name "}
    version=${version%% *}
    if ! at_least "$version" $rust_major $rust_minor; then
        problem "$wanted, and found $name $version: bring it up to date (rustup update stable), or install Rust from https://rustup.rs."
        break
    fi
done

# The compression library is C, and Rust links with the C compiler.
cc=${CC:-cc}
if ! command -v "${cc%% *}" >/dev/null; then
    problem "a C compiler, and found no $cc: install one (Debian, Ubuntu: apt install build-essential; macOS: xcode-select --install)."
fi

[ $problems -eq 0 ] || exit 1
printf '%s\n' "$python"
