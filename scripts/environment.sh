# Sourced by demo.sh, test.sh and .ci/run: goes to the checkout's root, makes .venv where it is missing or out of date,
# and leaves the path of its interpreter in $python. Arguments are extras of pyproject.toml.

prepare_environment() {
  local candidate
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  python="$PWD/.venv/bin/python"
  for candidate in "$python" python3 python3.13 python3.12 python3.11; do
    # Run it: version managers leave names on the path that only print an error.
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      "$candidate" scripts/environment.py "$@"
      return
    fi
  done
  echo "nested_jax needs Python 3.11 or newer: no python3, python3.13, python3.12 or python3.11 found that is" >&2
  return 1
}
