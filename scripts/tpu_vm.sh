#!/usr/bin/env bash
# One TPU VM or a pod, from nothing to a running job and back: scripts/tpu_vm.sh VERB [OPTIONS] [-- COMMAND]
#
#   create   ask for the TPU as a queued resource and wait until it is there
#   setup    copy this checkout (or --revision of it) to every worker, install itune[tpu,gcs], mount the bucket
#   run      start COMMAND on every worker, detached; with --watch stay, and begin again after a preemption
#   logs     what worker 0 has printed so far (--worker all: every worker)
#   status   state of the TPU, and whether the command runs, ended (with which code), or was never started; code 1 where
#            that could not be found out
#   fetch    copy --from (a folder on worker 0 or in the bucket) here
#   stop     end the command with SIGTERM: itune saves and leaves
#   delete   give the TPU back; what is only on its disks is lost
#
# Options (or the environment: TPU_NAME, TPU_ZONE, TPU_TYPE, TPU_PROJECT, TPU_BUCKET, TPU_SLICES):
#   --name N           name of the TPU
#   --zone Z           zone, such as us-west4-a
#   --type T           accelerator type, such as v5litepod-16, v5p-8, v6e-8
#   --project P        project (default: gcloud's own)
#   --version V        runtime version (default: by the type)
#   --slices N         slices of a multi-slice job (default 1); the same for every verb
#   --spot             cheaper, may be taken back at any time
#   --bucket gs://B    mounted on every worker as ~/bucket: put --workdir there, a pod needs one folder for all
#   --revision R       install this git revision instead of the files as they are
#   --worker W         worker for logs (default 0), or all
#   --from F --to D    for fetch (default: to the current folder)
#   --watch            for run: stay; after a preemption create, set up and run again, after a failure give up
#   --poll S           seconds between two looks (default 30)
#   --tries N          attempts, one after the other, to have a preempted TPU again (default 20)
#   --dry-run          print every command, run none
#
# A whole job:
#   export TPU_NAME=tune TPU_ZONE=us-west4-a TPU_TYPE=v5litepod-16 TPU_BUCKET=gs://my-bucket
#   scripts/tpu_vm.sh create --spot && scripts/tpu_vm.sh setup
#   scripts/tpu_vm.sh run --spot --watch -- itune train --config sft --config.model.path=... --workdir bucket/runs/x
#   scripts/tpu_vm.sh delete
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"; }
die() { echo "tpu_vm: $*" >&2; exit 2; }

name=${TPU_NAME:-} zone=${TPU_ZONE:-} type=${TPU_TYPE:-} project=${TPU_PROJECT:-} bucket=${TPU_BUCKET:-}
version='' slices=${TPU_SLICES:-1} spot='' revision='' worker=0 from='' to=. watch='' poll=30 tries=20 dry='' command=()
[ $# -gt 0 ] || { usage; exit 2; }
verb=$1; shift
case $verb in
  create|setup|run|logs|status|fetch|stop|delete) ;;
  -h|--help|help) usage; exit 0 ;;
  *) die "unknown verb '$verb'; expected create, setup, run, logs, status, fetch, stop or delete" ;;
esac
while [ $# -gt 0 ]; do
  case $1 in
    --spot) spot=yes; shift ;;
    --watch) watch=yes; shift ;;
    --dry-run) dry=yes; shift ;;
    -h|--help) usage; exit 0 ;;
    --) shift; command=("$@"); break ;;
    --name|--zone|--type|--project|--version|--slices|--bucket|--revision|--worker|--from|--to|--poll|--tries)
      [ $# -ge 2 ] || die "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"; shift 2 ;;
    *) die "unknown option '$1'; scripts/tpu_vm.sh --help lists them (the command to run stands after --)" ;;
  esac
done
[ -n "$name" ] || die "--name (or TPU_NAME) is missing"
[ -n "$zone" ] || die "--zone (or TPU_ZONE) is missing, such as us-west4-a"
[[ $name =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] || die "--name '$name': expected lower-case letters, digits and dashes"
[[ $slices =~ ^[1-9][0-9]{0,3}$ ]] || die "--slices (or TPU_SLICES) '$slices': expected a number from 1 to 9999"
[[ $poll =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "--poll '$poll': expected a number of seconds, such as 30"
[[ $tries =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "--tries '$tries': expected a whole number, such as 20"
[[ $worker =~ ^(all|[0-9]+([-,][0-9]+)*)$ ]] || die "--worker '$worker': expected a number, such as 0, or all"

checkout=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
if [ "$verb" = setup ] || [ "$verb$watch" = runyes ]; then  # a preemption will need it
  [[ -z $bucket || $bucket =~ ^gs://[a-z0-9][a-z0-9._-]+/?$ ]] ||
    die "--bucket (or TPU_BUCKET) '$bucket': expected gs://NAME, without a folder"
  [ -f "$checkout/pyproject.toml" ] || die "$checkout is no checkout of itune: it has no pyproject.toml"
fi
bucket=${bucket%/}
where=(--zone "$zone" ${project:+--project "$project"})
if [ "$slices" = 1 ]; then nodes=("$name"); else nodes=(); for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done; fi
printf -v same ' %q' "${where[@]}"
same="--name $name$same"; [ "$slices" = 1 ] || same+=" --slices $slices"

# do CMD...: run it, or print it when dry, so that it can be pasted and a script in it be read
do_() {
  [ -n "$dry" ] || { "$@"; return; }
  local word
  printf +
  for word in "$@"; do
    if [[ $word == *$'\n'* ]]; then printf " '%s'" "${word//\'/\'\\\'\'}"; else printf ' %q' "$word"; fi
  done
  echo
}
# on_interrupt WORDS: what Ctrl-C leaves behind from here on
on_interrupt() { left_behind=$1; trap 'echo "tpu_vm: interrupted: $left_behind" >&2; exit 130' INT; }
tpu() { do_ gcloud compute tpus "$@" "${where[@]}"; }

# on_workers WORKER SCRIPT: the script on that worker (or all) of every slice; the first that fails decides
on_workers() {
  local node
  for node in "${nodes[@]}"; do
    tpu tpu-vm ssh "$node" --worker="$1" --command="$2" || { echo "tpu_vm: $node, worker $1: the command failed" >&2; return 1; }
  done
}

runtime() {
  case $type in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v4-*) echo tpu-ubuntu2204-base ;;
    *) die "--type '$type': its runtime version is not known; give --version" ;;
  esac
}

look() { tpu queued-resources describe "$name" --format='value(state.state)'; }

# what the look finds: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, FAILED ...; ABSENT where there is no such resource, and
# UNKNOWN where the cloud gave no answer (no network, a login that ran out), which says nothing of the TPU
state() {
  local errors said
  errors=$(mktemp)
  if said=$(look 2>"$errors"); then echo "${said:-UNKNOWN}"
  elif grep -q "NOT_FOUND.*queuedResources/$name" "$errors"; then echo ABSENT
  else
    echo "tpu_vm: no answer about $name: $(grep -m 1 ERROR "$errors" || head -n 1 "$errors")" >&2
    echo UNKNOWN
  fi
  rm -f "$errors"
}

# what a request for a TPU needs: said before anything is done
check_type() {
  [ -n "$type" ] || die "--type (or TPU_TYPE) is missing, such as v5litepod-16"
  version=${version:-$(runtime)} || exit 2
}

create() {
  check_type
  local ids=(--node-id "$name") now
  [ "$slices" = 1 ] || ids=(--node-count "$slices" --node-prefix "$name")
  on_interrupt "$name stays requested and may begin to cost money; end it with: scripts/tpu_vm.sh delete $same"
  tpu queued-resources create "$name" "${ids[@]}" --accelerator-type "$type" --runtime-version "$version" \
    ${spot:+--spot} || return 1
  [ -z "$dry" ] || { echo "# every $poll s, until it says ACTIVE:"; look; return; }
  while now=$(state); [ "$now" != ACTIVE ]; do
    case $now in
      FAILED|SUSPENDED|ABSENT) echo "tpu_vm: $name is $now: no TPU came; see why with: scripts/tpu_vm.sh status $same" >&2; return 1 ;;
    esac
    echo "tpu_vm: $name is $now"
    sleep "$poll"
  done
  echo "tpu_vm: $name is there; it costs money until: scripts/tpu_vm.sh delete $same"
}

setup() {
  local archive node
  archive=TEMPORARY-FOLDER
  [ -n "$dry" ] || archive=$(mktemp -d)
  # shellcheck disable=SC2064  # the folder's name is meant as it is now
  trap "rm -rf '$archive'" RETURN
  if [ -n "$revision" ]; then
    do_ git -C "$checkout" archive --format=tar.gz -o "$archive/itune.tar.gz" "$revision" || return 1
  else
    do_ tar -czf "$archive/itune.tar.gz" -C "$checkout" --exclude=./.git --exclude='./.venv*' --exclude=./runs \
      --exclude=./models . || return 1
  fi
  for node in "${nodes[@]}"; do
    tpu tpu-vm scp "$archive/itune.tar.gz" "$node:itune.tar.gz" --worker=all || return 1
  done
  on_workers all "set -e
    mkdir -p ~/itune && tar -xzf ~/itune.tar.gz -C ~/itune
    # images of Ubuntu 22.04 come with Python 3.10
    if ! ~/venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      rm -rf ~/venv
      for python in python3 python3.13 python3.12 python3.11 none; do
        \$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
      done
      [ \$python != none ] && \$python -m venv ~/venv || {
        python3 -m pip install -q --user uv
        python3 -m uv venv -q --clear --seed --python 3.12 ~/venv; }
    fi
    ~/venv/bin/python -m pip install -q --upgrade \"\$HOME/itune[tpu,gcs]\"" && mount_
}

# the bucket as ~/bucket on every worker; a worker that was restarted has lost it
mount_() {
  [ -n "$bucket" ] || return 0
  on_workers all "set -e
    mkdir -p ~/bucket
    mountpoint -q ~/bucket || {
      command -v gcsfuse >/dev/null || { . /etc/os-release
        echo \"deb https://packages.cloud.google.com/apt gcsfuse-\$VERSION_CODENAME main\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
        curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /etc/apt/trusted.gpg.d/gcsfuse.asc >/dev/null
        sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse; }
      gcsfuse --implicit-dirs --rename-dir-limit=1000000 ${bucket#gs://} ~/bucket; }"
}

address() { tpu tpu-vm describe "${nodes[0]}" --format='value(networkEndpoints[0].ipAddress)'; }

start() {
  [ ${#command[@]} -gt 0 ] || die "run: give the command after --, such as -- itune train --config sft --workdir bucket/runs/x"
  local job slice extra coordinator=''
  if [ "$slices" != 1 ]; then  # of the TPU that is there now: one that comes after a preemption has another address
    if [ -n "$dry" ]; then address; coordinator=ADDRESS-OF-${nodes[0]}; else coordinator=$(address) || return 1; fi
  fi
  on_interrupt "what runs on $name goes on; see it with: scripts/tpu_vm.sh logs $same; stop it with: scripts/tpu_vm.sh stop $same"
  # the shell around the command outlives SIGTERM, so that the exit code is there to read
  job=$(printf '%q' "trap : TERM; ($(printf ' %q' "${command[@]}") ); echo \$? > job.rc")
  for ((slice = 0; slice < ${#nodes[@]}; slice++)); do
    extra=''  # slices find each other by the first one's address, the workers of one by the TPU's own metadata
    [ "$slices" = 1 ] || extra="MEGASCALE_NUM_SLICES=$slices MEGASCALE_SLICE_ID=$slice MEGASCALE_COORDINATOR_ADDRESS=$coordinator "
    tpu tpu-vm ssh "${nodes[$slice]}" --worker=all --command="set -e
      if [ -f job.pid ] && kill -0 \$(cat job.pid) 2>/dev/null; then echo 'a command runs here already: stop it first' >&2; exit 1; fi
      rm -f job.rc job.stop
      env ${extra}PATH=\$HOME/venv/bin:\$PATH setsid nohup bash -c $job > job.log 2>&1 < /dev/null &
      echo \$! > job.pid" || return 1
  done
}

# runs, never, lost (it ended and left no code), stopped (by stop), an exit code, or nothing when worker 0 does not answer
job() {
  tpu tpu-vm ssh "${nodes[0]}" --worker=0 --command="
    if [ -f job.rc ]; then if [ -f job.stop ]; then echo stopped; else cat job.rc; fi
    elif [ ! -f job.pid ]; then echo never; elif kill -0 \$(cat job.pid) 2>/dev/null; then echo runs; else echo lost; fi" 2>/dev/null || true
}

# what still runs on any worker ends, and says so to nobody, before all begin again
again() {
  on_workers all "[ -f job.pid ] || exit 0
    for signal in TERM KILL; do
      kill -\$signal -- -\$(cat job.pid) 2>/dev/null || break
      for second in \$(seq 60); do kill -0 -- -\$(cat job.pid) 2>/dev/null || break; sleep 1; done
    done" && mount_ && start
}
prepare() { setup && start; }
renew() { remove || true; create && prepare; }

run() {
  local left=$tries now ended how
  [ -z "$watch" ] || check_type  # a preemption will need it
  start
  if [ -z "$watch" ]; then
    [ -n "$dry" ] || echo "tpu_vm: started; see it with: scripts/tpu_vm.sh logs $same"
    return
  fi
  [ -z "$dry" ] || { echo "# every $poll s:"; look; job; echo "# after a preemption:"; renew; return; }
  while :; do
    now=$(state)
    ended=$(job)
    case $now in SUSPENDING|SUSPENDED|FAILED|DELETING|ABSENT) ended=preempted ;; esac
    case $ended in
      0) echo "tpu_vm: the command is done"; return 0 ;;
      stopped) echo "tpu_vm: the command was stopped"; return 143 ;;
      runs) left=$tries ;;
      '') ;;  # no answer: the state will say whether the TPU is gone
      143|lost|never|preempted)
        [ $((left--)) -gt 0 ] || { echo "tpu_vm: $tries attempts, and it does not run; giving up" >&2; return 1; }
        echo "tpu_vm: the command does not run (TPU: $now, command: $ended); attempt $((tries - left))"
        case $ended in preempted) how=renew ;; never) how=prepare ;; *) how=again ;; esac
        $how || echo "tpu_vm: that did not work; the next attempt in $poll s" >&2 ;;
      *) echo "tpu_vm: the command ended with code $ended; its last lines:" >&2; logs >&2; return 1 ;;
    esac
    sleep "$poll"
  done
}

logs() { on_workers "$worker" 'tail -n 200 job.log'; }

status() {
  [ -z "$dry" ] || { look; job; return; }
  local now ended
  now=$(state)
  echo "TPU: $now"
  ended=$(job)
  echo "command: ${ended:-worker 0 does not answer}"
  case $now in UNKNOWN) return 1 ;; ACTIVE) [ -n "$ended" ] ;; esac  # a TPU that is not there has no worker
}

fetch() {
  [ -n "$from" ] || die "fetch: --from is missing: a folder on worker 0, or gs://..."
  case $from in
    gs://?*) do_ gcloud storage cp -r "$from" "$to" ;;
    *://*) die "fetch: --from '$from': expected a folder on worker 0, or gs://..." ;;
    *) tpu tpu-vm scp --recurse "${nodes[0]}:$from" "$to" --worker=0 ;;
  esac
}

# the whole process group, so that itune gets the signal and not only the shell around it
stop() {
  on_workers all "if [ -f job.pid ] && touch job.stop && kill -TERM -- -\$(cat job.pid) 2>/dev/null
    then echo 'asked to save and leave'; else echo 'nothing runs'; fi"
}

remove() { tpu queued-resources delete "$name" --force --quiet; }

case $verb in
  delete) remove ;;
  *) "$verb" ;;
esac
