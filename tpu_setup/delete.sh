#!/usr/bin/env bash
# delete.sh SETTINGS [--yes NAME]: deletes the slice, whose name is asked for. The bucket is left as it is.
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

(($# == 1 || $# == 3)) || die "usage: delete.sh SETTINGS [--yes NAME]"
read_settings "$1"
if (($# == 3)); then
  [[ $2 == --yes ]] || die "usage: delete.sh SETTINGS [--yes NAME]"
  answer=$3
else
  printf 'This deletes %s (%s, %s, project %s) and its disks.\nIts name, to go on: ' \
    "$NAME" "$ACCELERATOR" "$ZONE" "$PROJECT"
  IFS= read -r answer || true
fi
[[ $answer == "$NAME" ]] || die "that is not its name; nothing was deleted"
delete_slice
say "deleted"
