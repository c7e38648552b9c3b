#!/bin/sh
# test_shape.sh [dsv3.h] -- the shape of the header: in the book (chapters with numbers) no function has more than 10 parameters
# or more than 60 lines, chapters 2 to 17 do without the engine's words, and chapters and the file keep to their lengths.
# A failure names each line, function or chapter at fault. With a name of a file, another header is looked at.
. tests/lib.sh
header=${1:-dsv3.h}
out=build/shape
mkdir -p $out

# A chapter begins at the rule above its banner, " * Chapter 4  >>ops". What comes first is chapter 0.
chapters() {
    awk '/^ \* Chapter [0-9A-Z]+ +>>/ { if (name != "") print number, name, NR - 1 - from; number = $3; name = substr($4, 3); from = NR - 1 }
         END { print number, name, NR + 1 - from }' "$1"
}

# Code without comments and strings, as many lines as before: what is counted below must not see either.
code() {
    awk '{ line = ""
           while ($0 != "") {
               if (inside) {
                   at = index($0, "*/")
                   if (!at) break
                   $0 = substr($0, at + 2); inside = 0
               } else if (match($0, /\/\*|"([^"\\]|\\.)*"|\047([^\047\\]|\\.)*\047/)) {
                   line = line substr($0, 1, RSTART - 1)
                   if (substr($0, RSTART, 2) == "/*") inside = 1; else line = line "0"
                   $0 = substr($0, RSTART + RLENGTH)
               } else { line = line $0; $0 = "" }
           }
           sub(/[ \t]+$/, "", line); print line }' "$1"
}

# "line name parameters lines" of each function of code up to line $2. A head begins in column 1 and goes on to the brace that
# ends a line; the function ends with the brace in column 1. Macros are passed over, lines that continue them, too.
# Parameters are what commas of the head separate that lie within one pair of parentheses.
functions() {
    code "$1" | awk -v end="$2" '
        NR >= end { exit }
        macro || /^#/ { macro = /\\$/; next }
        head == "" && /^[A-Za-z_]/ && !/^(typedef|struct|enum|union|extern) *[^(]*$/ { start = NR; head = "" ; open = 1 }
        open { head = head " " $0 }
        open && /[;{}]$/ {
            text = head; sub(/\{.*/, "", text)
            if (text ~ /\)[ ]*$/ && text !~ /=/ && head ~ /\{/) {
                body = 1
                sub(/^.*DSV3I_(TARGET|INLINE)\([^()]*\)/, "", text)
                name = text; sub(/\(.*/, "", name); sub(/.*[ *]/, "", name)
                text = substr(text, index(text, name "(") + length(name))
                depth = 0; count = 1
                for (i = 1; i <= length(text); i++) {
                    c = substr(text, i, 1)
                    if (c == "(" || c == "[") depth++
                    if (c == ")" || c == "]") depth--
                    if (c == "," && depth == 1) count++
                }
                if (text ~ /^\( *(void)? *\)/) count = 0
                if (/\}$/) { print start, name, count, NR - start + 1; body = 0 }
            }
            open = 0; if (!body) head = ""
        }
        body && /^\}/ { print start, name, count, NR - start + 1; body = 0; head = "" }'
}

engine_line() { awk '/^ \* Chapter [A-Z] / { print NR - 1; exit }' "$1"; }

# Engine words in chapters 2 to 17, but for lines that name the hook: where packed weights are met, or the engine asked, and
# the comment of the table of ops. What programs print (strings) is not looked at.
words() {
    awk '/^ \* Chapter [0-9]+ / { inside = $3 >= 2 } /^ \* Chapter [A-Z] / { inside = 0 }
         /^\/\* -+ >>table/ { table = 1 }
         inside && !table {
             line = tolower($0)
             gsub(/"([^"\\]|\\.)*"/, "", line)
             if (line ~ /->packed|dsv3i_engine/) gsub(/packed/, "", line)
             if (line ~ /panel|stretch|piece|packed|meeting|meet_|segment|(^|[^p])lane|dsv3i_x86|kernels/) print NR ": " $0
         }
         table && /\*\/$/ { table = 0 }' "$1"
}

# at_most WHAT FOUND LIMIT
at_most() {
    printf '%s: %s of %s\n' "$1" "$2" "$3"
    if [ "$2" -le "$3" ]; then ok; else bad "$1: $2, at most $3"; fi
}
none() { # WHAT FILE
    if [ -s "$2" ]; then bad "$1: $(wc -l < "$2")"; head -n 10 "$2" >&2; else ok; fi
}

engine=$(engine_line "$header")
functions "$header" "${engine:-999999}" > $out/functions
printf '%s functions in the book\n' "$(wc -l < $out/functions)"
awk '$3 > 10' $out/functions > $out/wide
none "functions of more than 10 parameters (line, name, parameters, lines)" $out/wide
awk '$4 > 60' $out/functions > $out/long
none "functions of more than 60 lines (line, name, parameters, lines)" $out/long
words "$header" > $out/words
none "lines of the book with the engine's words" $out/words

chapters "$header" > $out/chapters
limit() { at_most "chapter $1" "$(awk -v name="$1" '$2 == name { n += $3 } END { print n + 0 }' $out/chapters)" "$2"; }
# What a program sees: from the chapter's banner to the end of the declarations.
at_most "chapter api, its declarations" "$(awk '/^ \* Chapter 1 +>>api/ { from = NR - 1 } /^#endif \/\* DSV3_H \*\// { print NR - from + 1; exit }' "$header")" 1000
limit ops 520
limit mla 420
limit moe 320
limit model 620
limit pass 480
limit memory 480
limit save 480
limit calls 580
at_most "chapters 2 to 14" "$(awk '$1 ~ /^[0-9]+$/ && $1 >= 2 && $1 <= 14 { n += $3 } END { print n + 0 }' $out/chapters)" 5200
printf 'whole file: %s, and 9800 are wanted\n' "$(wc -l < "$header")"
for name in tools formats ops rope mla router moe block model pass mtp infer train memory save calls; do
    if grep -q " $name " $out/chapters; then ok; else bad "there is no chapter >>$name"; fi
done
if [ "$(awk '$1 ~ /^[0-9]+$/ { print $1 }' $out/chapters | tr '\n' ' ')" = "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 " ]; then ok; else
    bad "chapters are not numbered 1 to 17: $(awk '{ print $1 }' $out/chapters | tr '\n' ' ')"
fi

# The counters themselves: a header that is bad in every way.
{
    printf '/* ====\n * Chapter 1  >>api\n */\n'
    printf 'int eleven(int a, int (*b)(int, int), int c[2], int d, int e, int f,\n           int g, int h, int i, int j, int k) {\n}\n'
    printf 'static const char *\nten(int a, int (*b)(int, int), int c, int d, int e, /* , ( */ int f, int g, int h, int i, int j) {\n}\n'
    printf '#define MACRO(x) \\\nint not_one(x) { \\\n}\n'
    printf 'static const int list[] = {\n1};\ntypedef struct it {\n    int x;\n} it;\nint declared(int a);\n'
    printf 'static int line(int a, int b) { return a; } /* } */\n'
    printf '/* ====\n * Chapter 2  >>tools\n */\n'
    printf 'void none(void) { /* {\n}\n*/\n    char c = '"'{'"'; call("}\\"{");\n}\n'
    printf 'void sixty_one(void) {\n'
    for i in 1 2 3 4 5 6; do printf ';\n;\n;\n;\n;\n;\n;\n;\n;\n'; done
    printf ';\n;\n;\n;\n;\n}\nDSV3_API int sixty(\n    int a) {\n' # 54 + 5 + 2
    for i in 1 2 3 4 5 6; do printf ';\n;\n;\n;\n;\n;\n;\n;\n;\n'; done
    printf ';\n;\n;\n}\n' # 54 + 3 + 3
    printf '/* ---- >>table  packed panels\n * kernels */\n'
    printf 'int a = w->packed, b = dsv3i_engine_packed(x);\nint Panels;\nint c = w->packed + lanes;\nint d; /* unpacked */\nint plane = f("panel");\n'
    printf '/* ====\n * Chapter A  >>fast\n */\nint panel(int a, int b, int c, int d, int e, int f, int g, int h, int i, int j, int k) {\n}\n'
} > $out/bad.h
functions $out/bad.h "$(engine_line $out/bad.h)" | awk '{ printf "%s %s %s, ", $2, $3, $4 }' > $out/counted
if [ "$(cat $out/counted)" = "eleven 11 3, ten 10 3, line 2 1, none 0 5, sixty_one 0 61, sixty 1 60, " ]; then ok; else
    bad "the counter of functions: $(cat $out/counted)"
fi
words $out/bad.h | sed 's/^[0-9]*: //' | tr '\n' '|' > $out/found
if [ "$(cat $out/found)" = "int Panels;|int c = w->packed + lanes;|int d; /* unpacked */|" ]; then ok; else
    bad "the search for words: $(cat $out/found)"
fi
if [ "$(chapters $out/bad.h | tr '\n' '|')" = "1 api 19|2 tools 136|A fast 5|" ]; then ok; else
    bad "the lengths of chapters: $(chapters $out/bad.h | tr '\n' '|')"
fi
done_testing shape
