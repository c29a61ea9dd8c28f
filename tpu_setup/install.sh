#!/usr/bin/env bash
# install.sh SETTINGS: installs this checkout on all workers, in a virtual environment.
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

(($# == 1)) || die "usage: install.sh SETTINGS"
read_settings "$1"
install_all || exit 1
say "installed on all workers"
