#!/usr/bin/env bash
# install.sh SETTINGS: this checkout, in a virtual environment, on all workers.
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

(($# == 1)) || die "usage: install.sh SETTINGS"
read_settings "$1"
check_share
install_all || exit 1
say "installed on all workers"
