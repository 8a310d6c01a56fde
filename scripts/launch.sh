# Sourced by the launchers for machines elsewhere: reads their command lines, runs or prints their commands. Bash 3.2 will do.

fail() {
  echo "error: $*" >&2
  exit 2
}

# read_options REQUIRED OPTIONAL FLAGS "$@": the first three are names in one word each. --name value and --name=value set
# $option_name, a flag sets it to yes (dashes become underscores); what follows -- goes into the array job.
read_options() {
  local required=" $1 " optional=" $2 " flags=" $3 dry-run " name word
  shift 3
  job=()
  while (($#)); do
    case "$1" in
      --) job=("${@:2}"); break ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
      --*) ;;
      *) fail "argument is '$1', allowed is an option, or -- followed by the arguments of the run" ;;
    esac
    name="${1#--}"
    if [[ "$flags" == *" $name "* ]]; then
      printf -v "option_${name//-/_}" yes
      shift
    elif [[ "$required$optional" == *" $name "* ]]; then
      [[ -n "${2:-}" && "$2" != --* ]] || fail "--$name has no value"
      printf -v "option_${name//-/_}" %s "$2"
      shift 2
    else
      fail "option is --$name, allowed is one of$(for word in $required $optional $flags; do printf ' --%s' "$word"; done)"
    fi
  done
  for name in $required; do
    word="option_${name//-/_}"
    [[ -n "${!word:-}" ]] || fail "--$name is missing"
  done
}

# check_name VALUE OPTION: of what Google Cloud and Kubernetes take as one.
check_name() {
  [[ "$1" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "--$2 is '$1', allowed is up to 40 of a-z, 0-9 and -, a letter first"
}

# check_number VALUE OPTION
check_number() {
  [[ "$1" =~ ^[1-9][0-9]{0,5}$ ]] || fail "--$2 is '$1', allowed is an integer of at least 1"
}

# check_job PATTERN ALLOWED: the run needs a folder, which matches the pattern: a default would be one of each machine's own.
check_job() {
  local index output=
  for ((index = 0; index < ${#job[@]}; index++)); do
    case "${job[index]}" in
      --train.output=*) output="${job[index]#*=}" ;;
      --train.output) output="${job[index + 1]:-}" ;;
    esac
  done
  # shellcheck disable=SC2053  # a pattern
  [[ -n "$output" && "$output" == $1 ]] || fail "--train.output is '$output', allowed after -- is $2"
}

# quoted WORD...: one line that a shell reads as these words.
quoted() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

# run WORD...: the command, or its text when --dry-run is given.
run() {
  if [[ -n "${option_dry_run:-}" ]]; then
    quoted "$@"
  else
    "$@"
  fi
}

# wait_to_end PID: of a child; $code is its exit code. A signal that is trapped ends wait, not what it waits for.
# shellcheck disable=SC2034  # of who sources this
wait_to_end() {
  while true; do
    code=0
    wait "$1" || code=$?
    kill -0 "$1" 2>/dev/null || break
  done
}
