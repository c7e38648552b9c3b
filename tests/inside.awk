# inside.awk -- two headers from dsv3.h, with which tests look inside and need not compile it each for themselves.
#
#     awk -v body=1 -f tests/inside.awk dsv3.h   the private functions and tables are extern: compiled once, by
#                                                tests/library.c
#     awk -f tests/inside.awk dsv3.h             they are declared only: included by the tests in the place of dsv3.h
#
# Everything else, types and macros, is as it was. DSV3I_SERIAL_WORK and DSV3I_SEGMENT become variables in the first; the
# second defines them with the values of the macros, which a test may set. It works on text alone: definitions begin in
# the first column, and what is longer than a line ends with a brace there. What the instruction sets have (DSV3I_INLINE,
# DSV3I_KERNEL) stays private.
/^#if defined\(DSV3_IMPLEMENTATION\)/ {
    inside = 1
    if (body) {
        print "#include <stddef.h>\nextern const size_t inside_serial_work, inside_segment;"
        print "#define DSV3I_SERIAL_WORK inside_serial_work\n#define DSV3I_SEGMENT inside_segment"
        print "#line " NR " \"dsv3.h\""
    }
}
!inside { print; next }
body {
    sub(/^static (inline )?/, "")
    sub(/^DSV3I_APART /, "__attribute__((noinline)) ")
    print
    next
}
skip != "" { if ($0 ~ skip) skip = ""; next }
macro || /^#/ { macro = /\\$/; print; next }
head == "" && !/^(static|DSV3_API|DSV3I_[A-Z0-9_]+)([ (]|$)/ { print; next }
{
    if (head == "" && /^DSV3I_/ && !/^DSV3I_(APART|INLINE|KERNEL|TARGET)/) { # a macro that makes functions
        if (!/[)]$/) skip = "[)]$"
        next
    }
    head = head (head == "" ? "" : "\n") $0
    if (!/[{};]$/ && head !~ / = /) next # goes on
    private = head ~ /^(DSV3_API|DSV3I_(INLINE|KERNEL|TARGET))/
    table = head ~ /^static const [^(]* = /
    if (table ? !/;$/ : /[{]$/) skip = table ? ";$" : "^[}]"
    sub(/^(static|DSV3I_APART) (inline )?/, "", head)
    sub(table ? " = .*" : " *[{].*", ";", head)
    if (!private) print (table ? "extern " : "") head
    head = ""
}
END {
    if (!body) {
        print "#if defined(DSV3_IMPLEMENTATION) && !defined(INSIDE_DEFINED)\n#define INSIDE_DEFINED"
        print "#ifndef DSV3I_SEGMENT\n#define DSV3I_SEGMENT 0\n#endif"
        print "extern const size_t inside_serial_work, inside_segment;"
        print "const size_t inside_serial_work = DSV3I_SERIAL_WORK, inside_segment = DSV3I_SEGMENT;\n#endif"
    }
}
