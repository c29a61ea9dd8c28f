#!/usr/bin/env bash
# create.sh SETTINGS: asks for the slice and returns; it comes when there is room for it.
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

(($# == 1)) || die "usage: create.sh SETTINGS"
read_settings "$1"
check_share
create_slice || exit 1
say "asked for; its state: $(slice_state)"
