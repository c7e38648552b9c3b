#!/bin/sh
# man.sh TOOL... -- the manual page dsv3(1), made of what the tool says itself: --version, --help, and each command's.
set -eu
version=$("$@" --version)
# Text as it stands, in a fixed pitch, safe from roff.
text() { printf '.nf\n'; sed -e 's/\\/\\e/g' -e 's/-/\\-/g' -e "s/^[.']/\\\\\&&/" -e "s/'/\\\\(aq/g" -e 's/\^/\\(ha/g' -e 's/~/\\(ti/g' -e 's/`/\\(ga/g'; printf '.fi\n'; }
printf '.TH DSV3 1 "" "%s" "User Commands"\n' "$version"
printf '.SH NAME\ndsv3 \\- DeepSeek\\-V3 on published checkpoints: generate, measure, convert, train\n'
printf '.SH SYNOPSIS\n.B dsv3\n.I COMMAND\n[operands] [options]\n.br\n.B dsv3\n\\-\\-help | \\-\\-version\n.SH DESCRIPTION\n'
"$@" --help | sed 1d | text
for command in $("$@" --help | sed -n 's/^  \([a-z][a-z]*\) .*/\1/p'); do
    printf '.SH "DSV3 %s"\n' "$(printf '%s' "$command" | tr a-z A-Z)"
    "$@" "$command" --help | text
done
printf '.SH "EXIT STATUS"\n0 ok; 1 bad input, be it a file, a text or an option'"\\(aq"'s value; 2 wrong usage.\n'
