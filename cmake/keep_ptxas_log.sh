#!/bin/sh
# Compiler launcher for nvcc: runs it, and keeps what it says (ptxas's registers, spills and warnings) beside the object.
object=
previous=
for argument in "$@"; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
log=${object:-/dev/null}
[ -n "$object" ] && log=$object.ptxas.log
"$@" 2>"$log"
status=$?
[ "$log" = /dev/null ] || cat "$log" >&2
exit $status
