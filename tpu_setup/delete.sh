#!/usr/bin/env bash
# delete.sh SETTINGS [--yes NAME]: deletes the slice, after you type its name. The bucket is not changed.
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

(($# == 1 || $# == 3)) || die "usage: delete.sh SETTINGS [--yes NAME]"
read_settings "$1"
if (($# == 3)); then
  [[ $2 == --yes ]] || die "usage: delete.sh SETTINGS [--yes NAME]"
  answer=$3
else
  printf 'This deletes %s (%s, %s, project %s) and its disks.\nType its name to continue: ' \
    "$NAME" "$ACCELERATOR" "$ZONE" "$PROJECT"
  IFS= read -r answer || true
fi
[[ $answer == "$NAME" ]] || die "the name does not match; nothing was deleted"
delete_slice
say "deleted"
