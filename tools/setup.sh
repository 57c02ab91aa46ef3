#!/usr/bin/env bash
# Makes a virtual environment with icegrt in it, editable, with everything the engine and the tests need.
#
#   tools/setup.sh [folder]        folder: .venv
#
# PYTHON        interpreter the environment is made from (python3)
# ICEGRT_TORCH  requirement for torch, as pip takes it ("torch==2.13.0"). Without it:
#               a torch that is already there is kept (on a GPU machine the system's, built for its driver);
#               a GPU machine without one gets pip's default build, any other machine the CPU build where pip can find it.
#
# Which package index pip asks is pip's own configuration (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS).
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv}
python=${PYTHON:-python3}
torch_minimum=2.11
torch_cpu=2.13.0
say() { printf 'setup: %s\n' "$*"; }

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }
has_torch() {
  "$1" - "$torch_minimum" 2>/dev/null <<'PY'
import sys
from importlib.metadata import version

wanted, found = ([int(n) for n in v.split("+")[0].split(".")[:2]] for v in (sys.argv[1], version("torch")))
sys.exit(found < wanted)
PY
}

gpu=no
has_gpu && gpu=yes

if [ ! -x "$venv/bin/python" ]; then
  options=()
  if [ "$gpu" = yes ] && has_torch "$python"; then
    options=(--system-site-packages)
    # Its pip and setuptools too: Python before 3.12 would lay an old setuptools over them.
    "$python" -m pip --version >/dev/null 2>&1 && options+=(--without-pip)
    say "a GPU and a torch built for it are here: the environment builds on the packages of $(command -v "$python")"
  fi
  say "creating $venv with $("$python" --version 2>&1)"
  "$python" -m venv "${options[@]}" "$venv" || {
    say "python's venv module does not work here; on Debian or Ubuntu: apt-get install python3-venv" >&2
    exit 1
  }
  if [ ${#options[@]} -gt 0 ]; then
    # An environment made from another environment sees the system's packages and not that one's: name them.
    "$python" - > "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth" <<'PY'
import sysconfig

for path in dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib"))):
    print(f"import site; site.addsitedir({path!r})")
PY
  fi
fi
py=$venv/bin/python
# A GPU machine that is cut off from every index should find out in seconds.
[ "$gpu" = yes ] && export PIP_RETRIES="${PIP_RETRIES:-1}" PIP_DEFAULT_TIMEOUT="${PIP_DEFAULT_TIMEOUT:-10}"
pip() { "$py" -m pip --disable-pip-version-check install -qq "$@"; }

if [ -n "${ICEGRT_TORCH:-}" ]; then
  say "installing $ICEGRT_TORCH"
  pip "$ICEGRT_TORCH"
elif has_torch "$py"; then
  say "keeping torch $("$py" -c 'from importlib.metadata import version; print(version("torch"))')"
elif [ "$gpu" = yes ]; then
  say "installing torch for the GPU"
  pip "torch>=$torch_minimum"
elif pip "torch==$torch_cpu+cpu" 2>/dev/null; then
  say "installed torch $torch_cpu, CPU build"
else
  say "no index offers a CPU-only build: installing torch $torch_cpu as it comes (large; ICEGRT_TORCH chooses another)"
  pip "torch==$torch_cpu"
fi

# The build runs in this environment, so its requirements are read from their one place, the line in pyproject.toml.
read -r -a build_requirements < <("$py" - <<'PY'
import ast

line = next(line for line in open("pyproject.toml") if line.startswith("requires ="))
print(*ast.literal_eval(line.split("=", 1)[1].strip()))
PY
)
say "building and installing icegrt[engine,dev,docs]"
if ! { pip "${build_requirements[@]}" && pip --no-build-isolation -e '.[engine,dev,docs]'; }; then
  if [ "$gpu" = yes ]; then  # GPU machines are often cut off from every index
    say "pip could not fetch everything; installing icegrt onto the packages that are here" >&2
    pip --no-build-isolation --no-deps -e .
    "$py" -m pip check || true
  else
    exit 1
  fi
fi
"$py" -c 'import icegrt._C, torch; print(f"setup: ready, torch {torch.__version__}")'
