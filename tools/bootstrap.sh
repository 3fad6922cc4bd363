#!/bin/sh
# bootstrap.sh VENV makes the virtual environment VENV. Where Debian or Ubuntu keep parts of Python in
# packages of their own, installs them (as root or with sudo that asks no password) or says what to
# install.
# bootstrap.sh --simde does so for SIMDe, with which the tests run the AVX-512 kernels on any x86-64
# CPU, and prints ON, or OFF where it cannot be had. In CI (CI=true) that is an error.
set -eu
python=${PYTHON:-python3}

fail() { echo "deskside: error: $1" >&2; exit 2; }

install() {
  sudo=""
  [ "$(id -u)" = 0 ] || sudo="sudo -n"
  echo "installing$1" >&2
  { $sudo apt-get update -qq && $sudo apt-get install -y -qq $1; } >/dev/null
}

has_simde() {
  printf '#if !__has_include(<simde/x86/avx512.h>)\n#error\n#endif\n' |
    "${CXX:-g++}" -E -x c++ - >/dev/null 2>&1
}

if [ "$1" = --simde ]; then
  case $(uname -m) in x86_64 | amd64) ;; *) echo OFF; exit ;; esac
  if has_simde || { command -v apt-get >/dev/null && install " libsimde-dev" && has_simde; }; then
    echo ON
    exit
  fi
  [ "${CI:-}" != true ] || fail "the tests need SIMDe (libsimde-dev) in CI"
  echo "deskside: without SIMDe (libsimde-dev) no emulated AVX-512 is built or tested" >&2
  echo OFF
  exit
fi

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
  command -v apt-get >/dev/null || fail "please install:$needed"
  install "$needed" || fail "please run: apt-get install$needed"
fi
"$python" -m venv "$1"
