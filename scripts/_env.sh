# Sourced by the scripts beside it. `make_env EXTRAS` makes .venv in the checkout with these extras of pyproject.toml,
# or does nothing where it is there already. Sets `root`, the checkout's folder.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

find_python() {
  local name path
  for name in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
    path=$(command -v "${name:-no-such-python}") || continue
    if "$path" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$path"
      return
    fi
  done
  local found
  found=$(python3 -c 'import platform; print("python3 is " + platform.python_version())' 2>/dev/null) || found="there is no python3"
  echo "$0: alignkit needs Python 3.11 or newer, and $found: install it (Debian: apt install python3.11 python3.11-venv) or set PYTHON to its path" >&2
  return 1
}

# uv does not read pip's configuration: hand over what pip's files and environment say. What is set for uv stays.
tell_uv() {
  local name value
  while IFS='=' read -r name value; do hand_over "$name" "$value"; done < <(
    "$root/.venv/bin/python" -m pip config list | "$root/.venv/bin/python" -c '
import ast, sys
names = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "find-links": "UV_FIND_LINKS",
         "trusted-host": "UV_INSECURE_HOST", "cert": "SSL_CERT_FILE"}
order, told = ["global", "install", ":env:"], {}  # the later wins
for key, _, value in (line.rstrip("\n").partition("=") for line in sys.stdin):
    section, _, name = key.rpartition(".")
    if section in order and name in names:
        told[order.index(section), name] = ast.literal_eval(value).split()
for (_, name), values in sorted(told.items(), reverse=True):  # the first one given to hand_over stays
    print(names[name], ("," if name == "find-links" else " ").join(values), sep="=")
'
  )
  hand_over UV_INDEX_STRATEGY unsafe-best-match # as pip: the best version of all indexes, not the first index that has one
  # The CPU build of torch is not on PyPI. Where nothing says where to take it from, uv knows its index.
  [ -n "${UV_FIND_LINKS:-}${UV_INDEX:-}${UV_DEFAULT_INDEX:-}" ] || hand_over UV_TORCH_BACKEND cpu
}

hand_over() {
  if [ -n "$2" ] && [ -z "${!1:-}" ]; then export "$1=$2"; fi
}

# The stamp of a complete environment: a hash of what it is made from, and its extras.
env_hash() {
  (cd "$root" && echo "$root" && cat pyproject.toml stubs/*/pyproject.toml) | "$1" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

env_is_complete() {
  local hash extras extra
  [ -x "$root/.venv/bin/alignkit" ] && "$root/.venv/bin/python" -c '' 2>/dev/null || return 1
  read -r hash extras 2>/dev/null <"$root/.venv/installed" || return 1
  [ "$hash" = "$(env_hash "$root/.venv/bin/python")" ] || return 1
  for extra in ${1//,/ }; do
    case ",$extras," in *",$extra,"*) ;; *) return 1 ;; esac
  done
}

install_env() {
  set -e
  "$2" -m venv "$root/.venv"
  rm -f "$root/.venv/installed"
  "$root/.venv/bin/python" -m pip install --upgrade uv
  tell_uv
  cd "$root"
  # Compiled once, here: a Python that may not write bytecode would compile torch and transformers at every start.
  .venv/bin/uv pip install --python .venv/bin/python --compile-bytecode -e ".[$1]"
  echo "$(env_hash .venv/bin/python) $1" >.venv/installed
}

make_env() {
  local python log="$root/.venv/install.log"
  if env_is_complete "$1"; then return; fi
  python=$(find_python)
  command -v c++ >/dev/null || command -v g++ >/dev/null ||
    echo "$0: no C++ compiler found; vLLM and DeepSpeed compile small kernels when they run (Debian: apt install g++)" >&2
  echo "Installing alignkit[$1] into .venv, once, some minutes (log: $log)"
  mkdir -p "$root/.venv"
  # A shell of its own: `set -e` is off inside a function called in a condition.
  if ! bash -c 'source "$0"; install_env "$1" "$2"' "${BASH_SOURCE[0]}" "$1" "$python" >"$log" 2>&1 </dev/null; then
    tail -n 20 "$log" >&2
    echo "$0: the installation failed; the lines above are the end of $log" >&2
    return 1
  fi
}
