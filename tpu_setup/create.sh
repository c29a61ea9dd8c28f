#!/usr/bin/env bash
# create.sh SETTINGS: requests the slice and returns. The slice is created when capacity is available.
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

(($# == 1)) || die "usage: create.sh SETTINGS"
read_settings "$1"
create_slice || exit 1
say "requested; its state: $(slice_state)"
