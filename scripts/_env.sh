# Sourced by the other scripts: goes to the repository's root and defines ensure_env, which makes .venv or brings it
# up to date. Needs Python 3.11, 3.12 or 3.13 with its venv module; everything else is installed into .venv.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
PY="$ROOT/.venv/bin/python"
TORCH="torch==2.13.0"
CPU_INDEX="https://download.pytorch.org/whl/cpu"
LOG="$ROOT/.venv/install.log"

usable_python() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" >/dev/null 2>&1 && usable_python "$candidate"; then
            command -v "$candidate"
            return 0
        fi
    done
    echo "error: found no Python 3.11, 3.12 or 3.13 with the venv module (tried \$PYTHON, python3, python3.13," \
        "python3.12, python3.11, python). Install one (Debian and Ubuntu: apt-get install python3.11 python3.11-venv)" \
        "or point PYTHON to it." >&2
    return 1
}

# with_dots MESSAGE COMMAND...: a dot every two seconds while the command runs; its output goes to the log.
with_dots() {
    local message="$1" child status=0
    shift
    printf '%s ' "$message" >&2
    "$@" >>"$LOG" 2>&1 &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        printf '.' >&2
        sleep 2
    done
    wait "$child" || status=$?
    [ "$status" -eq 0 ] && echo " done" >&2 || echo " failed" >&2
    return "$status"
}

pip_install() {
    "$PY" -m pip install --disable-pip-version-check "$@"
}

has_nvidia_gpu() {
    command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU
}

# On Linux the package index's own torch brings gigabytes of CUDA libraries, so a machine without GPU takes the CPU
# build. Where that index cannot be reached, pip's configured sources have to do. The requirements of torch come
# with the package's own.
install_torch() {
    if "$PY" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '${TORCH#*==}')" \
        >/dev/null 2>&1; then
        return 0
    fi
    if [ "$(uname -s)" = Linux ] && ! has_nvidia_gpu; then
        with_dots "installing $TORCH (CPU build)" \
            pip_install --no-deps --index-url "$CPU_INDEX" --timeout 10 --retries 1 "$TORCH" && return 0
        echo "$CPU_INDEX gave no $TORCH; trying pip's own sources" >&2
    fi
    with_dots "installing $TORCH" pip_install --no-deps "$TORCH"
}

# What the environment was made from; any change leads to a new installation.
fingerprint() {
    "$PY" - "$ROOT" <<'PYTHON'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
parts = [sys.version.encode(), str(root).encode()]
parts += [(root / name).read_bytes() for name in ("pyproject.toml", "scripts/_env.sh")]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PYTHON
}

ensure_env() {
    local stamp="$ROOT/.venv/installed.sha256" python wanted
    mkdir -p "$ROOT/.cache"
    if command -v flock >/dev/null 2>&1; then # two scripts may start at once
        exec 9>"$ROOT/.cache/env.lock"
        flock 9
    fi
    if ! "$PY" -c "import pip" >/dev/null 2>&1; then
        python="$(find_python)" || return 1
        rm -rf "$ROOT/.venv"
        mkdir -p "$ROOT/.venv"
        with_dots "making .venv with $python" "$python" -m venv "$ROOT/.venv" || { tail -n 20 "$LOG" >&2; return 1; }
    fi
    wanted="$(fingerprint)"
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        if ! install_torch || ! with_dots "installing hf-compress and its requirements" pip_install -e ".[int8,compressed-tensors,onnx,bleu,search,stand-ins,dev]"; then
            tail -n 20 "$LOG" >&2
            echo "error: the installation failed; all of pip's output is in $LOG" >&2
            return 1
        fi
        echo "$wanted" >"$stamp"
    fi
    if command -v flock >/dev/null 2>&1; then
        exec 9>&-
    fi
}
