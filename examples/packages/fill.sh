#!/bin/sh
# fill.sh TEMPLATE -- writes it with each @NAME@ replaced by the variable NAME of the environment. One that is not set
# is an error.
awk '{
    text = ""
    while (match($0, /@[A-Z][A-Z0-9_]*@/)) {
        name = substr($0, RSTART + 1, RLENGTH - 2)
        if (!(name in ENVIRON)) { print FILENAME ": " name " is not set" > "/dev/stderr"; exit 1 }
        text = text substr($0, 1, RSTART - 1) ENVIRON[name]
        $0 = substr($0, RSTART + RLENGTH)
    }
    print text $0
}' "$1"
