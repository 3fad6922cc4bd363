#!/bin/sh
# Makes the virtual environment $1. Where Debian or Ubuntu keep parts of Python in packages of their
# own, installs them (as root or with sudo that asks no password) or says what to install.
set -eu
venv=$1
python=${PYTHON:-python3}

fail() { echo "deskside: error: $1" >&2; exit 2; }

command -v "$python" >/dev/null || fail "$python is missing; install Python 3.11 or later"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$python is $("$python" -V 2>&1); deskside needs Python 3.11 or later (set PYTHON=...)"

needed=""
"$python" -c 'import ensurepip, venv' 2>/dev/null || needed="$needed python3-venv"
"$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
  needed="$needed python3-dev"
command -v "${CXX:-g++}" >/dev/null || needed="$needed g++"

if [ -n "$needed" ]; then
  sudo=""
  [ "$(id -u)" = 0 ] || sudo="sudo -n"
  command -v apt-get >/dev/null || fail "please install:$needed"
  echo "installing$needed"
  { $sudo apt-get update -qq && $sudo apt-get install -y -qq $needed; } >/dev/null ||
    fail "please run: apt-get install$needed"
fi
"$python" -m venv "$venv"
